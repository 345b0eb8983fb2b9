-- Delete a key that is of another type than it has to be: nothing could ever be written there.
local function clear_unless(kind, key)
    local found = redis.call('TYPE', key).ok
    if found ~= kind and found ~= 'none' then redis.call('DEL', key) end
end
