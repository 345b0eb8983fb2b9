-- Delete all that RQ keeps of a job's executions, whoever began them. `queue` is the name of the job's queue.
local function forget_executions(queue, id)
    for _, execution in ipairs(redis.call('ZRANGE', '$EXECUTIONS_PREFIX' .. id, 0, -1)) do
        local both = id .. ':' .. execution
        local worker = redis.call('HGET', '$EXECUTION_PREFIX' .. both, 'worker_name')
        if worker then redis.call('SREM', '$WORKER_PREFIX' .. worker .. ':executions', both) end
        redis.call('DEL', '$EXECUTION_PREFIX' .. both)
        redis.call('ZREM', '$STARTED_PREFIX' .. queue, both)
    end
    redis.call('DEL', '$EXECUTIONS_PREFIX' .. id)
end
