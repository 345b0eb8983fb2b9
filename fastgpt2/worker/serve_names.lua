-- Note until when a worker serves its model under some names, and forget names that nobody needs any more.
--
-- A name is forgotten a week after it lapsed, once nothing waits, runs or can be read that was enqueued under it. If
-- there are too many names, one that has lapsed is forgotten sooner, once nothing waits or runs. None is forgotten
-- while the jobs of a dead worker may still have to be taken back: its lists of claimed jobs are found by these names.
--
-- KEYS[1]          the names that the pool's workers serve
-- KEYS[2]          the leases of the pool
-- ARGV[1]          the number of the pool's plain queues
-- ARGV[2...]       their names, and then the names of the worker's model
-- Returns          1 and all names that the pool remembers; or 0 and their number, if they would be too many
-- include clear_unless
clear_unless('zset', KEYS[1])
local plain, first = {unpack(ARGV, 2, 1 + ARGV[1])}, 2 + ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function is_needed(name, prefixes)
    for _, queue in ipairs(plain) do
        for _, prefix in ipairs(prefixes) do
            if redis.call('EXISTS', prefix .. queue .. '$MODEL_MARK' .. name) == 1 then return true end
        end
    end
    return false
end
local function forget(lapsed_before, prefixes)
    for _, name in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', lapsed_before, 'BYSCORE')) do
        if not is_needed(name, prefixes) then
            redis.call('ZREM', KEYS[1], name)
            for _, queue in ipairs(plain) do
                redis.pcall('SREM', '$QUEUES_KEY', '$QUEUE_PREFIX' .. queue .. '$MODEL_MARK' .. name)
            end
        end
    end
end
local new = 0
for i = first, #ARGV do
    if not redis.call('ZSCORE', KEYS[1], ARGV[i]) then new = new + 1 end
end
if redis.pcall('ZCOUNT', KEYS[2], '-inf', now) == 0 then
    local waiting = {'$QUEUE_PREFIX', '$STARTED_PREFIX', '$DEFERRED_PREFIX', '$SCHEDULED_PREFIX', '$READY_PREFIX'}
    local kept = {'$FINISHED_PREFIX', '$FAILED_PREFIX', unpack(waiting)}
    forget(now - $MODEL_REMEMBERED_SECONDS * 1000, kept)
    if redis.call('ZCARD', KEYS[1]) + new > $MAX_MODELS_OF_POOL then
        forget(now - $MODEL_GRACE_SECONDS * 1000, waiting)
    end
end
if new > 0 and redis.call('ZCARD', KEYS[1]) + new > $MAX_MODELS_OF_POOL then
    return {0, redis.call('ZCARD', KEYS[1])}
end
for i = first, #ARGV do
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + $MODEL_SERVED_SECONDS * 1000), ARGV[i])
end
redis.call('EXPIRE', KEYS[1], $MODELS_TTL_SECONDS)
return {1, redis.call('ZRANGE', KEYS[1], 0, $MAX_MODELS_OF_POOL - 1, 'REV')}
