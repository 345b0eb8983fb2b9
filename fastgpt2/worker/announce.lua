-- Write a worker's entries anew, unless another worker has its name by now. Redis may have lost them, or somebody may
-- have made them what they must not be: a count of RQ's that is no number would let no job's end be written.
--
-- KEYS[1]          the hash of the worker
-- KEYS[2]          the set of the worker's executions
-- KEYS[3]          the set of all workers
-- KEYS[4...]       the sets of the workers of each queue
-- ARGV[1]          the worker's incarnation
-- ARGV[2]          the time to live of the hash in seconds
-- ARGV[3]          the channel of the worker's commands
-- ARGV[4...]       the fields of the hash, each followed by its value
-- Returns          1, or 0 if another worker has the name; how many listen to the channel, -1 if that may not be asked
-- include owner_of
-- include clear_unless
local owner = owner_of(KEYS[1])
if owner and owner ~= ARGV[1] then return {0, -1} end
clear_unless('hash', KEYS[1])
for i = 2, #KEYS do clear_unless('set', KEYS[i]) end
local function keep_number(field, form, most)
    local value = redis.call('HGET', KEYS[1], field)
    if value and (#value > most or not string.match(value, form)) then redis.call('HDEL', KEYS[1], field) end
end
keep_number('successful_job_count', '^%d+$', 18)
keep_number('failed_job_count', '^%d+$', 18)
keep_number('total_working_time', '^%d+%.?%d*$', 40)
local time = redis.call('TIME')
local heard = string.format('%.3f', time[1] + time[2] / 1e6)
redis.call('HSET', KEYS[1], '$INCARNATION_FIELD', ARGV[1], '$HEARD_FIELD', heard, unpack(ARGV, 4))
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
for i = 3, #KEYS do redis.call('SADD', KEYS[i], KEYS[1]) end
local listening = redis.pcall('PUBSUB', 'NUMSUB', ARGV[3])
return {1, listening[2] or -1}
