-- Write down how many jobs wait, in the ten seconds of this moment by Redis's clock, as workers do with their figures.
--
-- ARGV: what the keys of the pool's recent hashes begin with, then the pool's RQ queues.
-- The keys are not KEYS: a user of Redis would need all rights to them, not only those that are used.
local now, depth = tonumber(redis.call('TIME')[1]), 0
for i = 2, #ARGV do
    local length = redis.pcall('LLEN', '$QUEUE_PREFIX' .. ARGV[i])
    if type(length) == 'number' then depth = depth + length end
end
local key = ARGV[1] .. string.format('%d', now - now % $BUCKET_SECONDS)
redis.pcall('HSET', key, '$DEPTH', depth)
redis.pcall('EXPIRE', key, $RECENT_TTL_SECONDS)
return depth
