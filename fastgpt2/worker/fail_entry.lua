-- Mark a job as failed, and let it expire; what stands under its name and is no job's hash is left as it is.
--
-- KEYS[1]          the hash of the job
-- ARGV[1]          for how many seconds the job is kept
-- ARGV[2]          the time, as RQ writes it
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'hash' and kind ~= 'none' then
    return redis.error_reply('WRONGTYPE the job\'s key holds a ' .. kind .. ', no hash')
end
redis.call('HSET', KEYS[1], 'status', 'failed', 'ended_at', ARGV[2])
redis.call('HDEL', KEYS[1], '$EXECUTION_FIELD')
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
