"""Enqueue prompts and read their results, from any process that reaches Redis. Imports no numpy, no tokenizer."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from fastgpt2.api.client.bulk import BulkFields, BulkRun, ProgressBar, plan_bulk, run_bulk
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
from fastgpt2.api.client.flow import Driver
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts, JobReader, ReadLoop
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

    Safe for use by several threads. Close it, or use it as a context manager, to give its connections back. A process
    that is forked makes connections of its own. A client can be pickled, and so can a Job: the pickle holds where Redis
    is, with the password if the URL has one, and the process that reads it connects by itself.

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

    @property
    def connection(self) -> Redis:
        """Return the connections of this process."""
        return self._driver.connection

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._session.arguments

    def enqueue(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Job:
        """Put a prompt into the queue: a text, its token ids, or a mapping of a prompt and further fields.

        Raises:
            BadRequest: a field is unknown, ill-typed or out of bounds.
            PromptTooLong: it cannot fit the model that the live workers serve. Where only counting the tokens can tell,
                the worker tells: the job then fails.
            QueueFull: `max_queue` jobs wait already; nothing was enqueued.
            QueueUnavailable: Redis cannot be reached; nothing was enqueued, as far as can be known.
            RedisUnfit: Redis cannot confirm the durability that is asked for; nothing was enqueued.
            NotDurable: Redis did not confirm it in time. The job is enqueued all the same: its id is in `job_ids`.
        """
        return self._enqueue(plan_prompt(prompt, fields))

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
        return Job(sent.id, self, sent)

    def job(self, job_id: str) -> Job:
        """Return a handle on a job that was enqueued before, here or elsewhere.

        Whether there is such a job shows when the handle is asked anything.
        """
        return Job(job_id, self)

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
        self,
        prompt: PromptLike | Job,
        *,
        read_timeout: float | None = None,
        replacements: bool = False,
        **fields: Unpack[JobFields],
    ) -> TextStream:
        """Enqueue a prompt and read its text as it comes; or read the text of a Job that is given.

        Args:
            prompt: what `enqueue` takes, a request that has been made, or a Job (`client.job(id)` for an id).
            read_timeout: seconds to wait for the job's end.
            replacements: give also pieces that replace text which was given before (see `Piece.at`), as there are if a
                job is started again by another worker and comes out otherwise. Without it, such a piece raises
                TextReplaced, so that a text which is only appended to is never a wrong one.

        Returns:
            An iterator over `Piece`s, which are strings; of several texts (`n`), each piece has its `choice_index`. If
            it is closed before its end, by hand, as a context manager or as the loop that it stands in is left, it
            cancels a job that it has enqueued itself, but not one that was given.

        Raises:
            What `enqueue` raises, now; what `Job.result` raises, and TextReplaced, while it is read.
        """
        if isinstance(prompt, Job):
            return prompt.stream(read_timeout, replacements)
        job = self._enqueue(plan_prompt(prompt, {**fields, "stream": True}))
        return TextStream(job, read_timeout, cancels=True, replacements=replacements)

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
        """Return a generator of the results of many prompts, in their order.

        Args:
            prompts: any iterable of what `enqueue` takes and of requests that have been made. The fields of a mapping
                count before those given here. Read as there is room, so it may be endless.
            return_exceptions: yield a job's error in its place instead of raising it.
            fields: see `BulkFields`. Results are kept for an hour, unless these say otherwise.

        If the generator is closed before its end, or ended by an error, it cancels the jobs that are in flight. An
        error of one prompt has the prompt's number as `index`, and a note that shows its beginning.

        Raises:
            BadRequest: now, if this is no iterable of prompts (but one prompt, or a table), or a field is wrong.
            QueueUnavailable: Redis stays away.
            NotDurable: Redis has not confirmed for 30 s that what was enqueued is as durable as was asked for.
            What `Job.result` raises for the first job that fails, when its turn comes.
        """
        bulk, bar = plan_bulk(self._session, prompts, "map", False, **fields)
        return _without_numbers(self._run(bulk, bar, return_exceptions))

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
        """Return a generator of (number of the prompt from 0, result), each as soon as it is there; see `map`."""
        bulk, bar = plan_bulk(self._session, prompts, "as_completed", False, **fields)
        return self._run(bulk, bar, return_exceptions)

    def _run(
        self, bulk: BulkRun, bar: ProgressBar, return_exceptions: bool
    ) -> Generator[tuple[int, Outcome], None, None]:
        with closing(run_bulk(self._driver, bulk, bar)) as ends:
            for number, outcome in ends:
                yield number, outcome if return_exceptions else unwrap(outcome)

    def close(self) -> None:
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without_numbers(ends: Generator[tuple[int, Outcome], None, None]) -> Generator[Outcome, None, None]:
    with closing(ends):
        for _, outcome in ends:
            yield outcome


class Job:
    """A handle on one job: its id, its state, and its result once there.

    Pickled, it is what `Client.job` returns: another process that waits for it enqueues nothing again.
    """

    def __init__(self, job_id: str, client: Client, sent: SentJob | None = None) -> None:
        self.id = job_id
        self._sent = sent
        self._client = client
        self._session, self._driver = client._session, client._driver

    def __reduce__(self) -> tuple[Any, ...]:
        return Client.job, (self._client, self.id)

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

    def stream(self, timeout: float | None = None, replacements: bool = False) -> TextStream:
        """Read the text as it comes, from the beginning; see `Client.stream`.

        The text of a job that was enqueued without `stream` comes as one piece at the end.
        """
        return TextStream(self, timeout, cancels=False, replacements=replacements)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"


class TextStream(Iterator[Piece]):
    """The text of a job as it comes; see `Client.stream`.

    Attributes:
        job: whose text it is.
        result: the whole result, once the last piece has been taken.
    """

    def __init__(self, job: Job, timeout: float | None, cancels: bool, replacements: bool) -> None:
        self.job = job
        self._session, self._driver = job._session, job._driver
        self._reader = JobReader(job.id, streamed=True, sent=job._sent)
        self._loop = ReadLoop(self._session.recovery, timeout)
        self._appended = None if replacements else AppendOnlyTexts()
        self._ended = False
        self._cancels, self._process = cancels, os.getpid()

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
        if self._appended is not None:
            self._appended.add(piece.choice_index, piece)
        self._ended = False
        return piece

    def close(self) -> None:
        """Read no further. Cancel the job if this stream has enqueued it and it has not ended."""
        # A forked child, which has a copy of all that its parent holds, leaves the parent's job alone.
        if self._cancels and self.result is None and self._process == os.getpid():
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
