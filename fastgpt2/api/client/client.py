"""Enqueue prompts and read their results, from any process that reaches Redis. Imports no numpy, no tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from fastgpt2.api.client.bulk import RESULT_TTL_SECONDS as READ_SOON_SECONDS
from fastgpt2.api.client.bulk import Flight, Item, Progress, length_of
from fastgpt2.api.client.enqueue import (
    DEFAULT_JOB_TIMEOUT_SECONDS,
    NO_OPTIONS,
    RESULT_TTL_SECONDS,
    JobFields,
    JobPlan,
    Prompt,
    plan_each,
    plan_job,
)
from fastgpt2.api.client.flow import Talk, carry_out
from fastgpt2.api.client.outcome import Outcome, unwrapped
from fastgpt2.api.client.reader import Following
from fastgpt2.api.client.session import Session
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import Priority
from fastgpt2.protocol.messages import JobOptions, Piece

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")
IN_FLIGHT = 64


class Client:
    """A queue of generation jobs.

    Args:
        redis_url: default `FASTGPT2_REDIS_URL`, else redis://127.0.0.1:6379/0.
        queue: default `FASTGPT2_QUEUE`, else "fastgpt2".
        max_queue: refuse to enqueue while so many jobs wait; default `FASTGPT2_MAX_QUEUE`, else no limit.

    Safe for use by several threads. Close it, or use it as a context manager, to give its connections back.

    Waiting for what comes (`result`, `stream`, `map`, `as_completed`) outlasts a Redis that goes away for up to 30
    seconds, within the caller's own time; all else raises QueueUnavailable at once.

    Raises:
        BadRequest: not a Redis URL, or no number of jobs.
    """

    def __init__(self, redis_url: str | None = None, queue: str | None = None, max_queue: int | None = None) -> None:
        self._session = Session(redis_url, queue, max_queue)
        self.connection: Redis = connect(self._session.redis_url)

    @property
    def redis_url(self) -> str:
        return self._session.redis_url

    @property
    def queue_name(self) -> str:
        return self._session.queue

    def enqueue(self, prompt: str | list[int], **fields: Unpack[JobFields]) -> Job:
        """Put a prompt, a text or its token ids, into the queue.

        Raises:
            BadRequest: a field is unknown, ill-typed or out of bounds.
            PromptTooLong: it cannot fit the model that the live workers serve. What only counting tokens can tell, the
                worker tells: the job then fails.
            QueueFull: `max_queue` jobs wait already; nothing was enqueued.
            QueueUnavailable: Redis cannot be reached; nothing was enqueued, as far as can be known.
        """
        return self.enqueue_plan(plan_job(prompt, fields))

    def enqueue_request(
        self,
        request: GenerationRequest,
        options: JobOptions = NO_OPTIONS,
        *,
        priority: Priority = "normal",
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = RESULT_TTL_SECONDS,
    ) -> Job:
        """`enqueue` for a request that has been made already."""
        return self.enqueue_plan(JobPlan(request, options, priority, job_timeout, result_ttl))

    def enqueue_plan(self, plan: JobPlan) -> Job:
        """`enqueue` for all that has been checked already."""
        return Job(self, self.carry_out(self._session.enqueue(plan, self.connection)))

    def job(self, job_id: str) -> Job:
        """A job that was enqueued before, here or elsewhere. Whether it exists shows when it is asked anything."""
        return Job(self, job_id)

    def status(self, job_id: str) -> str:
        """See `Job.status`."""
        return self.carry_out(self._session.status(job_id))

    def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return self.carry_out(self._session.result(job_id, timeout))

    def cancel(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        return self.carry_out(self._session.cancel(job_id))

    def workers(self) -> int:
        """How many workers are registered on the queue."""
        return self.carry_out(self._session.workers())

    def stream(
        self, prompt: Prompt | Job, *, read_timeout: float | None = None, **fields: Unpack[JobFields]
    ) -> TextStream:
        """Enqueue a prompt and read its text as it comes; or, for a Job, read that one's.

        Args:
            prompt: what `enqueue` takes, a request that has been made, or a Job (`client.job(id)` for an id).
            read_timeout: seconds to wait for the job's end.

        Returns:
            An iterator over `Piece`s. Closed before its end, by hand, as a context manager or by leaving the loop that
            it stands in, it cancels a job that it has enqueued itself; not one that was given.

        Raises:
            What `enqueue` raises, now; what `Job.result` raises, while it is read.
        """
        if isinstance(prompt, Job):
            return TextStream(self, prompt, read_timeout, cancels=False)
        job = self.enqueue_plan(plan_job(prompt, {**fields, "stream": True}))
        return TextStream(self, job, read_timeout, cancels=True)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: Literal[False] = ...,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> Generator[GenerationResult, None, None]: ...

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: bool,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> Generator[Outcome, None, None]: ...

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        **fields: Unpack[JobFields],
    ) -> Generator[Outcome, None, None]:
        """The results of many prompts, in their order.

        Args:
            prompts: read as there is room, so it may be endless.
            in_flight: at most so many jobs are in the queue, and so many results wait here for an earlier one. While
                others fill the queue up to `max_queue`, it is waited for room.
            return_exceptions: yield a job's error in its place instead of raising it.
            progress: show a bar on standard error.
            fields: for every prompt. Results are kept for an hour, unless these say otherwise.

        Closed before its end, or ended by an error, it cancels what is in flight.

        Raises:
            BadRequest: `in_flight` is out of bounds.
            QueueUnavailable: Redis stays away.
            What `Job.result` raises for the first job that fails, when its turn comes.
        """
        with closing(self._fly(prompts, in_flight, True, progress, fields)) as ends:
            for _, outcome in ends:
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
    ) -> Generator[tuple[int, GenerationResult], None, None]: ...

    @overload
    def as_completed(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = ...,
        return_exceptions: bool,
        progress: bool = ...,
        **fields: Unpack[JobFields],
    ) -> Generator[tuple[int, Outcome], None, None]: ...

    def as_completed(
        self,
        prompts: Iterable[Prompt],
        *,
        in_flight: int = IN_FLIGHT,
        return_exceptions: bool = False,
        progress: bool = False,
        **fields: Unpack[JobFields],
    ) -> Generator[tuple[int, Outcome], None, None]:
        """`map`, but each as (number of the prompt, result) as soon as it is there."""
        with closing(self._fly(prompts, in_flight, False, progress, fields)) as ends:
            for number, outcome in ends:
                yield number, outcome if return_exceptions else unwrapped(outcome)

    def _fly(
        self, prompts: Iterable[Prompt], in_flight: int, ordered: bool, progress: bool, fields: Mapping[str, Any]
    ) -> Generator[tuple[int, Outcome], None, None]:
        plans = plan_each(prompts, {"result_ttl": READ_SOON_SECONDS, **fields})
        with Progress(length_of(prompts), progress) as bar, closing(self.fly(plans, in_flight, ordered)) as ends:
            for number, outcome in ends:
                bar.add(outcome)
                yield number, outcome

    def fly(
        self, items: Iterable[Item], in_flight: int, ordered: bool = True
    ) -> Generator[tuple[int, Outcome], None, None]:
        """What `map` and `as_completed` are made of: see `Flight`. Closed before its end, it cancels what is in flight.

        Raises:
            BadRequest, QueueUnavailable
        """
        flight = Flight(self._session, items, in_flight, ordered, self.connection)
        try:
            while (end := self.carry_out(flight.next())) is not None:
                yield end
        except BaseException:
            with suppress(FastGPT2Error):
                self.carry_out(flight.cancel())
            raise

    def carry_out(self, talk: Talk[T]) -> T:
        """Hold one of the session's talks."""
        return carry_out(self.connection, self.redis_url, talk)

    def follow(self, job_id: str, timeout: float | None) -> Following:
        """For `TextStream`."""
        return Following(self._session, job_id, timeout)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Job:
    """A handle on one job: its id, its state, and its result once there."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.id = job_id
        self._client = client

    def status(self) -> str:
        """`queued`, `started`, `finished`, `failed`, `stopped`, `canceled`, `deferred` or `scheduled`, as RQ has it.

        Raises:
            JobNotFound: never enqueued here, or expired.
            QueueUnavailable: Redis cannot be reached.
        """
        return self._client.status(self.id)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the job's result.

        Args:
            timeout: seconds to wait; None waits for as long as it takes.

        Raises:
            JobCancelled: it was cancelled. As with the next, `partial` is what had been generated, if anything.
            JobTimedOut: its time was up.
            JobFailed: it failed, or was stopped; the message is the worker's.
            BadRequest: the worker refused the request: a prompt with too many tokens, for instance.
            JobNotFound: never enqueued here, or its result has expired.
            ResultTimeout: not there yet; the message says where the job stands. The job goes on.
            QueueUnavailable: Redis cannot be reached.
        """
        return self._client.result(self.id, timeout)

    def cancel(self) -> bool:
        """Take the job out of the queue, or have its worker end it before the next token but one.

        Returns:
            Whether it was cancelled: False if it had ended already.

        Raises:
            JobNotFound: never enqueued here, or expired.
            QueueUnavailable: Redis cannot be reached.
        """
        return self._client.cancel(self.id)

    def stream(self, timeout: float | None = None) -> TextStream:
        """The text as it comes, from the beginning; if it was enqueued without `stream`, all of it at the end."""
        return self._client.stream(self, read_timeout=timeout)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"


class TextStream(Iterator[Piece]):
    """The text of a job as it comes; see `Client.stream`.

    Attributes:
        job: whose text it is.
        result: the whole result, once the last piece has been taken.
    """

    def __init__(self, client: Client, job: Job, timeout: float | None, cancels: bool) -> None:
        self.job = job
        self._client = client
        self._following = client.follow(job.id, timeout)
        self._cancels = cancels

    @property
    def result(self) -> GenerationResult | None:
        return self._following.result

    def __next__(self) -> Piece:
        piece = self._client.carry_out(self._following.next())
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Read no further; the job is cancelled if it was enqueued by this stream and has not ended."""
        if self._cancels and self.result is None:
            self._cancels = False
            with suppress(FastGPT2Error):
                self.job.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # half made, or at the interpreter's end
            self.close()
