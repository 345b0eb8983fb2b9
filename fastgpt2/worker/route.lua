-- Move a claimed job to the queue of the model that it names, if a worker serves that, or did a moment ago.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue in which the job was found
-- KEYS[3]          the list of the queue of the model
-- KEYS[4]          the names that the pool's workers serve
-- ARGV[1]          the id of the job
-- ARGV[2]          the model's name
-- ARGV[3]          the name of the queue of the model
-- Returns          1 if the job is there now, or is not this worker's any more; or the names that are served
-- include served_names
local served = served_names(KEYS[4])
if not served[ARGV[2]] then return served end
if type(redis.pcall('LPOS', KEYS[2], ARGV[1])) ~= 'number' then return 1 end
redis.call('RPUSH', KEYS[3], ARGV[1])
redis.pcall('SADD', '$QUEUES_KEY', KEYS[3])
redis.call('HSET', KEYS[1], 'origin', ARGV[3])
redis.call('LREM', KEYS[2], 1, ARGV[1])
return 1
