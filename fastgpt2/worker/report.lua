-- Add a worker's figures to those of its pool and of its model, once.
--
-- The time is Redis's own, so that the ten seconds of all workers begin together. `pcall`: a field or a key that is not
-- what it should be loses its own counts, and no others.
--
-- KEYS[1]          the totals of the pool
-- KEYS[2]          the mark of this worker's last report
-- KEYS[3]          the list of the jobs that ended last
-- KEYS[4]          the totals of the pool's workers with the same model
-- ARGV[1]          the mark of this report
-- ARGV[2]          how long the mark is remembered, in seconds
-- ARGV[3]          the key of a recent hash, without its number
-- ARGV[4]          how many fields of the totals follow
-- ARGV[5]          how many fields of the recent hash follow
-- ARGV[6...]       the fields of the totals, then those of the recent hash, each followed by what to add to it; then
--                  the records of jobs that ended
-- Returns          1, or 0 if this report had come before
if redis.pcall('GET', KEYS[2]) == ARGV[1] then return 0 end
local at = 6
local function add(key, count, ttl)
    for _ = 1, count do
        local field, by = ARGV[at], ARGV[at + 1]
        redis.pcall(string.find(by, '.', 1, true) and 'HINCRBYFLOAT' or 'HINCRBY', key, field, by)
        at = at + 2
    end
    if count > 0 then redis.pcall('EXPIRE', key, ttl) end
end
add(KEYS[1], tonumber(ARGV[4]), $TOTALS_TTL_SECONDS)
at = 6
add(KEYS[4], tonumber(ARGV[4]), $TOTALS_TTL_SECONDS)
local now = tonumber(redis.call('TIME')[1])
add(ARGV[3] .. string.format('%d', now - now % $BUCKET_SECONDS), tonumber(ARGV[5]), $RECENT_TTL_SECONDS)
for i = at, #ARGV do redis.pcall('LPUSH', KEYS[3], ARGV[i]) end
if at <= #ARGV then
    redis.pcall('LTRIM', KEYS[3], 0, $MAX_LATEST - 1)
    redis.pcall('EXPIRE', KEYS[3], $LATEST_TTL_SECONDS)
end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
return 1
