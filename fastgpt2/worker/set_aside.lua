-- Note an entry of a queue that cannot be served, and take it off the list of a worker that has claimed it.
--
-- KEYS[1]          the list of what was set aside
-- KEYS[2]          the list of the jobs that the worker has claimed of the queue
-- ARGV[1]          the note
-- ARGV[2]          how many notes are kept
-- ARGV[3]          for how many seconds they are kept
-- ARGV[4]          the entry
if redis.call('TYPE', KEYS[1]).ok ~= 'list' then redis.call('DEL', KEYS[1]) end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, ARGV[2] - 1)
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.pcall('LREM', KEYS[2], 1, ARGV[4])
