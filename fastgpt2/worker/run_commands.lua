-- Run the commands that ARGV holds from index `at` on, each as its number of words and then these words.
--
-- A key of the job or a queue that is of another kind than it should be ends all. One that many jobs share (a registry,
-- a worker's entry) does not: then the job is served without being written there.
-- Returns what the last command replied, and of the commands that were left out each key and what Redis says of it.
local needed = {
    '$JOB_PREFIX', '$QUEUE_PREFIX', '$RESULTS_PREFIX', '$EXECUTION_PREFIX', '$EXECUTIONS_PREFIX', '$STREAM_PREFIX'
}
local function begins(key, prefix) return string.sub(key, 1, #prefix) == prefix end
local function is_needed(key)
    for _, prefix in ipairs(needed) do
        if begins(key, prefix) then return true end
    end
    return false
end
local function run_commands(at)
    local reply, left_out = 0, {}
    while at <= #ARGV do
        local last = at + tonumber(ARGV[at])
        local command, key = ARGV[at + 1], ARGV[at + 2]
        if is_needed(key) then
            reply = redis.call(unpack(ARGV, at + 1, last))
        else
            local outcome = redis.pcall(unpack(ARGV, at + 1, last))
            if type(outcome) ~= 'table' or not outcome.err then
                reply = outcome
            elseif not string.find(outcome.err, 'WRONGTYPE') and not string.find(outcome.err, 'not an? ')
                and not string.find(outcome.err, 'overflow') and not string.find(outcome.err, 'NaN') then
                return redis.call(unpack(ARGV, at + 1, last))  -- Redis cannot serve: that is to be heard
            else
                left_out[#left_out + 1] = key
                left_out[#left_out + 1] = outcome.err
                if command == 'ZADD' and begins(key, '$SCHEDULED_PREFIX') then
                    -- What cannot be kept for later runs at once. The last word is the job's id.
                    redis.call('RPUSH', '$QUEUE_PREFIX' .. string.sub(key, #'$SCHEDULED_PREFIX' + 1), ARGV[last])
                    redis.call('HSET', '$JOB_PREFIX' .. ARGV[last], 'status', 'queued')
                end
            end
        end
        at = last + 1
    end
    return reply, left_out
end
