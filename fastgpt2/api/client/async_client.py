"""The client for asyncio: the names and the behaviour of `client.py`, with `await` before what waits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from fastgpt2.api.client.bulk import RESULT_TTL_SECONDS as READ_SOON_SECONDS
from fastgpt2.api.client.bulk import Flight, Item, Progress, length_of
from fastgpt2.api.client.client import IN_FLIGHT
from fastgpt2.api.client.enqueue import (
    DEFAULT_JOB_TIMEOUT_SECONDS,
    NO_OPTIONS,
    RESULT_TTL_SECONDS,
    JobFields,
    JobPlan,
    Once,
    Prompt,
    plan_each,
    plan_job,
)
from fastgpt2.api.client.flow import Contact, Talk, carry_out_async
from fastgpt2.api.client.outcome import Outcome, unwrapped
from fastgpt2.api.client.reader import Following
from fastgpt2.api.client.session import Session
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.connection import connect_async
from fastgpt2.protocol.keys import Priority
from fastgpt2.protocol.messages import JobOptions, Piece

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")


class AsyncClient:
    """A queue of generation jobs, for one event loop; see `Client`.

    What is sent is sent once more if the connection has died meanwhile: scripts see to it that no job comes in twice.

    Raises:
        BadRequest: not a Redis URL, or no number of jobs.
    """

    def __init__(self, redis_url: str | None = None, queue: str | None = None, max_queue: int | None = None) -> None:
        self._session = Session(redis_url, queue, max_queue)
        # Connections are made when they are first used, inside the running loop.
        self.connection: Redis = connect_async(self._session.redis_url)

    @property
    def redis_url(self) -> str:
        return self._session.redis_url

    @property
    def queue_name(self) -> str:
        return self._session.queue

    async def enqueue(self, prompt: str | list[int], **fields: Unpack[JobFields]) -> AsyncJob:
        """See `Client.enqueue`."""
        return await self.enqueue_plan(plan_job(prompt, fields))

    async def enqueue_request(
        self,
        request: GenerationRequest,
        options: JobOptions = NO_OPTIONS,
        *,
        priority: Priority = "normal",
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = RESULT_TTL_SECONDS,
    ) -> AsyncJob:
        """See `Client.enqueue_request`."""
        return await self.enqueue_plan(JobPlan(request, options, priority, job_timeout, result_ttl))

    async def enqueue_plan(self, plan: JobPlan) -> AsyncJob:
        """See `Client.enqueue_plan`."""
        return AsyncJob(self, await self.carry_out(self._session.enqueue(plan, self.connection)))

    async def enqueue_all(self, plans: Sequence[JobPlan], once: Sequence[Once] | None = None) -> list[str]:
        """`enqueue_plan` for several at once, all of them or none; see `Session.enqueue_all`."""
        return await self.carry_out(self._session.enqueue_all(plans, self.connection, once))

    async def timed_out(self, job_id: str, timeout: float) -> FastGPT2Error:
        """See `Session.timed_out`."""
        return await self.carry_out(self._session.timed_out(job_id, timeout))

    async def outcome(self, job_id: str) -> Outcome | None:
        """How a job ended; None while it has not. See `Session.outcome`."""
        return await self.carry_out(self._session.outcome(job_id))

    @property
    def contact(self) -> Contact:
        return self._session.contact

    def job(self, job_id: str) -> AsyncJob:
        """See `Client.job`."""
        return AsyncJob(self, job_id)

    async def status(self, job_id: str) -> str:
        """See `Job.status`."""
        return await self.carry_out(self._session.status(job_id))

    async def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return await self.carry_out(self._session.result(job_id, timeout))

    async def cancel(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        return await self.carry_out(self._session.cancel(job_id))

    async def workers(self) -> int:
        """See `Client.workers`."""
        return await self.carry_out(self._session.workers())

    async def stream(
        self, prompt: Prompt | AsyncJob, *, read_timeout: float | None = None, **fields: Unpack[JobFields]
    ) -> AsyncTextStream:
        """See `Client.stream`. Leaving a loop early is not enough here: `async with`, or `aclose`, ends the job."""
        if isinstance(prompt, AsyncJob):
            return AsyncTextStream(self, prompt, read_timeout, cancels=False)
        job = await self.enqueue_plan(plan_job(prompt, {**fields, "stream": True}))
        return AsyncTextStream(self, job, read_timeout, cancels=True)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: Literal[False] = ...,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[GenerationResult, None]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: bool,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[Outcome, None]: ...

    async def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[Outcome, None]:
        """See `Client.map`. To end it early for certain, put it into `contextlib.aclosing`, as all such generators."""
        async with aclosing(self._fly(prompts, in_flight, True, progress, fields)) as ends:
            async for _, outcome in ends:
                yield outcome if return_exceptions else unwrapped(outcome)

    @overload
    def as_completed(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: Literal[False] = ...,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[tuple[int, GenerationResult], None]: ...

    @overload
    def as_completed(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: bool,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[tuple[int, Outcome], None]: ...

    async def as_completed(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        **fields: Unpack[JobFields],
    ) -> AsyncGenerator[tuple[int, Outcome], None]:
        """See `Client.as_completed`, and `map`."""
        async with aclosing(self._fly(prompts, in_flight, False, progress, fields)) as ends:
            async for number, outcome in ends:
                yield number, outcome if return_exceptions else unwrapped(outcome)

    async def _fly(
        self, prompts: Iterable[Prompt], in_flight: int, ordered: bool, progress: bool, fields: Mapping[str, Any]
    ) -> AsyncGenerator[tuple[int, Outcome], None]:
        plans = plan_each(prompts, {"result_ttl": READ_SOON_SECONDS, **fields})
        with Progress(length_of(prompts), progress) as bar:
            async with aclosing(self.fly(plans, in_flight, ordered)) as ends:
                async for number, outcome in ends:
                    bar.add(outcome)
                    yield number, outcome

    async def fly(
        self, items: Iterable[Item], in_flight: int, ordered: bool = True
    ) -> AsyncGenerator[tuple[int, Outcome], None]:
        """See `Client.fly`."""
        flight = Flight(self._session, items, in_flight, ordered, self.connection)
        try:
            while (end := await self.carry_out(flight.next())) is not None:
                yield end
        except BaseException:
            with suppress(FastGPT2Error):
                await self.carry_out(flight.cancel())
            raise

    async def carry_out(self, talk: Talk[T]) -> T:
        """Hold one of the session's talks."""
        return await carry_out_async(self.connection, self.redis_url, talk)

    def follow(self, job_id: str, timeout: float | None) -> Following:
        """For `AsyncTextStream`."""
        return Following(self._session, job_id, timeout)

    async def aclose(self) -> None:
        await self.connection.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncJob:
    """A handle on one job; see `Job`."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self.id = job_id
        self._client = client

    async def status(self) -> str:
        """See `Job.status`."""
        return await self._client.status(self.id)

    async def result(self, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return await self._client.result(self.id, timeout)

    async def cancel(self) -> bool:
        """See `Job.cancel`."""
        return await self._client.cancel(self.id)

    def stream(self, timeout: float | None = None) -> AsyncTextStream:
        """See `Job.stream`."""
        return AsyncTextStream(self._client, self, timeout, cancels=False)

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"


class AsyncTextStream(AsyncIterator[Piece]):
    """The text of a job as it comes; see `TextStream`."""

    def __init__(self, client: AsyncClient, job: AsyncJob, timeout: float | None, cancels: bool) -> None:
        self.job = job
        self._client = client
        self._following = client.follow(job.id, timeout)
        self._cancels = cancels

    @property
    def result(self) -> GenerationResult | None:
        return self._following.result

    async def __anext__(self) -> Piece:
        piece = await self._client.carry_out(self._following.next())
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """See `TextStream.close`."""
        if self._cancels and self.result is None:
            self._cancels = False
            with suppress(FastGPT2Error):
                await self.job.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
