"""What the routes share: the client, the reader of all jobs that are waited for, the bounds, and being stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from starlette.requests import Request

from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.client.enqueue import JobPlan, idempotency_keys
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.client.reader import JobReader
from fastgpt2.api.http.requests import Caller, CallerGone
from fastgpt2.api.http.watch import Watch
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, ResultTimeout, ServiceBusy, ServiceStopping
from fastgpt2.protocol.connection import redis_errors
from fastgpt2.protocol.messages import Piece

log = logging.getLogger("fastgpt2.http")

# Jobs that are waited for at once, over all requests.
MAX_WAITING = 2000

# How long requests in hand may go on once the endpoint is told to stop.
GRACE_SECONDS = 5.0

# How often it is looked whether the endpoint is to stop.
LOOK_SECONDS = 0.2

# How long the first event of a stream is waited for before its head is sent: what cannot be done, a worker that is not
# busy refuses in milliseconds, and then the status can say so.
HEAD_SECONDS = 1.0

# Proxies take a stream on which nothing comes for one that hangs.
KEEP_ALIVE_SECONDS = 15.0
IDEMPOTENCY_HEADER = "idempotency-key"
MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may take.

    Attributes:
        timeout: seconds that it is waited for a result.
        body_timeout: seconds within which a body must have come.
        max_queue: refuse requests while so many jobs wait.
        show_prompts: whether lists of jobs have their prompts.
    """

    timeout: float = 60.0
    body_timeout: float = 20.0
    max_queue: int | None = None
    show_prompts: bool = False


class Service:
    """One endpoint's dealings with the pool.

    Args:
        stopping: whether the server is being stopped; a request may then wait for `GRACE_SECONDS` more.
    """

    def __init__(self, redis_url: str, queue: str, bounds: Bounds, stopping: Callable[[], bool]) -> None:
        self.client = AsyncClient(redis_url, queue, bounds.max_queue)
        # For what the client has no method for, the routes run flows of its session themselves.
        self.session, self.driver = self.client._session, self.client._driver
        self.bounds = bounds
        self.watch = Watch(self.client)
        self._stopping = stopping
        self._waiting: set[Waiting] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.closing = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open for requests."""
        tasks = [asyncio.create_task(self.watch.run()), asyncio.create_task(self._heed_stop())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
            await self.client.aclose()

    @property
    def stopping(self) -> bool:
        return self._stopping()

    async def _heed_stop(self) -> None:
        while not self.stopping:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(GRACE_SECONDS)
        self.closing = True
        for waiting in self._waiting:
            waiting.signal.set()

    @asynccontextmanager
    async def submit(self, request: Request, plans: Sequence[JobPlan], asked: object) -> AsyncIterator[Waiting]:
        """Enqueue the jobs of a request, all or none, and wait for them; those that have not ended at the end of the
        context, as the client has hung up, or time is up, or one has failed, are cancelled.

        Args:
            asked: what the request asks for; its `repr` is compared with that of an earlier one of the same
                idempotency key.

        Raises:
            BadRequest, PromptTooLong, QueueFull, QueueUnavailable, ServiceBusy, IdempotencyMismatch
        """
        self._check_room(len(plans))
        key = idempotency_key(request)
        keys = None if key is None else idempotency_keys(key, len(plans), asked)
        job_ids = await self.driver.run(self.session.enqueue_all(plans, keys))
        streamed = [plan.options.stream for plan in plans]
        with Waiting(self, request, job_ids, streamed, keys is None, self.bounds.timeout) as waiting:
            try:
                yield waiting
            finally:
                left = [job.id for job in waiting.jobs if job.outcome is None]
                if left and not self.closing:
                    self._in_background(self._cancel(left))

    def attend(self, request: Request, job_id: str, streamed: bool, timeout: float | None = None) -> Waiting:
        """Wait for a job that is there already; it goes on whatever becomes of the request. A context manager.

        Raises:
            ServiceBusy
        """
        self._check_room(1)
        return Waiting(self, request, [job_id], [streamed], False, timeout or self.bounds.timeout)

    def _check_room(self, jobs: int) -> None:
        if len(self.watch) + jobs > MAX_WAITING:
            raise ServiceBusy(f"{MAX_WAITING} jobs are waited for already; nothing was enqueued, try again later")

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """What no request waits for; finished before the endpoint closes."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            with suppress(FastGPT2Error):
                await self.client.cancel(job_id)

    def enter(self, waiting: Waiting) -> None:
        self._waiting.add(waiting)

    def leave(self, waiting: Waiting) -> None:
        self._waiting.discard(waiting)


