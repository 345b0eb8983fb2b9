-- Cancel a job, as `rq.job.Job.cancel` does (status, queue, registries), but only one that has not ended, and let what
-- is left of it expire. As it is one script, it cannot overwrite the end that a worker writes at the same moment. RQ
-- registers cancelled jobs for ever; here, some whose hash has expired are taken off on the way. Those who wait for
-- jobs of the queue hear of it by an entry in a stream; should this user lack the right to write one, they ask before
-- long.
--
-- KEYS: 1 the job's hash. The totals are no key: then a user of Redis would need all rights to them, not only to count.
-- ARGV: 1 the job's id; 2 for how many seconds to keep the job if it does not say; 3 the key of a pool's totals;
--       4 and on: the plain queues of this pool. The cancellation of a job of another pool is not counted.
-- Returns 1 if the job is cancelled, 0 if it had ended, -1 if there is no such job.
-- include count
local known = redis.call("HMGET", KEYS[1], "status", "origin", "result_ttl", "rate_limit_key")
local status, origin, ttl, limit = unpack(known)
if not status then
    return -1
end
if status == "finished" or status == "failed" or status == "stopped" or status == "canceled" then
    return 0
end
origin, ttl = origin or "", tonumber(ttl or 0) or 0
if ttl <= 0 then
    ttl = tonumber(ARGV[2])
end
redis.call("HSET", KEYS[1], "status", "canceled")
redis.call("EXPIRE", KEYS[1], ttl)
-- A job with one of RQ's rate limits stays in its queue, where a worker finds it and frees its slot for those behind
-- it.
if not limit then
    redis.call("LREM", "$QUEUE_PREFIX" .. origin, 0, ARGV[1])
end
if status == "started" then
    for _, execution in ipairs(redis.call("ZRANGE", "$EXECUTIONS_PREFIX" .. ARGV[1], 0, -1)) do
        redis.call("ZREM", "$STARTED_PREFIX" .. origin, ARGV[1] .. ":" .. execution)
    end
else
    redis.call("HSET", KEYS[1], "worker_name", "")
    for _, prefix in ipairs({"$DEFERRED_PREFIX", "$SCHEDULED_PREFIX", "$READY_PREFIX"}) do
        redis.call("ZREM", prefix .. origin, ARGV[1])
    end
end
local now, registry = tonumber(redis.call("TIME")[1]), "$CANCELED_PREFIX" .. origin
for _, id in ipairs(redis.call("ZRANGEBYSCORE", registry, "-inf", now, "LIMIT", 0, 100)) do
    if redis.call("EXISTS", "$JOB_PREFIX" .. id) == 0 then
        redis.call("ZREM", registry, id)
    end
end
redis.call("ZADD", registry, now + ttl, ARGV[1])
local plain = string.match(origin, "^[^$MODEL_MARK]*")
for i = 4, #ARGV do
    if ARGV[i] == plain then
        count(ARGV[3], "$CANCELED_FIELD", 1)
    end
end
redis.pcall("XADD", "$CANCELLATIONS_PREFIX" .. plain, "MAXLEN", "~", $MAX_CANCELLATIONS, "*", "job", ARGV[1])
redis.pcall("EXPIRE", "$CANCELLATIONS_PREFIX" .. plain, $CANCELLATIONS_TTL_SECONDS)
return 1
