-- Return who has a worker's name: the incarnation in the worker's hash, '?' if the hash is that of a worker that writes
-- none (RQ's own, or one of an older release), false if nobody has the name. A hash that holds no more than counts and
-- a heartbeat is what a worker that was taken for dead leaves behind: it is nobody's.
local function owner_of(key)
    local known = redis.pcall('HMGET', key, '$INCARNATION_FIELD', 'birth', 'death')
    if known.err or known[3] then return false end
    return known[1] or (known[2] and '?')
end