def idempotency_key(request: Request) -> str | None:
    """Raises BadRequest."""
    key = request.headers.get(IDEMPOTENCY_HEADER)
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise BadRequest(f"{IDEMPOTENCY_HEADER} must have 1 to {MAX_KEY_CHARACTERS} characters, not {len(key)}")
    return key


class Waiting:
    """The jobs of one request while it waits for them. A context manager.

    Attributes:
        jobs: in the order of the request.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        job_ids: Sequence[str],
        streamed: Sequence[bool],
        new: bool,
        timeout: float,
    ) -> None:
        self.signal = asyncio.Event()
        self._service = service
        self._caller = Caller(request, self.signal.set)
        self._timeout = timeout
        self.jobs: list[JobReader] = [
            service.watch.follow(job_id, stream, self.signal, new)
            for job_id, stream in zip(job_ids, streamed, strict=True)
        ]

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + self._timeout
        self._timer = loop.call_later(self._timeout, self.signal.set)
        self._caller.__enter__()
        self._service.enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._service.leave(self)
        self._caller.__exit__(*error)
        self._timer.cancel()
        for job in self.jobs:
            self._service.watch.drop(job)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Outcome] | None]:
        """The number of a job, with a piece of its text or, as its last, how it ended; until all have ended.

        None where nothing has come for so long that somebody might think that nothing will.

        Raises:
            CallerGone: the client has hung up.
            ResultTimeout: they have not ended in time.
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
                    yield number, job.outcome
            if not left:
                return
            await self._heed(next(iter(left.values())).id)
            if loop.time() >= quiet_until:
                quiet_until = loop.time() + KEEP_ALIVE_SECONDS
                yield None
            timer = loop.call_at(quiet_until, self.signal.set)
            await self.signal.wait()
            timer.cancel()

    async def _heed(self, job_id: str) -> None:
        """Raises if there is no more use, or no more time, in waiting; the job is one of those that are waited for."""
        if self._caller.gone:
            raise CallerGone("the client hung up")
        if time.monotonic() >= self._deadline:
            raise await self._service.driver.run(self._service.session.timeout_error(job_id, self._timeout))
        if self._service.closing:
            raise ServiceStopping(f"the endpoint is being stopped; job {job_id} goes on")

    async def results(self) -> list[GenerationResult]:
        """All their results.

        Raises:
            What `events` raises, and the error of the first job that has failed.
        """
        found: dict[int, GenerationResult] = {}
        async for event in self.events():
            if event is not None and not isinstance(event[1], Piece):
                found[event[0]] = unwrap(event[1])
        return [found[number] for number in range(len(self.jobs))]

    async def settle(self) -> None:
        """Wait until they have ended, or time is up."""
        with suppress(ResultTimeout):
            async for _ in self.events():
                pass


# NOTE api.http.models: Which models the live workers serve, looked up anew every few seconds.
FRESH_SECONDS = 5.0
MAX_WORKERS = 1000


class Models:
    """Read from the workers' own entries."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._known: dict[str, int] = {}
        self._fresh_until = 0.0

    async def served(self) -> dict[str, int]:
        """Each model's id, and since when one serves it, in seconds since 1970; the first is the one that most serve.

        Raises:
            QueueUnavailable
        """
        if time.monotonic() < self._fresh_until:
            return self._known
        with redis_errors(self._client.redis_url):
            connection = self._client.connection
            names = await connection.smembers(f"rq:workers:{self._client.queue_name}")
            async with connection.pipeline(transaction=False) as pipeline:
                for name in sorted(names)[:MAX_WORKERS]:
                    pipeline.hmget(name, ["model", "birth"])
                answers = await pipeline.execute() if names else []
        self._known = _count(answers)
        self._fresh_until = time.monotonic() + FRESH_SECONDS if self._known else 0.0
        return self._known


def _count(answers: list[tuple[bytes | None, bytes | None]]) -> dict[str, int]:
    workers: dict[str, int] = {}
    since: dict[str, int] = {}
    for model, birth in answers:
        if model:
            name = model.decode("utf-8", "replace")
            workers[name] = workers.get(name, 0) + 1
            since[name] = min(since.get(name, 1 << 62), _seconds(birth))
    return {name: since[name] for name in sorted(workers, key=lambda name: (-workers[name], name))}


def _seconds(moment: bytes | None) -> int:
    """RQ notes moments as ISO 8601 in UTC."""
    try:
        then = datetime.fromisoformat((moment or b"").decode("ascii"))
    except ValueError:
        return 0
    return max(0, int((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp()))
