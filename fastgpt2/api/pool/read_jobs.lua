-- Return what the hashes of jobs have in some fields, their data, and the packed texts of their failures. What is not
-- there, or is longer than it may be, is an empty string.
--
-- KEYS: none. A user of Redis would need all rights to keys given there, not only the right to read them.
-- ARGV: 1 the most bytes of a field; 2 the most bytes of the data, 0 to leave them out; 3 the most bytes of a failure;
--       4 how many fields there are, N; then the N fields, and the ids of the jobs.
-- Returns for each job the N fields, the data and the failure.
local function read(key, field, most)
    local size = redis.pcall("HSTRLEN", key, field)
    if type(size) == "number" and size > 0 and size <= most then
        return redis.call("HGET", key, field)
    end
    return ""
end

local most, most_data, most_failure, count = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local found = {}
for i = 5 + count, #ARGV do
    local key, job = "$JOB_PREFIX" .. ARGV[i], {}
    for at = 1, count do
        job[at] = read(key, ARGV[4 + at], most)
    end
    job[count + 1] = most_data > 0 and read(key, "data", most_data) or ""
    job[count + 2] = ""
    local status = read(key, "status", most)
    if status == "failed" or status == "stopped" then
        -- Of other jobs, what stands there may be a result of hundreds of megabytes.
        local entries = redis.pcall("XREVRANGE", "$RESULTS_PREFIX" .. ARGV[i], "+", "-", "COUNT", 1)
        local fields = not entries.err and entries[1] and entries[1][2] or {}
        for at = 1, #fields, 2 do
            if fields[at] == "exc_string" and #fields[at + 1] <= most_failure then
                job[count + 2] = fields[at + 1]
            end
        end
    end
    found[#found + 1] = job
end
return found
