"""The flows of both clients about a job: enqueue it, ask for its status, wait for its end, cancel it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from fastgpt2 import settings
from fastgpt2.api.client.admission import Admission
from fastgpt2.api.client.durability import Durability
from fastgpt2.api.client.enqueue import (
    DEFAULT_RESULT_TTL_SECONDS,
    IdempotencyKey,
    JobPlan,
    SentJob,
    enqueue_command,
    read_enqueue_reply,
)
from fastgpt2.api.client.flow import Bounded, Command, Flow, Pipeline, Retries
from fastgpt2.api.client.model_limits import ModelLimits
from fastgpt2.api.client.outcome import Outcome, decode_status, unwrap
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.api.client.recovery import Recovery
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import FastGPT2Error, JobLost, JobNotFound, RedisUnfit, ResultTimeout
from fastgpt2.fields import refusal
from fastgpt2.protocol.keys import check_queue, job_key, model_of, models_key, queues_of, totals_key, workers_key
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
        recovery: the enqueueing again of jobs that Redis has lost.
        durability: what jobs must have reached before their enqueueing counts.

    Raises:
        BadRequest: `max_queue` is no number of jobs, no pool can have such a queue, or there is no such durability.
    """

    def __init__(
        self, redis_url: str | None, queue: str | None, max_queue: int | None, durability: str | None = None
    ) -> None:
        if max_queue is not None and (not isinstance(max_queue, int) or isinstance(max_queue, bool) or max_queue < 1):
            raise refusal("max_queue", "a whole number from 1, or None for no limit", max_queue)
        self.redis_url = redis_url or settings.REDIS_URL.resolve()
        self.queue = check_queue(queue) if queue else settings.QUEUE.resolve()
        self.max_queue = settings.MAX_QUEUE.resolve() if max_queue is None else max_queue
        self.durability = Durability(durability, self.redis_url)
        self.retries = Retries()
        self.recovery = Recovery(self.retries, self.queue)
        self.limits = ModelLimits()

    @property
    def arguments(self) -> tuple[str, str, int | None, str]:
        """Return what makes the same client in another process."""
        return self.redis_url, self.queue, self.max_queue, self.durability.how

    def enqueue_all(self, plans: Sequence[JobPlan], keys: Sequence[IdempotencyKey] | None = None) -> Flow[list[str]]:
        """Enqueue several jobs, and return their ids; see `send_all`."""
        return [job.id for job in (yield from self.send_all(plans, keys))]

    def send_all(
        self,
        plans: Sequence[JobPlan],
        keys: Sequence[IdempotencyKey] | None = None,
        admission: Admission | None = None,
    ) -> Flow[list[SentJob]]:
        """Enqueue several jobs, all or none.

        Args:
            keys: one for each plan. Where an earlier request with the same key enqueued the job, that is returned.
                If that asked for something else, IdempotencyMismatch is raised.
            admission: asks first whether the limits of a token leave room.

        Raises:
            TokenLimitReached: they do not.
            NotDurable: they are enqueued, and Redis did not confirm in time that they are as durable as asked for.
        """
        yield from self.prepare()
        plans = [self.limits.adapt(plan) for plan in plans]
        for plan in plans:
            self.limits.check(plan.request, plan.options.model)
        made = [
            enqueue_command(plan, self.queue, self.max_queue, key, admission.token if admission else None)
            for plan, key in zip(plans, keys or repeat(None, len(plans)), strict=True)
        ]
        sent = [
            SentJob(job_id, command, plan, self.recovery.history)
            for (job_id, command), plan in zip(made, plans, strict=True)
        ]
        if admission is not None:
            yield from admission.ask([job_id for job_id, _ in made], plans, keys)
        try:
            replies, confirmation = yield from self.send([one.command for one in sent])
        except RedisUnfit:
            yield Pipeline(tuple(cancel_command(one.own_id, self.queue) for one in sent))
            raise
        self.retries.answered = True
        outcomes = [
            read_enqueue_reply(job_id, reply, self.queue, self.max_queue, plan.options.model)
            for (job_id, _), plan, reply in zip(made, plans, replies, strict=True)
        ]
        refusal = next((outcome for outcome in outcomes if isinstance(outcome, FastGPT2Error)), None)
        if admission is not None:
            pairs = zip(made, outcomes, strict=True)
            yield from admission.release([job_id for (job_id, _), outcome in pairs if refusal or outcome != job_id])
        if refusal is None:
            for one, outcome in zip(sent, outcomes, strict=True):
                one.id = str(outcome)
            if confirmation is not None and not self.durability.is_confirmed(confirmation):
                raise self.durability.shortfall([one.id for one in sent], confirmation)
            return sent
        new = [job_id for (job_id, _), outcome in zip(made, outcomes, strict=True) if outcome == job_id]
        if new:
            yield Pipeline(tuple(cancel_command(job_id, self.queue) for job_id in new))
        raise refusal

    def prepare(self) -> Flow[None]:
        """Ask, now and then, for what is to be known before jobs are enqueued.

        Raises:
            RedisUnfit: Redis cannot confirm what is asked of it.
        """
        yield from self.limits.refresh(self.queue)
        yield from self.durability.check()
        if self.recovery.history is None:
            yield from self.recovery.look(None)

    def send(self, commands: Sequence[Command], again: bool = False) -> Flow[tuple[list[Any], Any]]:
        """Enqueue by these commands.

        Args:
            again: send them again while Redis is away.

        Returns:
            Their replies, and what Redis says of their durability, None if it is not asked.

        Raises:
            RedisUnfit: it cannot say.
        """
        from redis.exceptions import ResponseError

        confirming = self.durability.confirming()
        if len(commands) == 1 and not confirming and not again:
            return [(yield commands[0])], None
        request = Pipeline((*commands, *confirming))
        try:
            replies = (yield from self.retries.ask(request)) if again else (yield request)
        except ResponseError as error:
            raise self.durability.in_words(error) from None
        return replies[: len(commands)], replies[-1] if confirming else None

    def status(self, job_id: str) -> Flow[str]:
        """Return RQ's status of a job."""
        return decode_status(job_id, (yield Command("hget", (job_key(job_id), "status"))))

    def cancel(self, job_id: str) -> Flow[bool]:
        """Cancel a job. Returns False if it had ended already."""
        reply = yield cancel_command(job_id, self.queue)
        if reply < 0:
            raise JobNotFound.by(job_id)
        return bool(reply)

    def workers(self) -> Flow[int]:
        """Return how many workers are registered on the queue."""
        count: int = yield Command("scard", (workers_key(self.queue),))
        return count

    def result(self, job_id: str, timeout: float | None, sent: SentJob | None = None) -> Flow[GenerationResult]:
        """Wait for a job's end. Returns its result, or raises what `Job.result` raises.

        Args:
            sent: the job, if it was enqueued here.
        """
        reader, loop = JobReader(job_id, sent=sent), ReadLoop(self.recovery, timeout)
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
            raise (yield from self.timeout_error(reader, loop.timeout))

    def outcome(self, job_id: str) -> Flow[Outcome | None]:
        """Return how a job ended, JobNotFound if there is no such job; None if it has not ended."""
        reader = JobReader(job_id)
        reader.on_state((yield Pipeline(reader.query(), transaction=True)), time.monotonic())
        return reader.outcome

    def timeout_error(self, reader: JobReader, timeout: float | None) -> Flow[FastGPT2Error]:
        """Return what to raise when the caller waits no longer: it says where the job stands."""
        asked = Command("hmget", (job_key(reader.id), "status", "origin")), Command("scard", (workers_key(self.queue),))
        until = time.monotonic() + EXPLANATION_SECONDS
        (status, origin), workers = yield Bounded(Pipeline(asked), until)
        if status is None and reader.is_missed(time.monotonic()):
            return JobLost(f"job {reader.id} is gone from Redis without an end; enqueue it again if it is still wanted")
        status = decode_status(reader.id, status)
        hint = "" if workers else f"; no worker listens on the queue {self.queue!r}: start `fastgpt2 up`"
        model = model_of((origin or b"").decode("utf-8", "replace"))
        if workers and model is not None and not (yield from self._is_served(model, until)):
            hint = f"; no worker serves the model {model!r} any more: start one that does"
        return ResultTimeout(f"job {reader.id} is {status}, no result within {timeout:g} s{hint}")

    def _is_served(self, model: str, until: float) -> Flow[bool]:
        """Tell whether a live worker serves a model, by the clock of Redis; True if that cannot be read."""
        from redis.exceptions import ResponseError

        asked = Command("zrange", (models_key(self.queue), 0, -1, False, True)), Command("time")
        try:
            names, (seconds, _) = yield Bounded(Pipeline(asked), until)
        except ResponseError:
            return True
        return any(name == model.encode() and score >= 1000 * seconds for name, score in names)


def cancel_command(job_id: str, queue: str) -> Command:
    """Return the command that cancels a job which has not ended, and counts it for the pool; see `cancel.lua`."""
    arguments = job_id, DEFAULT_RESULT_TTL_SECONDS, totals_key(queue), *queues_of(queue)
    return Command("execute_command", _CANCEL.command([job_key(job_id)], arguments))
