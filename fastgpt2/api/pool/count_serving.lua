-- Count the workers that would take a job now.
--
-- A lease is valid that ends after this moment by Redis's clock, and no later than one that was taken at this moment
-- would. A worker with a lease is silent if it says itself when it was heard of last, and that is too long ago. A key
-- of another kind counts as none.
--
-- KEYS: none. A user of Redis would need all rights to keys given there, not only those to read them.
-- ARGV: 1 the key of the leases; 2 the length of a lease in milliseconds.
-- Returns: 1 if the workers are suspended, else 0; valid leases, at most 1000; those of them whose worker is heard of.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local names = redis.pcall(
    'ZRANGE', ARGV[1], '(' .. string.format('%.0f', now), string.format('%.0f', now + ARGV[2]), 'BYSCORE',
    'LIMIT', 0, 1000)
if names.err then names = {} end
local serving = 0
for _, name in ipairs(names) do
    local heard = redis.pcall('HGET', '$WORKER_PREFIX' .. name, '$HEARD_FIELD')
    local at = type(heard) == 'string' and tonumber(heard)
    if not at or now / 1000 - at <= $SILENT_SECONDS then serving = serving + 1 end
end
return {redis.call('EXISTS', '$SUSPENDED_KEY'), #names, serving}
