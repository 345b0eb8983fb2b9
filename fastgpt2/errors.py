"""The errors of this package. Each class has the HTTP status and the exit code that it turns into.

A message names the thing, the limit and the remedy, so that it can be shown to a person as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from fastgpt2.plurals import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fastgpt2.engine.decoding.records import GenerationResult


# How much of a prompt a note shows: characters of a text, token ids, or names of fields if it has no prompt.
SHOWN_CHARACTERS = 60
SHOWN_TOKEN_IDS = 12
SHOWN_FIELDS = 5

# How much of a job's id a message shows.
SHOWN_ID = 100

# How much of a model's name a message shows, and of how many models.
SHOWN_NAME = 200
SHOWN_NAMES = 10


class FastGPT2Error(Exception):
    """The base of all errors that fastgpt2 raises on purpose; raised itself where no subclass fits.

    Attributes:
        index: which prompt it is about, counted from 0, if several were given at once; otherwise None.
    """

    http_status = 500
    exit_code = 1
    index: int | None = None

    def name_prompt(self, index: int, prompt: object, call: str) -> None:
        """Tell which prompt this error is about: by `index`, and by a note that a traceback shows.

        Args:
            prompt: as the caller gave it.
            call: what the caller called, such as "map".
        """
        self.index = index
        self.add_note(f"prompt number {index} (counted from 0) of {call}: {_beginning(prompt)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes have the error as it is: by itself, Python would make it anew of its message alone."""
        return _made, (type(self), self.args), self.__dict__


def _made(kind: type[FastGPT2Error], args: tuple[Any, ...]) -> FastGPT2Error:
    """Return an error without its attributes, for `FastGPT2Error.__reduce__`."""
    return kind.__new__(kind, *args)


def _beginning(prompt: object) -> str:
    """Return the beginning of a prompt: a text or token ids, alone or in the mapping or request that was given.

    Of a chat it is that of the last message.
    """
    prompt = getattr(prompt, "given", prompt)
    messages = prompt.get("messages") if isinstance(prompt, Mapping) else prompt
    if isinstance(messages, list | tuple) and messages and isinstance(messages[-1], Mapping):
        return f"a chat whose last message is {_shown(messages[-1].get('content'))}"
    if isinstance(prompt, Mapping):
        if "prompt" not in prompt:
            names = [_shown(name) for name in islice(prompt, SHOWN_FIELDS)]
            return f"a mapping of {', '.join(names) or 'nothing'}{', ...' if len(prompt) > SHOWN_FIELDS else ''}"
        prompt = prompt["prompt"]
    if isinstance(prompt, list | tuple):
        shown = [_shown(token_id) for token_id in prompt[:SHOWN_TOKEN_IDS]]
        return f"[{', '.join(shown)}{', ...' if len(prompt) > SHOWN_TOKEN_IDS else ''}]"
    return _shown(prompt)


def _shown(value: object) -> str:
    """Return a text's beginning or a number as it is written; of all else, whose `repr` may be long, the type."""
    if isinstance(value, str):
        return repr(str(value[:SHOWN_CHARACTERS]) + ("..." if len(value) > SHOWN_CHARACTERS else ""))
    if isinstance(value, int | float | None):
        return repr(value)[:SHOWN_CHARACTERS]
    return f"of the type {type(value).__name__}"


class BadRequest(FastGPT2Error, ValueError):
    """Raised if what was asked for cannot be done: a wrong type, an unknown field, a value out of bounds."""

    http_status = 400
    exit_code = 2


class PromptTooLong(BadRequest):
    """Raised if a prompt and its continuation together need more positions than the model has."""


class ModelUnknown(BadRequest):
    """Raised if the request names a model that no worker serves."""

    http_status = 404

    @classmethod
    def among(cls, model: str, served: Collection[str]) -> ModelUnknown:
        """Return the error for a model that is not among those that workers serve."""
        shown = ", ".join(sorted(name[:SHOWN_NAME] for name in served)[:SHOWN_NAMES])
        more = f" and {len(served) - SHOWN_NAMES} more" if len(served) > SHOWN_NAMES else ""
        remedy = "name one of these, or" if served else "first"
        return cls(
            f"no worker serves the model {model[:SHOWN_NAME]!r}; served are: {shown or 'none'}{more}; {remedy} start "
            "a worker that serves it"
        )


class NoChatTemplate(BadRequest):
    """Raised if a chat is asked for, and the model has no chat template that can be used."""

    http_status = 404


class RequestTooLarge(BadRequest):
    """Raised if the body of an HTTP request is larger than the limit."""

    http_status = 413


class UnsupportedEncoding(BadRequest):
    """Raised if the body of an HTTP request is compressed, which no route takes."""

    http_status = 415


class RequestTooSlow(BadRequest):
    """Raised if the body of an HTTP request does not come within its time."""

    http_status = 408


class IdempotencyMismatch(BadRequest):
    """Raised if an idempotency key was already used for a different request."""

    http_status = 422


