-- Put a failed job back into its queue, as `rq.registry.FailedJobRegistry.requeue` does. As it is one script, two who
-- ask at the same moment requeue the job once. What an entry keeps of its failures (attempts, crashes, results) stays.
--
-- KEYS: 1 the job's hash.
-- ARGV: 1 the job's id; 2 the time, as RQ writes it; 3 the time in seconds since 1970; 4 how many jobs may wait, or 0
--       for no limit; 5 the key of the pool's totals, where a refusal is counted; 6 the key of the names of models that
--       are served; 7 the name of the token whose job it is from now on, or "" if that stays as it is; 8 and on: the
--       plain queues of the pool.
-- Returns {"requeued"}; {"limited", the key of RQ's rate limit, how many of its jobs may run}: the job waits for a
--         slot; {"missing"} if the pool has no such job; {"full", the number of waiting jobs}; {"unserved", the model,
--         the names that are served}; {"ended", status, its queue} for one that has ended, but is not among the failed
--         ones; {"active", status}.
-- include count
-- include served_names
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
if model then
    local served = served_names(ARGV[6])
    if not served[model] then
        return {"unserved", model, unpack(served)}
    end
end
local room = tonumber(ARGV[4])
if room > 0 then
    local depth, models = 0, redis.pcall("ZRANGE", ARGV[6], 0, $MAX_MODELS_OF_POOL - 1, "REV")
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
if ARGV[7] ~= "" then
    redis.call("HSET", KEYS[1], "$TOKEN_FIELD", ARGV[7])
end
-- Failed, it was to expire. Its own limit on waiting counts from now.
for _, key in ipairs({KEYS[1], KEYS[1] .. ":dependents", "$JOB_PREFIX:" .. ARGV[1] .. ":dependencies"}) do
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
