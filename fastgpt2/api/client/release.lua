-- Give back the room within a token's limits that was taken for jobs which were not enqueued; see admit.lua.
--
-- KEYS: none, for the reason that admit.lua gives.
-- ARGV: 1 the account; 2 the jobs that have room; 3 and on: the ids of the jobs.
for i = 3, #ARGV do
    if redis.call("ZREM", ARGV[2], ARGV[i]) == 1 then
        local reserved = tonumber(redis.call("HGET", ARGV[1], "job:" .. ARGV[i])) or 0
        redis.call("HDEL", ARGV[1], "job:" .. ARGV[i])
        redis.call("HINCRBY", ARGV[1], "reserved", string.format("%.0f", -reserved))
    end
end
return 0
