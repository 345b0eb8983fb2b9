"""The client for asyncio: the names and the behaviour of `client.py`, with `await` before what waits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from fastgpt2.api.client.bulk import BulkFields, BulkRun, ManyPrompts, ProgressBar, plan_bulk, run_bulk_async
from fastgpt2.api.client.enqueue import (
    DEFAULT_JOB_TIMEOUT_SECONDS,
    DEFAULT_RESULT_TTL_SECONDS,
    NO_OPTIONS,
    JobFields,
    JobPlan,
    PromptLike,
    SentJob,
    plan_prompt,
)
from fastgpt2.api.client.flow import AsyncDriver
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts, JobReader, ReadLoop
from fastgpt2.api.client.session import Session
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.keys import Priority
from fastgpt2.protocol.messages import JobOptions, Piece

if TYPE_CHECKING:
    from redis.asyncio import Redis


class AsyncClient:
    """A queue of generation jobs, for one event loop at a time; see `Client`.

    If the connection has died meanwhile, a command is sent once more: scripts make sure that no job comes in twice.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        queue: str | None = None,
        max_queue: int | None = None,
        durability: str | None = None,
    ) -> None:
        self._session = Session(redis_url, queue, max_queue, durability)
        self.redis_url, self.queue_name = self._session.redis_url, self._session.queue
        self._driver = AsyncDriver(self.redis_url)

    @property
    def connection(self) -> Redis:
        """See `Client.connection`."""
        return self._driver.connection

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._session.arguments

    async def enqueue(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> AsyncJob:
        """See `Client.enqueue`."""
        return await self._enqueue(plan_prompt(prompt, fields))

    async def enqueue_request(
        self,
        request: GenerationRequest,
        options: JobOptions = NO_OPTIONS,
        *,
        priority: Priority = "normal",
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = DEFAULT_RESULT_TTL_SECONDS,
    ) -> AsyncJob:
        """See `Client.enqueue_request`."""
        return await self._enqueue(JobPlan(request, options, priority, job_timeout, result_ttl))

    async def _enqueue(self, plan: JobPlan) -> AsyncJob:
        (sent,) = await self._driver.run(self._session.send_all([plan]))
        return AsyncJob(sent.id, self, sent)

    def job(self, job_id: str) -> AsyncJob:
        """See `Client.job`."""
        return AsyncJob(job_id, self)

    async def status(self, job_id: str) -> str:
        """See `Job.status`."""
        return await self._driver.run(self._session.status(job_id))

    async def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return await self._driver.run(self._session.result(job_id, timeout))

    async def cancel(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        return await self._driver.run(self._session.cancel(job_id))

    async def workers(self) -> int:
        """See `Client.workers`."""
        return await self._driver.run(self._session.workers())

    async def stream(
        self,
        prompt: PromptLike | AsyncJob,
        *,
        read_timeout: float | None = None,
        replacements: bool = False,
        **fields: Unpack[JobFields],
    ) -> AsyncTextStream:
        """See `Client.stream`. To leave the loop early does not cancel the job here: use `async with`, or `aclose`."""
        if isinstance(prompt, AsyncJob):
            return prompt.stream(read_timeout, replacements)
        job = await self._enqueue(plan_prompt(prompt, {**fields, "stream": True}))
        return AsyncTextStream(job, read_timeout, cancels=True, replacements=replacements)

    @overload
    def map(
        self, prompts: ManyPrompts, *, return_exceptions: Literal[False] = ..., **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[GenerationResult, None]: ...

    @overload
    def map(
        self, prompts: ManyPrompts, *, return_exceptions: bool, **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[Outcome, None]: ...

    def map(
        self, prompts: ManyPrompts, *, return_exceptions: bool = False, **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[Outcome, None]:
        """See `Client.map`. The prompts may come asynchronously; then some are read ahead, at most 16.

        To end the generator early for certain, put it into `contextlib.aclosing`.
        """
        bulk, bar = plan_bulk(self._session, prompts, "map", True, **fields)
        return _without_numbers(self._run(bulk, bar, return_exceptions))

    @overload
    def as_completed(
        self, prompts: ManyPrompts, *, return_exceptions: Literal[False] = ..., **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[tuple[int, GenerationResult], None]: ...

    @overload
    def as_completed(
        self, prompts: ManyPrompts, *, return_exceptions: bool, **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[tuple[int, Outcome], None]: ...

    def as_completed(
        self, prompts: ManyPrompts, *, return_exceptions: bool = False, **fields: Unpack[BulkFields]
    ) -> AsyncGenerator[tuple[int, Outcome], None]:
        """See `Client.as_completed`, and `map`."""
        bulk, bar = plan_bulk(self._session, prompts, "as_completed", True, **fields)
        return self._run(bulk, bar, return_exceptions)

    async def _run(
        self, bulk: BulkRun, bar: ProgressBar, return_exceptions: bool
    ) -> AsyncGenerator[tuple[int, Outcome], None]:
        async with aclosing(run_bulk_async(self._driver, bulk, bar)) as ends:
            async for number, outcome in ends:
                yield number, outcome if return_exceptions else unwrap(outcome)

    async def aclose(self) -> None:
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def _without_numbers(ends: AsyncGenerator[tuple[int, Outcome], None]) -> AsyncGenerator[Outcome, None]:
    async with aclosing(ends):
        async for _, outcome in ends:
            yield outcome


class AsyncJob:
    """A handle on one job; see `Job`."""

    def __init__(self, job_id: str, client: AsyncClient, sent: SentJob | None = None) -> None:
        self.id = job_id
        self._sent = sent
        self._client = client
        self._session, self._driver = client._session, client._driver

    def __reduce__(self) -> tuple[Any, ...]:
        return AsyncClient.job, (self._client, self.id)

    async def status(self) -> str:
        """See `Job.status`."""
        return await self._driver.run(self._session.status(self.id))

    async def result(self, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return await self._driver.run(self._session.result(self.id, timeout, self._sent))

    async def cancel(self) -> bool:
        """See `Job.cancel`."""
        if self._sent is not None:
            self._sent.is_wanted = False
        return await self._driver.run_whole(self._session.cancel(self.id))

    def stream(self, timeout: float | None = None, replacements: bool = False) -> AsyncTextStream:
        """See `Job.stream`."""
        return AsyncTextStream(self, timeout, cancels=False, replacements=replacements)

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"


class AsyncTextStream(AsyncIterator[Piece]):
    """The text of a job as it comes; see `TextStream`."""

    def __init__(self, job: AsyncJob, timeout: float | None, cancels: bool, replacements: bool) -> None:
        self.job = job
        self._session, self._driver = job._session, job._driver
        self._reader = JobReader(job.id, streamed=True, sent=job._sent)
        self._loop = ReadLoop(self._session.recovery, timeout)
        self._appended = None if replacements else AppendOnlyTexts()
        self._ended = False
        self._cancels = cancels

    @property
    def result(self) -> GenerationResult | None:
        return self._reader.result

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        self._ended = True  # unless a piece comes
        piece = await self._driver.run(self._session.next_piece(self._reader, self._loop))
        if piece is None:
            raise StopAsyncIteration
        if self._appended is not None:
            self._appended.add(piece.choice_index, piece)
        self._ended = False
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
