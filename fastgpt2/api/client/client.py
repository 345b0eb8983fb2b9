"""Enqueue prompts and read their results, from any process that reaches Redis. Imports no numpy, no tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

from fastgpt2.api.client.bulk import BulkFields, plan_bulk, run_bulk
from fastgpt2.api.client.enqueue import (
    DEFAULT_JOB_TIMEOUT_SECONDS,
    DEFAULT_RESULT_TTL_SECONDS,
    NO_OPTIONS,
    JobFields,
    JobPlan,
    PromptLike,
    SentJob,
    plan_job,
)
from fastgpt2.api.client.flow import Driver
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.api.client.session import Session
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.keys import Priority
from fastgpt2.protocol.messages import JobOptions, Piece

if TYPE_CHECKING:
    from redis import Redis


class Client:
    """A queue of generation jobs.

    Args:
        redis_url: default `FASTGPT2_REDIS_URL`, else redis://127.0.0.1:6379/0.
        queue: default `FASTGPT2_QUEUE`, else "fastgpt2".
        max_queue: refuse to enqueue while this many jobs wait; default `FASTGPT2_MAX_QUEUE`, else no limit.
        durability: what a job must have reached before its enqueueing counts: Redis's "memory", its "disk" (the
            append-only file, by fsync), or a "replica" as well; default `FASTGPT2_DURABILITY`, else "memory".

    Safe for use by several threads. Close it, or use it as a context manager, to give its connections back.

    Waiting for what comes (`result`, `stream`, `map`, `as_completed`) outlasts a Redis that goes away for up to 30
    seconds, within the caller's own time; all else raises QueueUnavailable at once. If Redis comes back without a job
    that was enqueued here and that somebody waits for, the job is enqueued again.

    Raises:
        BadRequest: not a Redis URL, no number of jobs, or no such durability.
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
        self._driver = Driver(self.redis_url)
        self.connection: Redis = self._driver.connection

    def enqueue(self, prompt: str | list[int], **fields: Unpack[JobFields]) -> Job:
        """Put a prompt, a text or its token ids, into the queue.

        Raises:
            BadRequest: a field is unknown, ill-typed or out of bounds.
            PromptTooLong: it cannot fit the model that the live workers serve. Where only counting the tokens can tell,
                the worker tells: the job then fails.
            QueueFull: `max_queue` jobs wait already; nothing was enqueued.
            QueueUnavailable: Redis cannot be reached; nothing was enqueued, as far as can be known.
            RedisUnfit: Redis cannot confirm the durability that is asked for; nothing was enqueued.
            NotDurable: Redis did not confirm it in time. The job is enqueued all the same: its id is in `job_ids`.
        """
        return self._enqueue(plan_job(prompt, fields))

    def enqueue_request(
        self,
        request: GenerationRequest,
        options: JobOptions = NO_OPTIONS,
        *,
        priority: Priority = "normal",
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = DEFAULT_RESULT_TTL_SECONDS,
    ) -> Job:
        """Enqueue a request that has been made already. Raises what `enqueue` raises."""
        return self._enqueue(JobPlan(request, options, priority, job_timeout, result_ttl))

    def _enqueue(self, plan: JobPlan) -> Job:
        (sent,) = self._driver.run(self._session.send_all([plan]))
        return Job(sent.id, self._session, self._driver, sent)

    def job(self, job_id: str) -> Job:
        """Return a handle on a job that was enqueued before, here or elsewhere.

        Whether there is such a job shows when the handle is asked anything.
        """
        return Job(job_id, self._session, self._driver)

    def status(self, job_id: str) -> str:
        """See `Job.status`."""
        return self._driver.run(self._session.status(job_id))

    def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:
        """See `Job.result`."""
        return self._driver.run(self._session.result(job_id, timeout))

    def cancel(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        return self._driver.run(self._session.cancel(job_id))

    def workers(self) -> int:
        """Return how many workers are registered on the queue."""
        return self._driver.run(self._session.workers())

    def stream(
        self, prompt: PromptLike | Job, *, read_timeout: float | None = None, **fields: Unpack[JobFields]
    ) -> TextStream:
        """Enqueue a prompt and read its text as it comes; or read the text of a Job that is given.

        Args:
            prompt: what `enqueue` takes, a request that has been made, or a Job (`client.job(id)` for an id).
            read_timeout: seconds to wait for the job's end.

        Returns:
            An iterator over `Piece`s; of several texts (`n`), each piece has its `choice_index`. If it is closed before
            its end, by hand, as a context manager or as the loop that it stands in is left, it cancels a job that it
            has enqueued itself, but not one that was given.

        Raises:
            What `enqueue` raises, now; what `Job.result` raises, while it is read.
        """
        if isinstance(prompt, Job):
            return prompt.stream(read_timeout)
        job = self._enqueue(plan_job(prompt, {**fields, "stream": True}))
        return TextStream(job, read_timeout, cancels=True)

    @overload
    def map(
        self, prompts: Iterable[PromptLike], *, return_exceptions: Literal[False] = ..., **fields: Unpack[BulkFields]
    ) -> Generator[GenerationResult, None, None]: ...

    @overload
    def map(
        self, prompts: Iterable[PromptLike], *, return_exceptions: bool, **fields: Unpack[BulkFields]
    ) -> Generator[Outcome, None, None]: ...

    def map(
        self, prompts: Iterable[PromptLike], *, return_exceptions: bool = False, **fields: Unpack[BulkFields]
    ) -> Generator[Outcome, None, None]:
        """Yield the results of many prompts, in their order.

        Args:
            prompts: read as there is room, so it may be endless.
            return_exceptions: yield a job's error in its place instead of raising it.
            fields: see `BulkFields`. Results are kept for an hour, unless these say otherwise.

        If the generator is closed before its end, or ended by an error, it cancels the jobs that are in flight.

        Raises:
            BadRequest: `in_flight` is out of bounds.
            QueueUnavailable: Redis stays away.
            NotDurable: Redis has not confirmed for 30 s that what was enqueued is as durable as was asked for.
            What `Job.result` raises for the first job that fails, when its turn comes.
        """
        bulk, bar = plan_bulk(self._session, prompts, ordered=True, **fields)
        with closing(run_bulk(self._driver, bulk, bar)) as ends:
            for _, outcome in ends:
                yield outcome if return_exceptions else unwrap(outcome)

    @overload
    def as_completed(
        self, prompts: Iterable[PromptLike], *, return_exceptions: Literal[False] = ..., **fields: Unpack[BulkFields]
    ) -> Generator[tuple[int, GenerationResult], None, None]: ...

    @overload
    def as_completed(
        self, prompts: Iterable[PromptLike], *, return_exceptions: bool, **fields: Unpack[BulkFields]
    ) -> Generator[tuple[int, Outcome], None, None]: ...

    def as_completed(
        self, prompts: Iterable[PromptLike], *, return_exceptions: bool = False, **fields: Unpack[BulkFields]
    ) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (number of the prompt from 0, result) of many prompts, each as soon as it is there; see `map`."""
        bulk, bar = plan_bulk(self._session, prompts, ordered=False, **fields)
        with closing(run_bulk(self._driver, bulk, bar)) as ends:
            for number, outcome in ends:
                yield number, outcome if return_exceptions else unwrap(outcome)

    def close(self) -> None:
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Job:
    """A handle on one job: its id, its state, and its result once there."""

    def __init__(self, job_id: str, session: Session, driver: Driver, sent: SentJob | None = None) -> None:
        self.id = job_id
        self._sent = sent
        self._session = session
        self._driver = driver

    def status(self) -> str:
        """Return RQ's status: queued, started, finished, failed, stopped, canceled, deferred or scheduled.

        Raises:
            JobNotFound: never enqueued here, or expired.
            QueueUnavailable: Redis cannot be reached.
        """
        return self._driver.run(self._session.status(self.id))

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
            JobLost: it is gone without an end: somebody deleted it, or Redis lost it and it was enqueued elsewhere, or
                is lost again and again.
            ResultTimeout: not there yet; the message says where the job stands. The job goes on.
            QueueUnavailable: Redis cannot be reached.
        """
        return self._driver.run(self._session.result(self.id, timeout, self._sent))

    def cancel(self) -> bool:
        """Take the job out of the queue, or have its worker end it before the next token but one.

        Returns:
            True if it was cancelled, False if it had ended already.

        Raises what `status` raises.
        """
        if self._sent is not None:
            self._sent.is_wanted = False
        return self._driver.run(self._session.cancel(self.id))

    def stream(self, timeout: float | None = None) -> TextStream:
        """Read the text as it comes, from the beginning; see `Client.stream`.

        The text of a job that was enqueued without `stream` comes as one piece at the end.
        """
        return TextStream(self, timeout, cancels=False)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"


class TextStream(Iterator[Piece]):
    """The text of a job as it comes; see `Client.stream`.

    Attributes:
        job: whose text it is.
        result: the whole result, once the last piece has been taken.
    """

    def __init__(self, job: Job, timeout: float | None, cancels: bool) -> None:
        self.job = job
        self._session, self._driver = job._session, job._driver
        self._reader = JobReader(job.id, streamed=True, sent=job._sent)
        self._loop = ReadLoop(self._session.recovery, timeout)
        self._ended = False
        self._cancels = cancels

    @property
    def result(self) -> GenerationResult | None:
        return self._reader.result

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        self._ended = True  # unless a piece comes
        piece = self._driver.run(self._session.next_piece(self._reader, self._loop))
        if piece is None:
            raise StopIteration
        self._ended = False
        return piece

    def close(self) -> None:
        """Read no further. Cancel the job if this stream has enqueued it and it has not ended."""
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
