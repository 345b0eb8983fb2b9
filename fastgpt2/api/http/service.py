"""The pool as the routes use it: client, jobs that requests wait for, their bounds, and the stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from starlette.requests import Request

from fastgpt2.api.client.admission import Admission
from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.client.enqueue import IdempotencyKey, JobPlan, SentJob, idempotency_keys
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.client.reader import JobReader
from fastgpt2.api.client.requeue import Again, run_again
from fastgpt2.api.http.access import LIMITS_STATE, TOKEN_STATE
from fastgpt2.api.http.requests import ClientGone
from fastgpt2.api.http.watch import Watch
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    JobNotFound,
    NotDurable,
    ResultTimeout,
    ServiceBusy,
    ServiceStopping,
)
from fastgpt2.protocol.messages import Piece
from fastgpt2.tracing import span

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# The limit for jobs that are waited for at once, over all requests.
MAX_WAITING = 2000

# How long requests may go on once the endpoint is told to stop.
STOP_GRACE_SECONDS = 5.0

# The time between two looks whether the endpoint is told to stop.
STOP_LOOK_SECONDS = 0.2

# How long a stream's head waits for the first event. A worker with room refuses a bad request in milliseconds, and the
# status can then say so.
HEAD_SECONDS = 1.0

# The time without an event after which a stream sends a sign of life: proxies take a silent stream for one that hangs.
KEEP_ALIVE_SECONDS = 15.0
IDEMPOTENCY_HEADER = "idempotency-key"
MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of a request.

    Attributes:
        timeout: the seconds to wait for a result.
        body_timeout: the seconds within which a body must have come.
        max_queue: the number of waiting jobs from which on requests are refused; None for no limit.
        show_prompts: tells whether lists of jobs contain prompts.
        durability: what a job must have reached before its enqueueing counts; None for the setting.
    """

    timeout: float = 60.0
    body_timeout: float = 20.0
    max_queue: int | None = None
    show_prompts: bool = False
    durability: str | None = None


