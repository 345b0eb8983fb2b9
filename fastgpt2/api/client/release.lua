-- Give back the room within a token's limits that was taken for jobs which were not enqueued.
--
-- KEYS: 1 the account; 2 the jobs that have room. See admit.lua.
-- ARGV: the ids of the jobs.
for _, id in ipairs(ARGV) do
    if redis.call("ZREM", KEYS[2], id) == 1 then
        local reserved = tonumber(redis.call("HGET", KEYS[1], "job:" .. id)) or 0
        redis.call("HDEL", KEYS[1], "job:" .. id)
        redis.call("HINCRBY", KEYS[1], "reserved", string.format("%.0f", -reserved))
    end
end
return 0
