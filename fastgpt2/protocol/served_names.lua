-- Return the names of models that a pool's workers serve, or did until a moment ago, as a list that has each name as a
-- key too. `key` is the sorted set of the names. An error of Redis's is raised.
local function served_names(key)
    local time, served = redis.call('TIME'), {}
    local least = time[1] * 1000 + math.floor(time[2] / 1000) - $MODEL_GRACE_SECONDS * 1000
    local after = string.format('(%.0f', least)
    local names = redis.call('ZRANGE', key, '+inf', after, 'BYSCORE', 'REV', 'LIMIT', 0, $MAX_MODELS_OF_POOL)
    for i, name in ipairs(names) do
        served[i] = name
        served[name] = true
    end
    return served
end
