-- Fetch the entries of several jobs, but none that is too large.
--
-- KEYS             the hashes of the jobs
-- ARGV[1]          how many bytes an entry may have
-- Returns          for each job its fields, each followed by its value; the size of an entry that has more bytes; or
--                  the kind of what stands there if it is no hash
local found = {}
for i, key in ipairs(KEYS) do
    local kind, size = redis.call('TYPE', key).ok, 0
    if kind == 'hash' then
        for _, field in ipairs(redis.call('HKEYS', key)) do size = size + redis.call('HSTRLEN', key, field) end
    end
    if kind ~= 'hash' and kind ~= 'none' then found[i] = kind
    elseif size > tonumber(ARGV[1]) then found[i] = size
    else found[i] = redis.call('HGETALL', key) end
end
return found
