-- Return the field `data` of each job's hash; an empty string for a job without one, and where the field is too long.
--
-- KEYS: none. A user of Redis would need all rights to keys given there, not only the right to read them.
-- ARGV: 1 the most bytes that a field may have; 2 and on: the keys of the jobs' hashes.
local found = {}
for i = 2, #ARGV do
    local size = redis.pcall('HSTRLEN', ARGV[i], 'data')
    if type(size) == 'number' and size > 0 and size <= tonumber(ARGV[1]) then
        found[i - 1] = redis.call('HGET', ARGV[i], 'data')
    else
        found[i - 1] = ''
    end
end
return found
