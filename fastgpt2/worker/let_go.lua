-- Look whether a job is not this worker's to end; if it was cancelled, write what was generated of it.
--
-- KEYS[1]          the hash of the job
-- ARGV[1]          the id of the execution
-- ARGV[2...]       the fields to write into the hash if the job was cancelled, each followed by its value
-- Returns          the status of the job; `gone` if it was deleted; empty if it was taken back
local known = redis.call('HMGET', KEYS[1], 'status', '$EXECUTION_FIELD')
if not known[1] then return 'gone' end
if known[2] ~= ARGV[1] then return '' end
if known[1] == 'canceled' then
    redis.call('HSET', KEYS[1], unpack(ARGV, 2))
    redis.call('HDEL', KEYS[1], 'worker_name')
end
return known[1]
