"""What both clients say to Redis about one job: enqueue it, ask how it is, wait for its end, cancel it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from fastgpt2 import settings
from fastgpt2.api.cancelling import cancel_call, was_cancelled
from fastgpt2.api.enqueueing import JobPlan, ModelLimits, Once, check_max_queue, enqueue_call, enqueued
from fastgpt2.api.exchange import Contact, Pause, Talk, Together, Within, call, entries_by_key, read_streams
from fastgpt2.api.outcome import Awaited, Outcome, job_key, known_status, unwrapped
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.errors import FastGPT2Error, ResultTimeout

# How long one blocking read lasts; between two of them jobs are looked at, as a cancellation writes no result.
WAIT_SLICE_SECONDS = 2.0
# How often a job is looked at whose worker is about to write down what it had generated.
LOOK_SECONDS = 0.03


class Session:
    """The talks of one client; see `fastgpt2.api.exchange`. It holds no connection itself.

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
        """See `fastgpt2.api.enqueueing.enqueued`."""
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
