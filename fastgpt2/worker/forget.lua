-- Delete all that RQ keeps of a job's executions.
--
-- KEYS             none: the keys are found on the way
-- ARGV[1]          the name of the job's queue
-- ARGV[2]          the id of the job
-- include forget_executions
forget_executions(ARGV[1], ARGV[2])
