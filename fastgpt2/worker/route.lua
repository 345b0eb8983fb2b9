-- Move a claimed job to the queue of the model that it names, if a worker serves that, or did a moment ago.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue in which the job was found
-- KEYS[3]          the list of the queue of the model
-- KEYS[4]          the names that the pool's workers serve
-- ARGV[1]          the id of the job
-- ARGV[2]          the model's name
-- ARGV[3]          the name of the queue of the model
-- ARGV[4]          the name of the queue in which the job was found
-- Returns          1 if the job is there now, or is not this worker's any more; or the names that are served
-- include forget_executions
-- include served_names
local served = served_names(KEYS[4])
if not served[ARGV[2]] then return served end
if not redis.call('LPOS', KEYS[2], ARGV[1]) then return 1 end
local status = redis.call('HGET', KEYS[1], 'status')
if not status then  -- deleted since it was read: nothing may be written there
    redis.call('LREM', KEYS[2], 1, ARGV[1])
    return 1
end
if status == 'started' then
    -- This worker has started it, to refuse it, and never heard the answer. Another could not start it so.
    forget_executions(ARGV[4], ARGV[1])
    redis.call('HSET', KEYS[1], 'status', 'queued', 'worker_name', '', 'started_at', '')
    redis.call('HDEL', KEYS[1], '$EXECUTION_FIELD')
end
redis.call('RPUSH', KEYS[3], ARGV[1])
redis.pcall('SADD', '$QUEUES_KEY', KEYS[3])
redis.call('HSET', KEYS[1], 'origin', ARGV[3])
redis.call('LREM', KEYS[2], 1, ARGV[1])
return 1
