-- Add one to a field of a pool's totals.
--
-- KEYS[1]          the totals of the pool
-- ARGV[1]          the field
-- include count
count(KEYS[1], ARGV[1], 1)
