-- Run commands, which start a job, if a worker still has the job as claimed.
--
-- A job that this worker has as started is one whose start was written, but whose answer never came: it starts again.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue
-- ARGV[1]          the name of the worker
-- ARGV[2]          the id of the job
-- ARGV[3]          the name of the queue
-- ARGV[4...]       the commands, as `run_commands` takes them
-- Returns          a Verdict and, if the commands were run, what the last one replied
-- include forget_executions
-- include run_commands
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name')
if known[1] ~= 'queued' and not (known[1] == 'started' and known[2] == ARGV[1]) then return {0, 0} end
if not redis.call('LPOS', KEYS[2], ARGV[2]) then return {0, 0} end
forget_executions(ARGV[3], ARGV[2])
return {1, run_commands(4)}
