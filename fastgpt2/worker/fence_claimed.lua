-- Run commands, which start a job, if a worker still has the job as claimed.
--
-- A job that this worker has as started is one whose start was written, but whose answer never came: it starts again.
-- One that was put into its queue by hand is started too, whatever state it waited in, as RQ's worker does.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue
-- ARGV[1]          the name of the worker
-- ARGV[2]          the id of the job
-- ARGV[3]          the name of the queue
-- ARGV[4...]       the commands, as `run_commands` takes them
-- Returns          a Verdict and, if the commands were run, what `run_commands` returns
-- include forget_executions
-- include run_commands
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name')
local status = known[1] or ''
if status == 'started' and known[2] ~= ARGV[1] then return {0, 0, {}} end
if status == 'canceled' or status == 'finished' or status == 'failed' or status == 'stopped' then return {0, 0, {}} end
if redis.call('HEXISTS', KEYS[1], 'data') == 0 then return {0, 0, {}} end
if type(redis.pcall('LPOS', KEYS[2], ARGV[2])) ~= 'number' then return {0, 0, {}} end
forget_executions(ARGV[3], ARGV[2])
local reply, left_out = run_commands(4)
return {1, reply, left_out}
