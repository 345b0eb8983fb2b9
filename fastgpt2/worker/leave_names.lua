-- Let the names of a worker that ends lapse now, but for those that another worker of the pool serves too.
--
-- KEYS[1]          the names that the pool's workers serve
-- KEYS[2]          the set of the pool's workers
-- ARGV[1]          the key of the worker's own hash
-- ARGV[2...]       the names of its model
local served = {}
-- `pcall`: what stands there and is no set, or no sorted set, keeps no worker from ending.
for _, key in ipairs(redis.pcall('SMEMBERS', KEYS[2])) do
    local known = key ~= ARGV[1] and redis.pcall('HMGET', key, '$MODELS_FIELD', 'death') or {}
    if type(known[1]) == 'string' and not known[2] then
        local is_list, names = pcall(cjson.decode, known[1])
        if is_list and type(names) == 'table' then
            for _, name in pairs(names) do served[name] = true end
        end
    end
end
local time = redis.call('TIME')
local lapsed = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) - 1)
for i = 2, #ARGV do
    if not served[ARGV[i]] then redis.pcall('ZADD', KEYS[1], 'XX', 'LT', lapsed, ARGV[i]) end
end
return 1
