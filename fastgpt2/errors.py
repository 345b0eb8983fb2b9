"""What can go wrong, as types. Each carries the HTTP status and the exit code that it turns into.

A message names the thing, the limit and the remedy, so that it can be shown to a person as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.records import GenerationResult


class FastGPT2Error(Exception):
    """Base of every error that fastgpt2 raises on purpose."""

    http_status = 500
    exit_code = 1


class BadRequest(FastGPT2Error, ValueError):
    """What was asked for cannot be done: a wrong type, an unknown field, a value out of bounds."""

    http_status = 400
    exit_code = 2


class PromptTooLong(BadRequest):
    """Prompt and continuation together exceed the model's positions."""


class RequestTooLarge(BadRequest):
    """An HTTP body over the limit."""

    http_status = 413


class RequestTooSlow(BadRequest):
    """An HTTP body that did not come within its time."""

    http_status = 408


class IdempotencyMismatch(BadRequest):
    """An idempotency key that was used for another request."""

    http_status = 422


class ModelError(FastGPT2Error):
    """The model cannot be found, read or trusted. A pool does not restart a worker that ends with this."""

    http_status = 503
    exit_code = 3


class ModelNotFound(ModelError):
    """No such folder, no such repository, or nothing cached while offline."""


class ConfigError(ModelError):
    """`config.json` is missing, malformed, or describes something that is not a plain GPT-2."""


class CheckpointError(ModelError):
    """A safetensors file is missing, damaged, or does not hold the tensors that the configuration promises."""


class TokenizerError(ModelError):
    """The tokenizer's files are missing, damaged, or do not fit the model."""


class QueueUnavailable(FastGPT2Error):
    """Redis cannot be reached or refuses to serve."""

    http_status = 503
    exit_code = 4


class RedisAccessDenied(QueueUnavailable):
    """Redis answered, and said no: a wrong or missing password, or rights that do not suffice."""


class RedisServerMissing(FastGPT2Error):
    """No redis-server or valkey-server to start."""

    exit_code = 4


class JobNotFound(FastGPT2Error):
    """No job of that id: never enqueued here, or its result has expired."""

    http_status = 404


class JobFailed(FastGPT2Error):
    """The job ended without a result.

    Attributes:
        reason: the worker's sentence.
        kind: the error's name there.
        partial: what had been generated of a job that was cancelled, stopped, or out of time; else None.
    """

    http_status = 502
    how = "failed"

    def __init__(self, job_id: str, reason: str, kind: str = "", partial: GenerationResult | None = None) -> None:
        super().__init__(f"job {job_id} {self.how}: {reason}")
        self.job_id = job_id
        self.reason = reason
        self.kind = kind
        self.partial = partial


class JobCancelled(JobFailed):
    """The job was cancelled. `partial` is what had been generated, its `finish_reason` "cancelled"."""

    http_status = 409
    how = "was cancelled"


class JobStopped(JobFailed):
    """The job was stopped while it ran, by RQ's `send_stop_job_command`."""

    how = "was stopped"


class JobTimedOut(JobFailed):
    """The job's time was up, from its enqueueing or from its start."""

    http_status = 504
    how = "ran out of time"


class PoisonJob(JobFailed):
    """Workers died of the job, time and again, and so it is not tried any more."""

    how = "was given up as poison"


class QueueFull(FastGPT2Error):
    """The queue is as deep as it may be; nothing was enqueued. `depth` is the number of jobs that wait."""

    http_status = 429

    def __init__(self, queue: str, depth: int, limit: int) -> None:
        super().__init__(f"the queue {queue!r} is full: {depth} jobs wait, the limit is {limit}; try again later")
        self.depth = depth
        self.limit = limit


class ServiceBusy(FastGPT2Error):
    """The endpoint holds as many waiting requests as it may; nothing was enqueued."""

    http_status = 503


class Unauthorized(FastGPT2Error):
    """The endpoint asks for a token, and the request does not bear it."""

    http_status = 401


class ForbiddenOrigin(FastGPT2Error):
    """A web page of another site asked. Browsers send such requests for any page that a person opens."""

    http_status = 403


class ServiceStopping(FastGPT2Error):
    """The endpoint is being stopped while a request waits for its result. The job goes on."""

    http_status = 503


class ResultTimeout(FastGPT2Error, TimeoutError):
    """No result within the time that the caller was ready to wait. The job goes on."""

    http_status = 504
