"""Cancelling a job by one script, so that it cannot overwrite the end that a worker writes at the same moment."""

from __future__ import annotations

from typing import Any

from fastgpt2.api.enqueueing import RESULT_TTL_SECONDS
from fastgpt2.api.exchange import Call, call
from fastgpt2.api.outcome import job_key
from fastgpt2.errors import JobNotFound
from fastgpt2.worker.measures import CANCELED, COUNT, ended_field
from fastgpt2.worker.names import queues_of, totals_key

# As `rq.job.Job.cancel` does (status, queue, registries), but only for what has not ended, and with an expiry.
# Cancelled jobs are registered for ever by RQ: a few whose hash has expired are taken off on the way.
_CANCEL = f"""
-- KEYS: the job. ARGV: its id, the seconds that it is kept if it does not say, the totals of a pool, and the queues of
-- this pool: for a job of another one, nothing is counted. 1 if cancelled, 0 if it had ended.
{COUNT}
local status, origin, ttl = unpack(redis.call("HMGET", KEYS[1], "status", "origin", "result_ttl"))
if not status then
    return -1
end
if status == "finished" or status == "failed" or status == "stopped" or status == "canceled" then
    return 0
end
origin, ttl = origin or "", tonumber(ttl or 0) or 0
if ttl <= 0 then
    ttl = tonumber(ARGV[2])
end
redis.call("HSET", KEYS[1], "status", "canceled")
redis.call("EXPIRE", KEYS[1], ttl)
redis.call("LREM", "rq:queue:" .. origin, 0, ARGV[1])
if status == "started" then
    for _, execution in ipairs(redis.call("ZRANGE", "rq:executions:" .. ARGV[1], 0, -1)) do
        redis.call("ZREM", "rq:wip:" .. origin, ARGV[1] .. ":" .. execution)
    end
else
    redis.call("HSET", KEYS[1], "worker_name", "")
    for _, registry in ipairs({{"deferred", "scheduled", "ready"}}) do
        redis.call("ZREM", "rq:" .. registry .. ":" .. origin, ARGV[1])
    end
end
local now, registry = tonumber(redis.call("TIME")[1]), "rq:canceled:" .. origin
for _, id in ipairs(redis.call("ZRANGEBYSCORE", registry, "-inf", now, "LIMIT", 0, 100)) do
    if redis.call("EXISTS", "rq:job:" .. id) == 0 then
        redis.call("ZREM", registry, id)
    end
end
redis.call("ZADD", registry, now + ttl, ARGV[1])
for i = 4, #ARGV do
    if ARGV[i] == origin then
        count(ARGV[3], "{ended_field(*CANCELED)}", 1)
    end
end
return 1
"""


def cancel_call(job_id: str, queue: str) -> Call:
    """What cancels a job that is not over, and counts it among the pool's; see `was_cancelled` for its answer."""
    # The totals are no KEYS: a user of Redis would need all rights to them, not only to count.
    words = job_id, RESULT_TTL_SECONDS, totals_key(queue), *queues_of(queue)
    return call("eval", _CANCEL, 1, job_key(job_id), *words)


def was_cancelled(job_id: str, answer: Any) -> bool:
    """Raises JobNotFound."""
    if answer < 0:
        raise JobNotFound(f"no job {job_id!r}: it was never enqueued here, or its result has expired")
    return bool(answer)
