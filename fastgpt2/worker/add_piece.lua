-- Add a piece to a job's stream, and let the stream expire: whatever is cut off next, none stays for ever.
--
-- KEYS[1]          the stream
-- ARGV[1]          about how many entries it may have
-- ARGV[2]          how long it lives from now on, in seconds
-- ARGV[3...]       the fields of the entry, each followed by its value
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
redis.call('EXPIRE', KEYS[1], ARGV[2])
