-- Give a worker its name: register it, write its hash and take its lease, all together; run again, it does the same.
--
-- Nothing is written if another worker has the name, or has left anything behind. If that worker has no lease, it gets
-- one that has lapsed: so whoever takes its jobs back can tell whether somebody else was first.
--
-- KEYS[1]          the leases of the pool
-- KEYS[2]          the hash of the worker
-- KEYS[3]          the set of the worker's executions
-- KEYS[4]          the set of all workers
-- KEYS[5...]       the sets of the workers of each queue that the worker serves, and of the pool
-- KEYS[...]        the lists of the jobs that a worker of this name has claimed, of all queues of the pool
-- ARGV[1]          the name of the worker
-- ARGV[2]          its incarnation
-- ARGV[3]          the length of a lease in ms
-- ARGV[4]          the time to live of the hash in seconds
-- ARGV[5]          the number of the sets of workers
-- ARGV[6...]       the fields of the hash, each followed by its value
-- Returns          1 and the lease; or 0, the other worker's lease, how many ms it is still valid for, and of that
--                  worker's hash the host, the process and the space of process ids; or -1 and the same for a worker
--                  that takes no leases: RQ's own
-- include owner_of
-- include clear_unless
clear_unless('zset', KEYS[1])
clear_unless('hash', KEYS[2])
clear_unless('set', KEYS[4])
local sets_end = 4 + ARGV[5]
for i = 5, #KEYS do clear_unless(i <= sets_end and 'set' or 'list', KEYS[i]) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner = owner_of(KEYS[2])
if owner ~= ARGV[2] then
    local left = owner
    for i = sets_end + 1, #KEYS do left = left or redis.call('EXISTS', KEYS[i]) == 1 end
    local leased = redis.call('ZSCORE', KEYS[1], ARGV[1])
    local verdict = 0
    if not leased and owner == '?' and redis.call('HEXISTS', KEYS[2], '$VERSION_FIELD') == 0 then
        verdict = -1
    elseif not leased and left then
        redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
        leased = redis.call('ZSCORE', KEYS[1], ARGV[1])
    end
    if verdict == -1 or (leased and (left or tonumber(leased) > now)) then
        local of = redis.call('HMGET', KEYS[2], 'hostname', 'pid', '$PID_SPACE_FIELD')
        local valid = string.format('%.0f', (tonumber(leased) or 0) - now)
        local reply = {verdict, leased or '', valid}
        for i = 1, 3 do reply[3 + i] = string.sub(of[i] or '', 1, 200) end
        return reply
    end
end
redis.call('DEL', KEYS[2], KEYS[3])
local heard = string.format('%.3f', now / 1000)
redis.call('HSET', KEYS[2], '$INCARNATION_FIELD', ARGV[2], '$HEARD_FIELD', heard, unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[2], ARGV[4])
for i = 4, sets_end do redis.call('SADD', KEYS[i], KEYS[2]) end
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[3]), ARGV[1])
return {1, redis.call('ZSCORE', KEYS[1], ARGV[1])}