class Service:
    """The pool as one endpoint uses it.

    Args:
        stopping: tells whether the server is being stopped. A request may then wait for `STOP_GRACE_SECONDS` more.

    Attributes:
        pending: the requests that wait for jobs now.
        is_closing: tells whether that time is over too.
    """

    def __init__(self, redis_url: str, queue: str, bounds: Bounds, stopping: Callable[[], bool]) -> None:
        self.client = AsyncClient(redis_url, queue, bounds.max_queue, bounds.durability)
        # For what the client has no method for, the routes run flows of its session themselves.
        self.session, self.driver = self.client._session, self.client._driver
        self.bounds = bounds
        self.watch = Watch(self.client)
        self.pending: set[PendingJobs] = set()
        self.is_closing = False
        self.stopping = stopping
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Be open for requests within the context."""
        tasks = [asyncio.create_task(self.watch.run()), asyncio.create_task(self._close_after_stop())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
            await self.client.aclose()

    async def _close_after_stop(self) -> None:
        while not self.stopping():
            await asyncio.sleep(STOP_LOOK_SECONDS)
        await asyncio.sleep(STOP_GRACE_SECONDS)
        self.is_closing = True
        for jobs in self.pending:
            jobs.signal.set()

    @asynccontextmanager
    async def submit(self, request: Request, plans: Sequence[JobPlan], asked: object) -> AsyncIterator[PendingJobs]:
        """Enqueue the jobs of a request, all or none, and wait for them within the context.

        At the end of the context, jobs that have not ended are cancelled: the client is gone, or time is up, or one of
        the jobs has failed.

        Args:
            asked: see `idempotency_keys`.

        Raises:
            BadRequest, PromptTooLong, QueueFull, QueueUnavailable, ServiceBusy, IdempotencyMismatch, TokenLimitReached
            NotDurable: the jobs are cancelled; with an idempotency key they go on, for the client that asks again.
        """
        self._check_room(len(plans))
        keys = read_idempotency_keys(request, len(plans), asked)
        try:
            sent = await self.send(request, plans, keys)
        except NotDurable as error:
            if keys is None:
                self._start_cancelling(error.job_ids)
            raise
        streamed = [plan.options.stream for plan in plans]
        with PendingJobs(self, request, sent, streamed, keys is None, self.bounds.timeout) as pending:
            try:
                yield pending
            finally:
                left = [job.id for job in pending.jobs if job.outcome is None]
                if left and not self.is_closing:
                    self._start_cancelling(left)

    async def send(
        self, request: Request, plans: Sequence[JobPlan], keys: Sequence[IdempotencyKey] | None
    ) -> list[SentJob]:
        """Enqueue the jobs of a request, all or none, if the limits of its token leave room for them.

        Where requests are traced, this is a span of its own, which the jobs' spans continue.

        Raises:
            What `Session.send_all` raises.
        """
        with self._enqueue_span(len(plans)) as begun, _admission(request, self.client.queue_name) as admission:
            sent = await self.driver.run(self.session.send_all(plans, keys, admission))
            if begun is not None:
                begun.set_attribute("messaging.message.id", sent[0].id)
            return sent

    def _enqueue_span(self, count: int) -> AbstractContextManager[Span | None]:
        """Return the context whose span is that of the enqueueing of a number of jobs."""
        told = {
            "messaging.system": "rq",
            "messaging.operation.type": "send",
            "messaging.destination.name": self.session.queue,
            "messaging.batch.message_count": count,
        }
        return span("enqueue", told)

    async def run_again(self, request: Request, job_id: str, keys: Sequence[IdempotencyKey] | None) -> Again:
        """Run a job again, if the limits of the request's token leave room for it.

        Raises:
            What `fastgpt2.api.client.requeue.run_again` raises.
        """
        with self._enqueue_span(1), _admission(request, self.client.queue_name) as admission:
            return await self.driver.run(run_again(self.session, job_id, keys, admission))

    def attend(self, request: Request, job_id: str, streamed: bool, timeout: float | None = None) -> PendingJobs:
        """Wait within a context for a job that exists; it goes on whatever becomes of the request.

        Raises:
            ServiceBusy
        """
        self._check_room(1)
        return PendingJobs(self, request, [job_id], [streamed], False, timeout or self.bounds.timeout)

    def _check_room(self, jobs: int) -> None:
        if len(self.watch) + jobs > MAX_WAITING:
            raise ServiceBusy(
                f"requests to this endpoint wait for {len(self.watch)} jobs, the limit is {MAX_WAITING}; nothing was "
                "enqueued, try again later"
            )

    def _start_cancelling(self, job_ids: Iterable[str]) -> None:
        """Cancel jobs, in a task that no request waits for. It is finished before the endpoint closes."""
        task = asyncio.create_task(self._cancel(job_ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            with suppress(FastGPT2Error):
                await self.client.cancel(job_id)


@contextmanager
def _admission(request: Request, queue: str) -> Iterator[Admission | None]:
    """Yield the room within the limits of a request's token, which the answer's headers tell; None without one."""
    token = request.scope.get("state", {}).get(TOKEN_STATE)
    if token is None:
        yield None
        return
    admission = Admission(queue, token.name, token.waiting, token.tokens_per_minute)
    try:
        yield admission
    finally:
        request.scope["state"][LIMITS_STATE] = admission.headers()


def read_idempotency_keys(request: Request, jobs: int, asked: object, prefix: str = "") -> list[IdempotencyKey] | None:
    """Return an idempotency key for each of a request's jobs, or None if the request has no such header.

    Args:
        asked: see `idempotency_keys`.
        prefix: tells apart routes that a client may send the same header to.

    Raises:
        BadRequest: the header is empty or too long.
    """
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise BadRequest(f"{IDEMPOTENCY_HEADER} must have 1 to {MAX_KEY_CHARACTERS} characters, not {len(key)}")
    return idempotency_keys(f"{prefix}{key}", jobs, asked)


class PendingJobs:
    """The jobs that one request waits for. A context manager.

    Args:
        jobs: those that the request has enqueued, or the id of one that was enqueued before.
        new: see `Watch.follow`.

    Attributes:
        jobs: the jobs in the order of the request.
        signal: is set when there may be something new.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        jobs: Sequence[SentJob | str],
        streamed: Sequence[bool],
        new: bool,
        timeout: float,
    ) -> None:
        self.signal = asyncio.Event()
        self._service = service
        self._request = request
        self._is_client_gone = False
        self._timeout = timeout
        self.jobs: list[JobReader] = [
            service.watch.follow(job, stream, self.signal, new) for job, stream in zip(jobs, streamed, strict=True)
        ]

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + self._timeout
        self._timer = loop.call_later(self._timeout, self.signal.set)
        self._listening = asyncio.create_task(self._listen())
        self._service.pending.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._service.pending.discard(self)
        self._listening.cancel()
        self._timer.cancel()
        for job in self.jobs:
            self._service.watch.drop(job)

    async def _listen(self) -> None:
        """Notice when the client closes the connection; the body has been read."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._is_client_gone = True
        self.signal.set()

    async def events(self) -> AsyncIterator[tuple[int, Piece | Outcome] | None]:
        """Give what comes of the jobs, until all have ended.

        Yields:
            A job's number, with a piece of its text or, as its last, how it ended. None where nothing has come for so
            long that a proxy might take the stream for one that hangs.

        Raises:
            ClientGone: the client has closed the connection.
            ResultTimeout: the jobs have not ended in time.
            ServiceStopping: the endpoint stops.
        """
        loop = asyncio.get_running_loop()
        left, quiet_until = dict(enumerate(self.jobs)), loop.time() + HEAD_SECONDS
        while left:
            self.signal.clear()
            for number, job in list(left.items()):
                for piece in job.pieces():
                    quiet_until = loop.time() + KEEP_ALIVE_SECONDS
                    yield number, piece
                if job.outcome is not None:
                    del left[number]
                    self._note_model(job.outcome)
                    yield number, job.outcome
            if not left:
                return
            await self._check_worth_waiting(next(iter(left.values())))
            if loop.time() >= quiet_until:
                quiet_until = loop.time() + KEEP_ALIVE_SECONDS
                yield None
            timer = loop.call_at(quiet_until, self.signal.set)
            await self.signal.wait()
            timer.cancel()

    def _note_model(self, outcome: Outcome) -> None:
        """Have the request's line of the log tell of the model that has answered."""
        if isinstance(outcome, GenerationResult):
            self._request.scope["log_fields"]["model"] = outcome.model

    async def _check_worth_waiting(self, job: JobReader) -> None:
        """Raise if nobody waits any more, or no longer may; the job is one of those that have not ended."""
        if self._is_client_gone:
            raise ClientGone("the client closed the connection")
        if time.monotonic() >= self._deadline:
            raise await self._service.driver.run(self._service.session.timeout_error(job, self._timeout))
        if self._service.is_closing:
            raise ServiceStopping(f"the endpoint is being stopped; job {job.id} goes on")

    async def results(self) -> list[GenerationResult]:
        """Wait for all jobs, and return their results in the order of the request.

        Raises:
            What `events` raises, and the error of the first job that has failed.
        """
        found: dict[int, GenerationResult] = {}
        async for event in self.events():
            if event is not None and not isinstance(event[1], Piece):
                found[event[0]] = unwrap(event[1])
        return [found[number] for number in range(len(self.jobs))]

    async def wait(self) -> None:
        """Wait until all jobs have ended, or time is up.

        Raises:
            JobNotFound: one of them is gone: it has expired, or, a JobLost, it never ended.
        """
        with suppress(ResultTimeout):
            async for event in self.events():
                if event is not None and isinstance(event[1], JobNotFound):
                    raise event[1]
