-- Run the commands that ARGV holds from index `at` on, each as its number of words and then these words.
-- Returns what the last command replied.
local function run_commands(at)
    local reply = 0
    while at <= #ARGV do
        local words = tonumber(ARGV[at])
        reply = redis.call(unpack(ARGV, at + 1, at + words))
        at = at + words + 1
    end
    return reply
end
