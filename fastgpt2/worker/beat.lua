-- Renew a worker's lease, and look for others' that have lapsed, or that reach further into the future than any can.
--
-- A worker whose name another has by now has no lease, and renews none.
--
-- Where the lease is gone or has lapsed, Redis has lost its data or was away: then the names of the worker's model are
-- told at once, and not only with the next heartbeat, so that nobody who asks for the model is refused meanwhile.
--
-- KEYS[1]          the leases of the pool
-- KEYS[2]          the hash of the worker
-- KEYS[3]          the names that the pool's workers serve
-- ARGV[1]          the name of the worker
-- ARGV[2]          the length of a lease in ms
-- ARGV[3]          the incarnation of the worker
-- ARGV[4...]       the names of its model
-- Returns          what this worker's lease was before (empty if there was none); what it is now, empty if another has
--                  the name; of the lapsed leases, at most 100, and of those too far in the future, at most 100, each
--                  name and what the lease is
-- include owner_of
local owner = owner_of(KEYS[2])
if owner and owner ~= ARGV[3] then return {'', '', {}, {}} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local upto = string.format('%.0f', now + ARGV[2])
local before = redis.pcall('ZSCORE', KEYS[1], ARGV[1])
if type(before) == 'table' then
    -- Not what it has to be: nobody could ever take a lease.
    redis.call('DEL', KEYS[1])
    before = false
end
redis.call('ZADD', KEYS[1], upto, ARGV[1])
if not before or tonumber(before) < now then
    for i = 4, #ARGV do
        redis.pcall('ZADD', KEYS[3], 'GT', string.format('%.0f', now + $MODEL_SERVED_SECONDS * 1000), ARGV[i])
    end
    redis.pcall('EXPIRE', KEYS[3], $MODELS_TTL_SECONDS)
end
local lapsed = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
local strange = redis.call('ZRANGE', KEYS[1], '(' .. upto, '+inf', 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
return {before or '', redis.call('ZSCORE', KEYS[1], ARGV[1]), lapsed, strange}
