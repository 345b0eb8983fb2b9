-- Put claimed jobs, none of which was started, back to the front of their queue.
--
-- KEYS[1]          the list of the queue
-- KEYS[2]          the list of the jobs that this worker has claimed of the queue
-- ARGV             the ids of the jobs, the one that was claimed last first
for _, id in ipairs(ARGV) do
    if redis.call('LREM', KEYS[2], 1, id) > 0 then redis.call('LPUSH', KEYS[1], id) end
end
