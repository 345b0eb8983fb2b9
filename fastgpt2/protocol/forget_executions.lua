-- Delete all that RQ keeps of a job's executions, whoever began them. `queue` is the name of the job's queue.
-- `pcall`: what is not of the kind that it should be holds no execution.
local function forget_executions(queue, id)
    local executions = redis.pcall('ZRANGE', '$EXECUTIONS_PREFIX' .. id, 0, -1)
    for _, execution in ipairs(executions) do
        local both = id .. ':' .. execution
        local worker = redis.pcall('HGET', '$EXECUTION_PREFIX' .. both, 'worker_name')
        if type(worker) == 'string' then redis.pcall('SREM', '$WORKER_PREFIX' .. worker .. ':executions', both) end
        redis.call('DEL', '$EXECUTION_PREFIX' .. both)
        redis.pcall('ZREM', '$STARTED_PREFIX' .. queue, both)
    end
    redis.call('DEL', '$EXECUTIONS_PREFIX' .. id)
end
