-- Write down how many jobs wait, in the ten seconds of this moment by Redis's clock, as workers do with their figures.
--
-- KEYS: none. A user of Redis would need all rights to keys given there, not only those that are used.
-- ARGV: 1 what the keys of the pool's recent hashes begin with; 2 the key of the models that the pool knows; 3 and on:
--     the pool's plain RQ queues.
local names = redis.pcall('ZRANGE', ARGV[2], 0, $MAX_MODELS_OF_POOL - 1, 'REV')
if names.err then names = {} end
local now, depth = tonumber(redis.call('TIME')[1]), 0
local function count(queue)
    local length = redis.pcall('LLEN', '$QUEUE_PREFIX' .. queue)
    if type(length) == 'number' then depth = depth + length end
end
for i = 3, #ARGV do
    count(ARGV[i])
    for _, name in ipairs(names) do count(ARGV[i] .. '$MODEL_MARK' .. name) end
end
local key = ARGV[1] .. string.format('%d', now - now % $BUCKET_SECONDS)
local wrote = redis.pcall('HSET', key, '$DEPTH', depth)
-- A key of another kind is no matter; a Redis that is full, a replica or unable to save is.
if type(wrote) == 'table' and wrote.err and not wrote.err:find('WRONGTYPE') then return wrote end
redis.pcall('EXPIRE', key, $RECENT_TTL_SECONDS)
return depth
