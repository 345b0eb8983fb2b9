-- Move jobs from the queues into this worker's lists of claimed jobs, unless workers are suspended.
--
-- The queues of one priority take turns: the next job is looked for first in the queue behind the one that gave the
-- last.
--
-- A job that several workers have died of is claimed only by a worker that has no other job. The jobs behind it in its
-- queue wait meanwhile: if they were claimed, it might wait for ever.
--
-- `pcall`: a queue whose key is no list keeps none of the others waiting.
--
-- KEYS[1]          the mark of a suspension
-- KEYS[2i]         the list of queue i, the most urgent queues first, as many of each priority
-- KEYS[2i + 1]     the list of the jobs that this worker has claimed of queue i
-- ARGV[1]          how many jobs to claim at most
-- ARGV[2]          how many jobs this worker has claimed before: it says which priority comes first
-- ARGV[3]          how many jobs this worker has already
-- ARGV[4]          of this many claims, one looks at the last priority first
-- ARGV[5]          of this many claims, one looks at the second priority first
-- ARGV[6...]       for each priority, which of its queues comes first, counted from 0
-- Returns          for each claimed job, the number of its queue, counted from 0, and its id; nil while workers are
--                  suspended
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local priorities, turn, claimed, suspect = #ARGV - 5, tonumber(ARGV[2]), {}, false
local each = (#KEYS - 1) / 2 / priorities
local last_every, second_every = tonumber(ARGV[4]), tonumber(ARGV[5])
local firsts = {unpack(ARGV, 6)}
local function claim(i)
    local head = redis.pcall('LINDEX', KEYS[2 * i], 0)
    if type(head) ~= 'string' then return false end
    local crashes = redis.pcall('HGET', '$JOB_PREFIX' .. head, '$CRASHES_FIELD')
    if type(crashes) == 'string' and (tonumber(crashes) or 0) >= $SUSPECT_CRASHES then
        suspect = true
        if #claimed > 0 or tonumber(ARGV[3]) > 0 then return false end
    end
    local id = redis.pcall('LMOVE', KEYS[2 * i], KEYS[2 * i + 1], 'LEFT', 'RIGHT')
    if type(id) ~= 'string' then return false end
    claimed[#claimed + 1] = i - 1
    claimed[#claimed + 1] = id
    return true
end
local function claim_of(priority)
    local first = firsts[priority]
    for n = 0, each - 1 do
        local at = (first + n) % each
        if claim((priority - 1) * each + at + 1) then
            firsts[priority] = at + 1
            return true
        end
        if suspect then return false end
    end
    return false
end
for _ = 1, tonumber(ARGV[1]) do
    local first = 1
    if turn % last_every == last_every - 1 then first = priorities
    elseif turn % second_every == second_every - 1 then first = math.min(2, priorities) end
    local found = claim_of(first)
    for priority = 1, priorities do
        if not found and not suspect and priority ~= first then found = claim_of(priority) end
    end
    if suspect or not found then return claimed end
    turn = turn + 1
end
return claimed