class ModelError(FastGPT2Error):
    """Raised if the model cannot be found, read or trusted.

    A pool does not start a worker again that ends with this error.
    """

    http_status = 503
    exit_code = 3


class ModelNotFound(ModelError):
    """Raised if there is no such folder or repository, or if nothing is cached while offline."""


class ConfigError(ModelError):
    """Raised if `config.json` is missing or malformed, or describes something that is not a plain GPT-2."""


class CheckpointError(ModelError):
    """Raised if a file of weights is missing or damaged, or lacks tensors that the configuration promises."""


class TokenizerError(ModelError):
    """Raised if the tokenizer's files are missing or damaged, or do not fit the model."""


class QueueUnavailable(FastGPT2Error):
    """Raised if Redis cannot be reached or refuses to serve."""

    http_status = 503
    exit_code = 4


class RedisUnfit(QueueUnavailable):
    """Raised if a Redis answers and cannot serve, which waiting does not mend: too old, a Cluster, no such database."""


class RedisAccessDenied(RedisUnfit):
    """Raised if Redis denies access: the password is wrong or missing, or the user lacks a right."""


class NotDurable(QueueUnavailable):
    """Raised if Redis took what was written, and did not confirm in time that it is as durable as was asked for.

    The jobs are in the queue and may run. Nobody knows whether they would outlast the loss of this Redis.

    Attributes:
        job_ids: the ids of the jobs that were enqueued; empty if something else was written.
    """

    def __init__(self, message: str, job_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.job_ids = tuple(job_ids)


class RedisServerMissing(FastGPT2Error):
    """Raised if this machine has no redis-server or valkey-server to start."""

    exit_code = 4


class JobNotFound(FastGPT2Error):
    """Raised if there is no job of this id: it was never enqueued here, or its result has expired."""

    http_status = 404

    @classmethod
    def by(cls, job_id: str) -> JobNotFound:
        """Return the error for an id that no job has."""
        return cls(f"no job {job_id[:SHOWN_ID]!r}: it was never enqueued here, or its result has expired")


class JobLost(JobNotFound):
    """Raised if a job that had been enqueued is gone without an end: Redis lost it, or somebody deleted it."""

    http_status = 503


class JobNotEnded(FastGPT2Error):
    """Raised if a job that is to run again waits or runs still."""

    http_status = 409


class JobFailed(FastGPT2Error):
    """Raised if the job ended without a result.

    Attributes:
        reason: the worker's sentence.
        kind: the name of the worker's error.
        partial: what was generated until then, if the job was cancelled, stopped, or out of time; otherwise None.
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
    """Raised if the job was cancelled.

    `partial` is what was generated until then, with the `finish_reason` "cancelled".
    """

    http_status = 409
    how = "was cancelled"


class JobStopped(JobFailed):
    """Raised if RQ's `send_stop_job_command` stopped the job while it ran."""

    how = "was stopped"


class JobTimedOut(JobFailed):
    """Raised if the job's time was up, which counts from its enqueueing or from its start."""

    http_status = 504
    how = "ran out of time"


class PoisonJob(JobFailed):
    """Raised if several workers died while they ran the job, so that it is not tried again."""

    how = "was given up as poison"


class TextReplaced(FastGPT2Error):
    """Raised if a job was started again by another worker, whose text differs from what a reader has been given.

    Whoever only appends what comes could not take that back.
    """


class QueueFull(FastGPT2Error):
    """Raised if as many jobs wait as may; nothing was enqueued.

    Attributes:
        depth: the number of jobs that wait.
        limit: the number of jobs that may wait.
    """

    http_status = 429

    def __init__(self, queue: str, depth: int, limit: int) -> None:
        waiting = counted(depth, "job waits", "jobs wait")
        super().__init__(f"the queue {queue!r} is full: {waiting}, the limit is {limit}; try again later")
        self.depth = depth
        self.limit = limit


class TokenLimitReached(FastGPT2Error):
    """Raised if the token of a request has reached one of its limits; nothing was enqueued.

    Attributes:
        retry_after: in how many seconds it may be worth asking again.
    """

    http_status = 429

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServiceBusy(FastGPT2Error):
    """Raised if the requests to the endpoint wait for as many jobs as they may; nothing was enqueued."""

    http_status = 503


class Unauthorized(FastGPT2Error):
    """Raised if the endpoint asks for a token, and the request bears another one."""

    http_status = 401


class TokenMissing(Unauthorized):
    """Raised if the endpoint asks for a token, and the request bears none that can be read."""


class ForbiddenOrigin(FastGPT2Error):
    """Raised if a web page of another site asks; browsers send such requests for any page that a person opens."""

    http_status = 403


class ServiceStopping(FastGPT2Error):
    """Raised if the endpoint is being stopped while a request waits for its result; the job goes on."""

    http_status = 503


class ResultTimeout(FastGPT2Error, TimeoutError):
    """Raised if there is no result within the time that the caller was ready to wait; the job goes on."""

    http_status = 504
