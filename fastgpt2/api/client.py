"""Enqueue prompts and read their results, from any process that reaches Redis. Imports no numpy, no tokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rq import Queue
from rq.serializers import JSONSerializer

from fastgpt2 import settings
from fastgpt2.api.outcome import has_ended, job_key, known_status, latest_entry_id, outcome, results_key
from fastgpt2.engine.generation import GenerationRequest, GenerationResult
from fastgpt2.errors import BadRequest, JobNotFound, PromptTooLong, ResultTimeout
from fastgpt2.worker.connection import connect, redis_errors
from fastgpt2.worker.job import TASK, parse_request, request_to_kwargs

if TYPE_CHECKING:
    from redis import Redis

DEFAULT_JOB_TIMEOUT_SECONDS = 600
RESULT_TTL_SECONDS = 24 * 3600
MAX_SECONDS = 10**8
# How long one blocking read lasts; between two of them the job is looked at for a cancellation.
WAIT_SLICE_SECONDS = 2.0
MODEL_LIMITS_SECONDS = 30.0


class Client:
    """A queue of generation jobs.

    Args:
        redis_url: default `FASTGPT2_REDIS_URL`, else redis://127.0.0.1:6379/0.
        queue: default `FASTGPT2_QUEUE`, else "fastgpt2".

    Safe for use by several threads. Close it, or use it as a context manager, to give its connections back.

    Raises:
        BadRequest: not a Redis URL.
    """

    def __init__(self, redis_url: str | None = None, queue: str | None = None) -> None:
        self.redis_url = redis_url or settings.REDIS_URL.resolve()
        self.queue_name = queue or settings.QUEUE.resolve()
        self.connection: Redis = connect(self.redis_url)
        self._queue = Queue(self.queue_name, connection=self.connection, serializer=JSONSerializer)
        self._limits: tuple[float, int, int] | None = None

    def enqueue(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        stop: str | Iterable[str] = (),
        ignore_eos: bool = False,
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = RESULT_TTL_SECONDS,
        **unknown: object,
    ) -> Job:
        """Put a prompt into the queue.

        Args:
            prompt, max_new_tokens, stop, ignore_eos: see `GenerationRequest`.
            job_timeout: seconds that a worker may spend on the job.
            result_ttl: seconds for which the result, or the failure, can be read.

        Raises:
            BadRequest: a field is unknown, ill-typed or out of bounds.
            PromptTooLong: it cannot fit the model that the live workers serve. What only counting tokens can tell, the
                worker tells: the job then fails.
            QueueUnavailable: Redis cannot be reached; nothing was enqueued, as far as can be known.
        """
        options = {"max_new_tokens": max_new_tokens, "stop": stop, "ignore_eos": ignore_eos, **unknown}
        if not isinstance(stop, str | list | tuple) and isinstance(stop, Iterable):
            options["stop"] = tuple(stop)
        return self.enqueue_request(parse_request([prompt], options), job_timeout=job_timeout, result_ttl=result_ttl)

    def enqueue_request(
        self,
        request: GenerationRequest,
        *,
        job_timeout: int = DEFAULT_JOB_TIMEOUT_SECONDS,
        result_ttl: int = RESULT_TTL_SECONDS,
    ) -> Job:
        """`enqueue` for a request that has been made already."""
        _check_seconds("job_timeout", job_timeout)
        _check_seconds("result_ttl", result_ttl)
        with redis_errors(self.redis_url):
            self._check_limits(request)
            job = self._queue.enqueue(
                TASK,
                kwargs=request_to_kwargs(request),
                job_timeout=job_timeout,
                result_ttl=result_ttl,
                failure_ttl=result_ttl,
                # RQ would put the call, and so the prompt, into what `rq info` and logs show.
                description="generate",
            )
        return Job(self, job.id)

    def job(self, job_id: str) -> Job:
        """A job that was enqueued before, here or elsewhere. Whether it exists shows when it is asked anything."""
        return Job(self, job_id)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_limits(self, request: GenerationRequest) -> None:
        """Refuse what surely cannot fit: a token has only so many bytes, so a prompt has at least so many tokens."""
        n_positions, longest_token_bytes = self._model_limits()
        if not n_positions:
            return
        least_tokens = max(1, -(-len(request.prompt.encode()) // longest_token_bytes))
        if least_tokens >= n_positions:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt.encode())} bytes, so at least {least_tokens} tokens, over the "
                f"model's {n_positions} positions, one of which a new token needs: shorten it"
            )
        room = n_positions - least_tokens
        if request.max_new_tokens is not None and request.max_new_tokens > room:
            raise PromptTooLong(
                f"max_new_tokens is {request.max_new_tokens}; of the model's {n_positions} positions this prompt needs "
                f"{least_tokens} or more: ask for at most {room}"
            )

    def _model_limits(self) -> tuple[int, int]:
        """(n_positions, longest token in bytes) of the live workers' models, at best; (0, 1) without workers."""
        now = time.monotonic()
        if self._limits is None or now > self._limits[0]:
            positions, longest = 0, 1
            pipeline = self.connection.pipeline(transaction=False)
            for name in self.connection.smembers(f"rq:workers:{self.queue_name}"):
                pipeline.hmget(name, "n_positions", "longest_token_bytes")
            for n_positions, longest_token_bytes in pipeline.execute():
                if n_positions and longest_token_bytes:
                    positions = max(positions, int(n_positions))
                    longest = max(longest, int(longest_token_bytes))
            # Without a worker the next call looks again.
            self._limits = (now + (MODEL_LIMITS_SECONDS if positions else 0.0), positions, longest)
        return self._limits[1:]


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SECONDS:
        raise BadRequest(f"{name} must be a whole number of seconds from 1 to {MAX_SECONDS}, not {str(value)[:100]}")


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
        with redis_errors(self._client.redis_url):
            return known_status(self.id, self._client.connection.hget(job_key(self.id), "status"))

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Wait for the job's result.

        Args:
            timeout: seconds to wait; None waits for as long as it takes.

        Raises:
            JobFailed: it failed, or was stopped or cancelled; the message is the worker's.
            BadRequest: the worker refused the request: a prompt with too many tokens, for instance.
            JobNotFound: never enqueued here, or its result has expired.
            ResultTimeout: not there yet; the message says where the job stands. The job goes on.
            QueueUnavailable: Redis cannot be reached.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with redis_errors(self._client.redis_url):
            while True:
                done, after = self._poll()
                if done is not None:
                    return done
                left = WAIT_SLICE_SECONDS if deadline is None else min(WAIT_SLICE_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    raise ResultTimeout(self._timeout_message(timeout))
                # After what was read, not after what is there by now: that would be waited for in vain.
                self._client.connection.xread({results_key(self.id): after}, block=max(1, int(left * 1000)), count=1)

    def _poll(self) -> tuple[GenerationResult | None, bytes | str]:
        """The result or None, and the entry after which to wait for one. Raises what the job failed with."""
        connection, key = self._client.connection, results_key(self.id)
        entries = connection.xrevrange(key, count=1)
        found = outcome(self.id, entries)
        if found is None and has_ended(self.id, connection.hget(job_key(self.id), "status")):
            # Between the two reads; or else its result was not kept.
            found = outcome(self.id, connection.xrevrange(key, count=1))
            if found is None:
                raise JobNotFound(f"job {self.id} has ended, but its result has expired or was not kept")
        return found, latest_entry_id(entries)

    def _timeout_message(self, timeout: float | None) -> str:
        workers = self._client.connection.scard(f"rq:workers:{self._client.queue_name}")
        hint = "" if workers else f"; no worker listens on the queue {self._client.queue_name!r}: start `fastgpt2 up`"
        return f"job {self.id} is {self.status()}, no result within {timeout} s{hint}"

    def __repr__(self) -> str:
        return f"Job({self.id!r})"
