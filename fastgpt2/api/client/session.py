"""What both clients say to Redis about one job: enqueue it, ask how it is, wait for its end, cancel it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from fastgpt2 import settings
from fastgpt2.api.client.enqueue import (
    RESULT_TTL_SECONDS,
    JobPlan,
    ModelLimits,
    Once,
    check_max_queue,
    enqueue_call,
    enqueued,
)
from fastgpt2.api.client.flow import (
    Call,
    Contact,
    Pause,
    Talk,
    Together,
    Within,
    call,
    entries_by_key,
    read_streams,
)
from fastgpt2.api.client.outcome import Awaited, Outcome, job_key, known_status, unwrapped
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import FastGPT2Error, JobNotFound, ResultTimeout
from fastgpt2.protocol.keys import CANCELED, COUNT, ended_field, queues_of, totals_key

# How long one blocking read lasts; between two of them jobs are looked at, as a cancellation writes no result.
WAIT_SLICE_SECONDS = 2.0

# How often a job is looked at whose worker is about to write down what it had generated.
LOOK_SECONDS = 0.03


class Session:
    """The talks of one client; see `fastgpt2.api.client.flow`. It holds no connection itself.

    Args:
        connection: any of the redis library's, for RQ's records.

    Raises:
        BadRequest: `max_queue` is no number of jobs.
    """

    def __init__(self, redis_url: str | None, queue: str | None, max_queue: int | None) -> None:
        check_max_queue(max_queue)
        self.redis_url = redis_url or settings.REDIS_URL.resolve()
        self.queue = queue or settings.QUEUE.resolve()
        self.max_queue = settings.MAX_QUEUE.resolve() if max_queue is None else max_queue
        self.contact = Contact()
        self._limits = ModelLimits()

    def enqueue(self, plan: JobPlan, connection: Any) -> Talk[str]:
        """Returns the job's id.

        Raises:
            PromptTooLong, QueueFull
        """
        (job_id,) = yield from self.enqueue_all([plan], connection)
        return job_id

    def enqueue_all(
        self, plans: Sequence[JobPlan], connection: Any, once: Sequence[Once] | None = None
    ) -> Talk[list[str]]:
        """All of them or none. Returns their ids.

        Args:
            once: of each, that it is to be enqueued once; its id is then that of the first time.

        Raises:
            PromptTooLong, QueueFull, IdempotencyMismatch
        """
        yield from self.refresh_limits()
        for plan in plans:
            self._limits.check(plan.request)
        keys: Sequence[Once | None] = once or [None] * len(plans)
        made = [
            enqueue_call(plan, self.queue, self.max_queue, connection, key)
            for plan, key in zip(plans, keys, strict=True)
        ]
        answers = [(yield made[0][1])] if len(made) == 1 else (yield Together(tuple(script for _, script in made)))
        self.contact.made = True
        ends = [self.enqueued(job_id, answer) for (job_id, _), answer in zip(made, answers, strict=True)]
        refused = next((end for end in ends if isinstance(end, FastGPT2Error)), None)
        if refused is not None:
            new = [end for (job_id, _), end in zip(made, ends, strict=True) if end == job_id]
            if new:
                yield Together(tuple(cancel_call(job_id, self.queue) for job_id in new))
            raise refused
        return [end for end in ends if isinstance(end, str)]

    def check_limits(self, plan: JobPlan) -> None:
        """Raises PromptTooLong, going by what `refresh_limits` read."""
        self._limits.check(plan.request)

    def enqueued(self, job_id: str, answer: Any) -> str | FastGPT2Error:
        """See `fastgpt2.api.client.enqueue.enqueued`."""
        return enqueued(job_id, answer, self.queue, self.max_queue)

    def refresh_limits(self) -> Talk[None]:
        """Read what the live workers' models can take, unless it was read just now."""
        if self._limits.are_fresh():
            return
        names = yield call("smembers", f"rq:workers:{self.queue}")
        asked = tuple(call("hmget", name, "n_positions", "longest_token_bytes") for name in names)
        self._limits.note((yield Together(asked)) if asked else [])

    def status(self, job_id: str) -> Talk[str]:
        """Raises JobNotFound."""
        return known_status(job_id, (yield call("hget", job_key(job_id), "status")))

    def cancel(self, job_id: str) -> Talk[bool]:
        """Whether it had not ended yet. Raises JobNotFound."""
        return was_cancelled(job_id, (yield cancel_call(job_id, self.queue)))

    def workers(self) -> Talk[int]:
        """How many workers are registered on the queue."""
        count: int = yield call("scard", f"rq:workers:{self.queue}")
        return count

    def result(self, job_id: str, timeout: float | None) -> Talk[GenerationResult]:
        """Wait for the job's end."""
        job, deadline = Awaited(job_id), deadline_in(timeout)
        while True:
            answers = yield from self.contact.patiently(job.look(), deadline)
            ended = job.seen(answers, time.monotonic())
            if ended is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise (yield from self.timed_out(job_id, timeout))
                if job.letting_go:
                    yield Pause(min(LOOK_SECONDS, left))
                    continue
                # After what was read, not after what is there by now: that would be waited for in vain.
                news = read_streams({job.key: job.after}, min(WAIT_SLICE_SECONDS, left))
                reply = entries_by_key((yield from self.contact.patiently(news, deadline)))
                ended = job.heard(reply.get(job.key, []))
            if ended is not None:
                return unwrapped(ended)

    def outcome(self, job_id: str) -> Talk[Outcome | None]:
        """How the job ended, JobNotFound if there is none; None while it has not."""
        job = Awaited(job_id)
        return job.seen((yield job.look()), time.monotonic())

    def timed_out(self, job_id: str, timeout: float | None) -> Talk[FastGPT2Error]:
        """What to raise when the caller would not wait any longer."""
        soon = time.monotonic() + 1.0
        calls = call("hget", job_key(job_id), "status"), call("scard", f"rq:workers:{self.queue}")
        status, workers = yield Within(Together(calls), soon)
        status = known_status(job_id, status)
        hint = "" if workers else f"; no worker listens on the queue {self.queue!r}: start `fastgpt2 up`"
        return ResultTimeout(f"job {job_id} is {status}, no result within {timeout:g} s{hint}")


def deadline_in(timeout: float | None) -> float:
    """On the monotonic clock."""
    return math.inf if timeout is None else time.monotonic() + timeout


# NOTE api.cancelling: Cancelling a job by one script, so that it cannot overwrite the end that a worker writes at the
# same moment.

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
