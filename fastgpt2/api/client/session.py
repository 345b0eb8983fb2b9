"""The flows of both clients about a job: enqueue it, ask for its status, wait for its end, cancel it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import repeat

from fastgpt2 import settings
from fastgpt2.api.client.enqueue import (
    DEFAULT_RESULT_TTL_SECONDS,
    IdempotencyKey,
    JobPlan,
    ModelLimits,
    enqueue_command,
    read_enqueue_reply,
)
from fastgpt2.api.client.flow import Bounded, Command, Flow, Pipeline, Retries
from fastgpt2.api.client.outcome import Outcome, decode_status, unwrap
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import FastGPT2Error, JobNotFound, ResultTimeout
from fastgpt2.fields import refusal
from fastgpt2.protocol.keys import job_key, queues_of, totals_key, workers_key
from fastgpt2.protocol.messages import Piece
from fastgpt2.protocol.scripts import Script

_CANCEL = Script(__file__, "cancel")

# How long the reasons for a timeout may take to be read.
EXPLANATION_SECONDS = 1.0


class Session:
    """The flows of one client; they raise what the client's methods raise. A driver of `flow` holds the connections.

    Attributes:
        retries: the repetition of reads while Redis is away.
        limits: what the live workers' models can take.

    Raises:
        BadRequest: `max_queue` is no number of jobs.
    """

    def __init__(self, redis_url: str | None, queue: str | None, max_queue: int | None) -> None:
        if max_queue is not None and (not isinstance(max_queue, int) or isinstance(max_queue, bool) or max_queue < 1):
            raise refusal("max_queue", "a whole number from 1, or None for no limit", max_queue)
        self.redis_url = redis_url or settings.REDIS_URL.resolve()
        self.queue = queue or settings.QUEUE.resolve()
        self.max_queue = settings.MAX_QUEUE.resolve() if max_queue is None else max_queue
        self.retries = Retries()
        self.limits = ModelLimits()

    def enqueue_all(self, plans: Sequence[JobPlan], keys: Sequence[IdempotencyKey] | None = None) -> Flow[list[str]]:
        """Enqueue several jobs, all or none, and return their ids.

        Args:
            keys: one for each plan. Where an earlier request with the same key enqueued the job, its id is returned.
                If that asked for something else, IdempotencyMismatch is raised.
        """
        yield from self.limits.refresh(self.queue)
        for plan in plans:
            self.limits.check(plan.request)
        made = [
            enqueue_command(plan, self.queue, self.max_queue, key)
            for plan, key in zip(plans, keys or repeat(None, len(plans)), strict=True)
        ]
        commands = tuple(one for _, one in made)
        replies = [(yield commands[0])] if len(commands) == 1 else (yield Pipeline(commands))
        self.retries.answered = True
        outcomes = [
            read_enqueue_reply(job_id, reply, self.queue, self.max_queue)
            for (job_id, _), reply in zip(made, replies, strict=True)
        ]
        refusal = next((outcome for outcome in outcomes if isinstance(outcome, FastGPT2Error)), None)
        if refusal is None:
            return [outcome for outcome in outcomes if isinstance(outcome, str)]
        new = [job_id for (job_id, _), outcome in zip(made, outcomes, strict=True) if outcome == job_id]
        if new:
            yield Pipeline(tuple(cancel_command(job_id, self.queue) for job_id in new))
        raise refusal

    def status(self, job_id: str) -> Flow[str]:
        """Return RQ's status of a job."""
        return decode_status(job_id, (yield Command("hget", (job_key(job_id), "status"))))

    def cancel(self, job_id: str) -> Flow[bool]:
        """Cancel a job. Returns False if it had ended already."""
        reply = yield cancel_command(job_id, self.queue)
        if reply < 0:
            raise JobNotFound(f"no job {job_id!r}: it was never enqueued here, or its result has expired")
        return bool(reply)

    def workers(self) -> Flow[int]:
        """Return how many workers are registered on the queue."""
        count: int = yield Command("scard", (workers_key(self.queue),))
        return count

    def result(self, job_id: str, timeout: float | None) -> Flow[GenerationResult]:
        """Wait for a job's end. Returns its result, or raises what `Job.result` raises."""
        reader, loop = JobReader(job_id), ReadLoop(self.retries, timeout)
        while reader.outcome is None:
            yield from self._wait(reader, loop)
        return unwrap(reader.outcome)

    def next_piece(self, reader: JobReader, loop: ReadLoop) -> Flow[Piece | None]:
        """Wait for the next piece of a job's text. Returns None at its end, or raises what `Job.result` raises."""
        while True:
            for piece in reader.pieces():
                return piece
            if reader.outcome is not None:
                unwrap(reader.outcome)
                return None
            yield from self._wait(reader, loop)

    def _wait(self, reader: JobReader, loop: ReadLoop) -> Flow[None]:
        yield from loop.turn([reader])
        if loop.timed_out and reader.outcome is None:
            raise (yield from self.timeout_error(reader.id, loop.timeout))

    def outcome(self, job_id: str) -> Flow[Outcome | None]:
        """Return how a job ended, JobNotFound if there is no such job; None if it has not ended."""
        reader = JobReader(job_id)
        reader.on_state((yield Pipeline(reader.query(), transaction=True)), time.monotonic())
        return reader.outcome

    def timeout_error(self, job_id: str, timeout: float | None) -> Flow[FastGPT2Error]:
        """Return what to raise when the caller waits no longer: it says where the job stands."""
        asked = Command("hget", (job_key(job_id), "status")), Command("scard", (workers_key(self.queue),))
        status, workers = yield Bounded(Pipeline(asked), time.monotonic() + EXPLANATION_SECONDS)
        status = decode_status(job_id, status)
        hint = "" if workers else f"; no worker listens on the queue {self.queue!r}: start `fastgpt2 up`"
        return ResultTimeout(f"job {job_id} is {status}, no result within {timeout:g} s{hint}")


def cancel_command(job_id: str, queue: str) -> Command:
    """Return the command that cancels a job which has not ended, and counts it for the pool; see `cancel.lua`."""
    arguments = job_id, DEFAULT_RESULT_TTL_SECONDS, totals_key(queue), *queues_of(queue)
    return Command("execute_command", _CANCEL.command([job_key(job_id)], arguments))
