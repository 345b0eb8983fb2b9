-- Renew a worker's lease, and look for others' that have lapsed, or that reach further into the future than any can.
--
-- KEYS[1]          the leases of the pool
-- ARGV[1]          the name of the worker
-- ARGV[2]          the length of a lease in ms
-- Returns          what this worker's lease was before (empty if there was none); what it is now; of the lapsed leases,
--                  at most 100, and of those too far in the future, at most 100, each name and what the lease is
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local upto = string.format('%.0f', now + ARGV[2])
local before = redis.call('ZSCORE', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], upto, ARGV[1])
local lapsed = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
local strange = redis.call('ZRANGE', KEYS[1], '(' .. upto, '+inf', 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
return {before or '', redis.call('ZSCORE', KEYS[1], ARGV[1]), lapsed, strange}
