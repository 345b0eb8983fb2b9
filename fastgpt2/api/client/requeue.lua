-- Put a failed job back into its queue, as `rq.registry.FailedJobRegistry.requeue` does. As it is one script, two who ask
-- at the same moment requeue the job once. What an entry keeps of its failures (attempts, crashes, results) stays.
--
-- KEYS: 1 the job's hash.
-- ARGV: 1 the job's id; 2 the time, as RQ writes it; 3 the time in seconds since 1970; 4 how many jobs may wait, or 0 for
--       no limit; 5 the key of the pool's totals, where a refusal is counted; 6 the key of the pool's models; 7 for how
--       many ms after a model's last worker its jobs are taken; 8 and on: the plain queues of the pool.
-- Returns {"requeued"}; {"limited", the key of RQ's rate limit, how many of its jobs may run}: the job waits for a slot;
--         {"missing"} if the pool has no such job; {"full", the number of waiting jobs}; {"unserved", the model};
--         {"ended", status, its queue} for one that has ended, but is not among the failed ones; {"active", status}.
-- include count
local status, origin, ttl, limit, most = unpack(
    redis.call("HMGET", KEYS[1], "status", "origin", "ttl", "rate_limit_key", "rate_limit_concurrency"))
if not status or not origin then
    return {"missing"}
end
local plain, model = origin, nil
local mark = string.find(origin, "$MODEL_MARK", 1, true)
if mark then
    plain, model = string.sub(origin, 1, mark - 1), string.sub(origin, mark + 1)
end
local of_pool = false
for i = 8, #ARGV do
    of_pool = of_pool or ARGV[i] == plain
end
if not of_pool then
    return {"missing"}
end
if status ~= "finished" and status ~= "failed" and status ~= "stopped" and status ~= "canceled" then
    return {"active", status}
end
local failed = "$FAILED_PREFIX" .. origin
if not redis.call("ZSCORE", failed, ARGV[1]) then
    return {"ended", status, origin}
end
local now = redis.call("TIME")
local milliseconds = now[1] * 1000 + math.floor(now[2] / 1000)
if model then
    local served_until = redis.call("ZSCORE", ARGV[6], model)
    if not served_until or tonumber(served_until) + tonumber(ARGV[7]) < milliseconds then
        return {"unserved", model}
    end
end
local room = tonumber(ARGV[4])
if room > 0 then
    local depth, models = 0, redis.call("ZRANGE", ARGV[6], 0, -1)
    for i = 8, #ARGV do
        depth = depth + redis.call("LLEN", "$QUEUE_PREFIX" .. ARGV[i])
        for _, other in ipairs(models) do
            depth = depth + redis.call("LLEN", "$QUEUE_PREFIX" .. ARGV[i] .. "$MODEL_MARK" .. other)
        end
    end
    if depth >= room then
        count(ARGV[5], "$REFUSED", 1)
        return {"full", depth}
    end
end
redis.call("ZREM", failed, ARGV[1])
redis.call("HSET", KEYS[1], "started_at", "", "ended_at", "", "worker_name", "", "enqueued_at", ARGV[2])
-- Failed, it was to expire. Its own limit on waiting counts from now.
for _, key in ipairs({KEYS[1], KEYS[1] .. ":dependents", KEYS[1] .. ":dependencies"}) do
    redis.call("PERSIST", key)
    if (tonumber(ttl or 0) or 0) > 0 then
        redis.call("EXPIRE", key, ttl)
    end
end
redis.pcall("SADD", "$QUEUES_KEY", "$QUEUE_PREFIX" .. origin)
most = tonumber(most or 0) or 0
if limit and limit ~= "" and most > 0 then
    redis.call("HSET", KEYS[1], "status", "rate_limited", "enqueue_at_front", "0")
    redis.call("SADD", "$RATE_LIMITS_KEY", limit)
    redis.call("HSET", "$RATE_LIMIT_PREFIX" .. limit, "concurrency", most)
    redis.call("ZADD", "$RATE_LIMIT_PREFIX" .. limit .. ":rate_limited", ARGV[3], ARGV[1])
    return {"limited", limit, most}
end
redis.call("HSET", KEYS[1], "status", "queued")
redis.call("RPUSH", "$QUEUE_PREFIX" .. origin, ARGV[1])
return {"requeued"}
