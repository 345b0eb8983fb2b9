-- Give a worker's lease up. The lease of a worker that leaves jobs behind stays, so that they are found.
--
-- KEYS[1]          the leases of the pool
-- KEYS[2...]       the lists of the jobs that the worker has claimed
-- ARGV[1]          the name of the worker
for i = 2, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 1 then return 0 end
end
return redis.call('ZREM', KEYS[1], ARGV[1])
