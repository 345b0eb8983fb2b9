-- Run commands if a worker still has a job as started, under one execution.
--
-- KEYS[1]          the hash of the job
-- KEYS[2]          if given, the set of the jobs that wait for this one: nothing is run if there are any
-- ARGV[1]          the name of the worker
-- ARGV[2]          the id of the execution
-- ARGV[3...]       the commands, as `run_commands` takes them
-- Returns          a Verdict and, if the commands were run, what `run_commands` returns
-- include run_commands
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name', '$EXECUTION_FIELD')
if known[1] ~= 'started' or known[2] ~= ARGV[1] or known[3] ~= ARGV[2] then return {0, 0, {}} end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return {2, 0, {}} end
local reply, left_out = run_commands(3)
return {1, reply, left_out}
