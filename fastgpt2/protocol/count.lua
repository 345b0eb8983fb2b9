-- Add `by` to a field of a pool's totals. Whatever stands under the key, the script that calls this goes on: hence
-- pcall.
local function count(key, field, by)
    redis.pcall('HINCRBY', key, field, by)
    redis.pcall('EXPIRE', key, $TOTALS_TTL_SECONDS)
end
