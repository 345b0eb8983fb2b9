-- Put a job into its queue, unless no worker serves the model that it names, the queue is full, or an earlier request
-- with the same idempotency key asked for it.
-- The script may be repeated: a job that is there already was sent by the same client, which did not hear the answer.
-- So that WAIT and WAITAOF, which confirm what a connection has written, confirm that job too, something is written
-- anyway.
--
-- KEYS: 1 the job's hash; 2 its queue; 3 the set of queues; 4 and on: the queues that count towards the limit, beside
--       those of the models that the pool remembers; the last one: the hash kept of the idempotency key, or the job's
--       hash once more.
-- ARGV: 1 the job's id; 2 how many jobs may wait, or 0 for no limit; 3 the key of the pool's totals, where a refusal is
--       counted; 4 a digest of what the request asks for, or "" without an idempotency key; 5 for how many seconds the
--       digest is kept; 6 the model that the job names, or "" if none or if that need not be served; 7 the key of the
--       names that are served: no key here, as a user of Redis may have the right to read it only; 8 and on: the fields
--       of the job's hash and their values.
-- Returns 0 if the job is in its queue; the number of waiting jobs if the queue is full; for an earlier request with
--         this key the id of its job, or "" if it asked for something else; a list of the names that are served if the
--         job's is not among them.
-- include count
-- include served_names
-- A hash without a status is no job: something wrote a field into it after it had been lost.
local present = redis.call("HGET", KEYS[1], "status")
if present then
    redis.call("HSET", KEYS[1], "status", present)
    return 0
end
if ARGV[4] ~= "" then
    local known = redis.call("HMGET", KEYS[#KEYS], "job", "asked")
    local status = known[1] and redis.call("HGET", "$JOB_PREFIX" .. known[1], "status")
    if status and known[2] ~= ARGV[4] then
        return ""
    elseif status and status ~= "canceled" then
        redis.call("HSET", KEYS[#KEYS], "asked", ARGV[4])
        return known[1]
    end
end
if ARGV[6] ~= "" then
    local served = served_names(ARGV[7])
    if not served[ARGV[6]] then
        return served
    end
end
local limit = tonumber(ARGV[2])
if limit > 0 then
    local depth = 0
    -- `pcall`: rights that sufficed before there were such names suffice for jobs that name no model.
    local models = redis.pcall("ZRANGE", ARGV[7], 0, $MAX_MODELS_OF_POOL - 1, "REV")
    for i = 4, #KEYS - 1 do
        depth = depth + redis.call("LLEN", KEYS[i])
        for _, model in ipairs(models) do
            depth = depth + redis.call("LLEN", KEYS[i] .. "$MODEL_MARK" .. model)
        end
    end
    if depth >= limit then
        count(ARGV[3], "$REFUSED", 1)
        return depth
    end
end
if ARGV[4] ~= "" then
    redis.call("HSET", KEYS[#KEYS], "job", ARGV[1], "asked", ARGV[4])
    redis.call("EXPIRE", KEYS[#KEYS], ARGV[5])
end
-- Only RQ's dashboards read this set: where another program has made it something else, jobs are enqueued all the same.
redis.pcall("SADD", KEYS[3], KEYS[2])
redis.call("HSET", KEYS[1], unpack(ARGV, 8))
redis.call("RPUSH", KEYS[2], ARGV[1])
return 0
