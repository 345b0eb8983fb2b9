-- Take back the jobs of a dead worker, and take the worker off RQ's lists.
--
-- KEYS[1]          the leases of the pool
-- KEYS[2i]         the list of queue i
-- KEYS[2i + 1]     the list of the jobs that the worker has claimed of queue i
-- ARGV[1]          the name of the worker
-- ARGV[2]          what the worker's lease must still be; empty if the worker is known to be dead
-- ARGV[3]          a job with this many crashes is given up
-- ARGV[4]          how many ms after it lapsed the lease of a worker without jobs is deleted
-- ARGV[5]          the time, as RQ writes it
-- ARGV[6]          the totals of the pool
-- ARGV[6 + i]      the name of queue i
-- Returns          1, or 0 if the worker was heard of since; the ids of the jobs that were put back; the ids of the
--                  jobs to give up; the ids of the jobs whose end was written, but perhaps not all that follows from it
--                  (where there are rate limits: also of those that may have a slot to free); how many jobs the worker
--                  had finished. The jobs of the third and fourth list stay in the worker's list.
-- include count
-- include forget_executions
local worker, leased = ARGV[1], redis.pcall('ZSCORE', KEYS[1], ARGV[1])
if type(leased) == 'table' then  -- not what it has to be: nobody could ever take a lease
    redis.call('DEL', KEYS[1])
    leased = false
end
if ARGV[2] ~= '' and leased ~= ARGV[2] then return {0, {}, {}, {}, 0} end
local finished = redis.pcall('HGET', '$WORKER_PREFIX' .. worker, 'successful_job_count')
finished = type(finished) == 'string' and tonumber(finished) or 0
local back, poison, over, found, kept = {}, {}, {}, 0, 0
-- Put a job to the front of its queue; return whether it must stay claimed, as the queue's key is no list.
local function put_back(queue, id)
    if type(redis.pcall('LPUSH', queue, id)) ~= 'number' then
        kept = kept + 1
        return true
    end
    back[#back + 1] = id
    return false
end
local limited = redis.call('EXISTS', '$RATE_LIMITS_KEY') == 1
for i = 1, (#KEYS - 1) / 2 do
    local queue, claimed, name = KEYS[2 * i], KEYS[2 * i + 1], ARGV[6 + i]
    local ids = redis.pcall('LRANGE', claimed, 0, -1)
    if ids.err then
        redis.call('DEL', claimed)
        ids = {}
    end
    found = found + #ids
    for n = #ids, 1, -1 do
        local id = ids[n]
        local key, keep = '$JOB_PREFIX' .. id, false
        local known = redis.pcall('HMGET', key, 'status', 'worker_name')
        local status = known[1]
        if status == 'queued' then
            keep = put_back(queue, id)
        elseif status == 'started' and known[2] == worker then
            local crashes = redis.pcall('HINCRBY', key, '$CRASHES_FIELD', 1)
            if type(crashes) ~= 'number' or crashes >= tonumber(ARGV[3]) then
                poison[#poison + 1] = id
                keep = true
            else
                forget_executions(name, id)
                redis.call('HSET', key, 'status', 'queued', 'worker_name', '', 'started_at', '')
                redis.call('HDEL', key, '$EXECUTION_FIELD')
                local ttl = redis.call('HGET', key, 'ttl')
                if (tonumber(ttl) or 0) > 0 then redis.pcall('EXPIRE', key, ttl) end
                keep = put_back(queue, id)
            end
        elseif status ~= 'started' then
            if status == 'canceled' then
                redis.call('HSET', key, 'ended_at', ARGV[5])
                redis.call('HDEL', key, 'worker_name')
            end
            if status == 'canceled' or not status then forget_executions(name, id) end
            if limited or status == 'finished' or status == 'failed' or status == 'stopped' then
                over[#over + 1] = id
                keep = true
            end
        end
        if not keep then redis.call('LREM', claimed, 1, id) end
    end
    redis.pcall('SREM', '$WORKERS_KEY:' .. name, '$WORKER_PREFIX' .. worker)
end
if #back > 0 then count(ARGV[6], '$RECOVERIES', #back) end
redis.pcall('SREM', '$WORKERS_KEY', '$WORKER_PREFIX' .. worker)
redis.call('DEL', '$WORKER_PREFIX' .. worker, '$WORKER_PREFIX' .. worker .. ':executions')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if #poison + #over + kept > 0 or (found > 0 and ARGV[2] ~= '') then
    redis.call('ZADD', KEYS[1], string.format('%.0f', now), worker)
elseif ARGV[2] == '' or now - tonumber(leased) > tonumber(ARGV[4]) then
    redis.call('ZREM', KEYS[1], worker)
elseif tonumber(leased) > now then
    redis.call('ZADD', KEYS[1], string.format('%.0f', now), worker)
end
return {1, back, poison, over, finished}
