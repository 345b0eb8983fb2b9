-- Let go of a job that is not this worker's to end; if it was cancelled, write what was generated of it.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue
-- ARGV[1]          the id of the job
-- ARGV[2]          the id of the execution
-- ARGV[3...]       the fields to write into the hash if the job was cancelled, each followed by its value
-- Returns          the status of the job; empty if the job is gone, or if it was taken back: then what stands in the
--                  list may be a later claim, and stays
local known = redis.call('HMGET', KEYS[1], 'status', '$EXECUTION_FIELD')
if not known[1] then redis.call('LREM', KEYS[2], 1, ARGV[1]) return '' end
if known[2] ~= ARGV[2] then return '' end
if known[1] == 'canceled' then
    redis.call('HSET', KEYS[1], unpack(ARGV, 3))
    redis.call('HDEL', KEYS[1], 'worker_name')
    redis.call('LREM', KEYS[2], 1, ARGV[1])
end
return known[1]
