-- Take a worker off the lists, and give its lease up, if it still has its name; run again, it does nothing.
--
-- The lease of a worker that leaves claimed jobs behind stays, so that they are found.
--
-- KEYS             as `sign_on` takes them
-- ARGV[1]          the name of the worker
-- ARGV[2]          its incarnation
-- ARGV[3]          the time, as RQ writes it
-- ARGV[4]          the number of the sets of workers
-- Returns          1, or 0 if the worker does not have the name
-- include owner_of
if owner_of(KEYS[2]) ~= ARGV[2] then return 0 end
local left, sets_end = false, 4 + ARGV[4]
for i = sets_end + 1, #KEYS do left = left or redis.call('EXISTS', KEYS[i]) == 1 end
if not left then redis.call('ZREM', KEYS[1], ARGV[1]) end
for i = 4, sets_end do redis.call('SREM', KEYS[i], KEYS[2]) end
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[2], 'death', ARGV[3])
redis.call('EXPIRE', KEYS[2], 60)
return 1
