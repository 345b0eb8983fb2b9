-- Count the leases that are valid now: they end after this moment by Redis's clock, and no later than a lease that was
-- taken at this moment would. A key of another kind counts as none.
--
-- KEYS: none. A user of Redis would need all rights to a key given there, not only the right to read it.
-- ARGV: 1 the key of the leases; 2 the length of a lease in milliseconds.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = redis.pcall('ZCOUNT', ARGV[1], '(' .. string.format('%.0f', now), string.format('%.0f', now + ARGV[2]))
if type(count) ~= 'number' then return 0 end
return count
