"""Jobs that Redis has lost while somebody waits for them: they are enqueued again, as they were, or told as lost.

A job whose hash is gone was lost by Redis, or somebody has deleted it. What tells the two apart is the run id, which
each process of Redis draws as it starts. If it is another one than when the job was seen last, Redis was started again
or a replica has taken over, and what had been written last may be missing. If it is the same, somebody took the job
out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgpt2.api.client.enqueue import LOST_TRIES, read_enqueue_reply
from fastgpt2.api.client.flow import Command, Flow, Pipeline, Retries
from fastgpt2.errors import FastGPT2Error, JobLost

if TYPE_CHECKING:
    from fastgpt2.api.client.reader import JobReader

# How long the run id is relied on. A job that is enqueued and deleted in this time after a restart is taken for lost.
FRESH_SECONDS = 2.0

# Jobs enqueued again in one round trip: each may have a prompt of a megabyte.
RENEWED_AT_ONCE = 16


class Recovery:
    """Enqueues the lost jobs of one client again.

    Args:
        queue: the pool's name.

    Attributes:
        retries: the repetition of reads while Redis is away.
        history: the run id of the Redis that was asked last; None if it tells none, or denies the question.
    """

    def __init__(self, retries: Retries, queue: str) -> None:
        self.retries = retries
        self.queue = queue
        self.history: str | None = None
        self._is_denied = False
        self._fresh_until = 0.0

    def look(self, deadline: float | None = math.inf) -> Flow[None]:
        """Ask for the run id, unless that was done just now.

        Args:
            deadline: until when to ask again while Redis is away, on the monotonic clock; None to ask only once.
        """
        from redis.exceptions import ResponseError

        if self._is_denied or time.monotonic() < self._fresh_until:
            return
        asked = Command("info", ("server",))
        try:
            found = (yield asked) if deadline is None else (yield from self.retries.ask(asked, deadline))
        except ResponseError:
            # A user without the right to ask: what is gone then counts as deleted.
            self._is_denied, self.history = True, None
            return
        run_id = found.get("run_id") if isinstance(found, dict) else None
        self.history = str(run_id) if run_id else None
        self._fresh_until = time.monotonic() + FRESH_SECONDS

    def recover(self, jobs: Sequence[JobReader], deadline: float) -> Flow[None]:
        """Enqueue those jobs again that Redis has lost; end the others with a `JobLost`."""
        self._fresh_until = 0.0
        yield from self.look(deadline)
        again = []
        for job in jobs:
            error = self._reason_against(job)
            if error is None:
                again.append(job)
            else:
                job.end(error)
        for at in range(0, len(again), RENEWED_AT_ONCE):
            yield from self._enqueue(again[at : at + RENEWED_AT_ONCE], deadline)

    def _enqueue(self, jobs: Sequence[JobReader], deadline: float) -> Flow[None]:
        sent = [job.sent for job in jobs if job.sent is not None]
        replies = yield from self.retries.ask(Pipeline(tuple(one.command_again() for one in sent)), deadline)
        for job, one, reply in zip(jobs, sent, replies, strict=True):
            one.tries_left -= 1
            found = read_enqueue_reply(one.own_id, reply, self.queue, None)
            if isinstance(found, FastGPT2Error):
                job.end(found)
            else:
                # With an idempotency key, another request may have enqueued a job of its own meanwhile.
                one.id = found
                job.renew(found, self.history, time.monotonic())

    def _reason_against(self, job: JobReader) -> JobLost | None:
        """Return what to tell of a job that is gone and not enqueued again."""
        sent, gone = job.sent, f"job {job.id} is gone from Redis without an end"
        if self.history is None or job.history is None:
            return JobLost(f"{gone}: Redis lost it, or somebody deleted it; enqueue it again if it is still wanted")
        if self.history == job.history:
            return JobLost(
                f"{gone}: somebody deleted it, or all of Redis's data; enqueue it again if it is still wanted"
            )
        why = "Redis was started again, or another took over, without it"
        if sent is None or not sent.is_wanted:
            return JobLost(f"{gone}: {why}; enqueue it again if it is still wanted")
        if sent.tries_left < 1:
            return JobLost(f"{gone}: {why}, also after it was enqueued again {LOST_TRIES} times; see to Redis first")
        return None
