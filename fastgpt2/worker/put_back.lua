-- Put claimed jobs, none of which was started, back to the front of their queue.
--
-- `pcall`: what cannot be put back, as the queue's key is no list, stays claimed.
--
-- KEYS[1]          the list of the queue
-- KEYS[2]          the list of the jobs that this worker has claimed of the queue
-- ARGV             the ids of the jobs, the one that was claimed last first
-- Returns          how many were put back
local count = 0
for _, id in ipairs(ARGV) do
    if type(redis.pcall('LPOS', KEYS[2], id)) == 'number' and type(redis.pcall('LPUSH', KEYS[1], id)) == 'number' then
        redis.call('LREM', KEYS[2], 1, id)
        count = count + 1
    end
end
return count
