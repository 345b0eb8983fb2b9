-- Put a running job back to the front of its queue, as if it had never been claimed.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the queue
-- KEYS[3]          the list of the jobs that the worker has claimed of the queue
-- ARGV[1]          the id of the job
-- ARGV[2]          the name of the worker
-- ARGV[3]          the id of the execution
-- ARGV[4]          1 if it counts as a crash
-- Returns          1, or 0 if this worker did not run the job any more
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name', '$EXECUTION_FIELD')
if known[1] ~= 'started' or known[2] ~= ARGV[2] or known[3] ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[1], 'status', 'queued', 'worker_name', '', 'started_at', '')
redis.call('HDEL', KEYS[1], '$EXECUTION_FIELD')
if ARGV[4] == '1' then redis.call('HINCRBY', KEYS[1], '$CRASHES_FIELD', 1) end
redis.call('LREM', KEYS[3], 1, ARGV[1])
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
