-- Take room within the limits of a token for jobs that are about to be enqueued, for all or for none.
--
-- A token's account is a bucket that leaks. Its level, `debt`, rises by what jobs have used when they end, and sinks by
-- the tokens that it may use in a minute, evenly. Above it, each job that has not ended has reserved what it may use.
-- A request is let in while there is any room, so that the limit is passed by one request at most, and what is used
-- beyond is waited for. First all that workers have told since is taken into account, each end at its own moment.
--
-- Workers tell of jobs that they ran. Those that ended otherwise (cancelled in the queue, expired, deleted) are found
-- by a look at some jobs each time, those first at which nobody has looked for longest; at many, before a refusal.
--
-- KEYS: for each job, the hash kept of its idempotency key; none if the request has no such key. The account's are no
--       keys: then a user of Redis would need all these rights to jobs and queues too.
-- ARGV: 1 the account; 2 the jobs that have room, each with the moment when it was last looked at, in ms; 3 the stream
--       of what jobs have used; 4 how many jobs may wait or run, or 0; 5 how many tokens a minute may be used, or 0; 6
--       and on: the ids of the jobs, each with how many tokens it may use.
-- Returns 0 if there is room, 1 if there are too many jobs, 2 if the minute's tokens are used up; the number of jobs
--         that have room now; how many tokens are used or reserved; how many are used. The latter two are texts.
local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local stamp = string.format("%.0f", now)
local account_key, jobs_key, usage_key = ARGV[1], ARGV[2], ARGV[3]
local waiting, per_minute, jobs = tonumber(ARGV[4]), tonumber(ARGV[5]), 0
local account = redis.call("HMGET", account_key, "debt", "at", "reserved")
local debt, at, reserved = tonumber(account[1]) or 0, tonumber(account[2]) or now, tonumber(account[3]) or 0

-- After a failover, Redis's clock may be behind what it was.
at = math.min(at, now)
if redis.call("ZCARD", jobs_key) == 0 then reserved = 0 end

local function leak(moment)
    moment = math.min(moment, now)
    if moment > at then
        debt = math.max(0, debt - (moment - at) * per_minute / 60000)
        at = moment
    end
end
local function give_back(id)
    if redis.call("ZREM", jobs_key, id) == 1 then
        reserved = math.max(0, reserved - (tonumber(redis.call("HGET", account_key, "job:" .. id)) or 0))
        redis.call("HDEL", account_key, "job:" .. id)
    end
end
local function look_at_jobs(most)
    local found = redis.call("ZRANGE", jobs_key, 0, most - 1, "WITHSCORES")
    for i = 1, #found, 2 do
        local status = redis.pcall("HGET", "$JOB_PREFIX" .. found[i], "status")
        if type(status) ~= "string" then
            -- One that is not there may be about to be enqueued.
            if now - tonumber(found[i + 1]) > 30000 then give_back(found[i]) end
        elseif (status == "failed" or status == "stopped") and tonumber(found[i + 1]) > now then
            -- It is about to be requeued, or was, and has failed anew: then its worker tells of it.
        elseif status == "finished" or status == "failed" or status == "stopped" or status == "canceled" then
            give_back(found[i])
        else
            redis.call("ZADD", jobs_key, stamp, found[i])
        end
    end
end
local function objection()
    if waiting > 0 and redis.call("ZCARD", jobs_key) + jobs > waiting then return 1 end
    if per_minute > 0 and debt + reserved >= per_minute then return 2 end
    return 0
end

for _, entry in ipairs(redis.call("XRANGE", usage_key, "-", "+")) do
    leak(tonumber(string.match(entry[1], "^%d+")))
    local usage = {}
    for i = 1, #entry[2], 2 do usage[entry[2][i]] = entry[2][i + 1] end
    debt = debt + (tonumber(usage.tokens) or 0)
    give_back(usage.job or "")
end
leak(now)
if per_minute == 0 then debt = 0 end
if redis.call("EXISTS", usage_key) == 0 then
    redis.call("XADD", usage_key, "*", "job", "")  -- workers add to a stream that is there, and make none
end
redis.call("XTRIM", usage_key, "MAXLEN", 0)

-- Each by its own key: of one request, some may go on while others were cancelled, and are enqueued anew.
local function goes_on(number)
    local known = KEYS[number] and redis.call("HGET", KEYS[number], "job")
    local status = known and redis.pcall("HGET", "$JOB_PREFIX" .. known, "status")
    return type(status) == "string" and status ~= "canceled"
end
local new = {}
for i = 6, #ARGV, 2 do
    if not goes_on((i - 4) / 2) then new[#new + 1] = i end
end
jobs = #new
local verdict = 0
if jobs > 0 then
    look_at_jobs(20)
    verdict = objection()
    if verdict > 0 then
        look_at_jobs(1000)
        verdict = objection()
    end
    if verdict == 0 then
        for _, i in ipairs(new) do
            -- One that is there already is about to be requeued. Until it is, its status is that of an end, which must
            -- not take its room away again: as if looked at in half a minute.
            give_back(ARGV[i])
            local there = type(redis.pcall("HGET", "$JOB_PREFIX" .. ARGV[i], "status")) == "string"
            redis.call("ZADD", jobs_key, there and string.format("%.0f", now + 30000) or stamp, ARGV[i])
            redis.call("HSET", account_key, "job:" .. ARGV[i], ARGV[i + 1])
            reserved = reserved + tonumber(ARGV[i + 1])
        end
    end
end
redis.call("HSET", account_key, "debt", string.format("%.3f", debt), "at", string.format("%.0f", at))
redis.call("HSET", account_key, "reserved", string.format("%.0f", reserved))
for i = 1, 3 do redis.call("EXPIRE", ARGV[i], $ACCOUNT_TTL_SECONDS) end
return {verdict, redis.call("ZCARD", jobs_key), string.format("%.3f", debt + reserved), string.format("%.3f", debt)}
