"""Jobs as they lie in Redis, for people: their fields, what they ask for, and why they failed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2 import errors
from fastgpt2.errors import BadRequest, FastGPT2Error, JobStopped, JobTimedOut, ModelError, PoisonJob, PromptTooLong
from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import (
    ATTEMPTS_FIELD,
    CRASHES_FIELD,
    PRIORITIES,
    Priority,
    list_models,
    model_of,
    plain_queue_of,
    queue_of,
    queues_of,
)
from fastgpt2.protocol.messages import TASK, job_fields
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.stored_jobs import PROMPT_FIELDS, Call, hide_prompts, read_call, read_failure, split_failure
from fastgpt2.protocol.untrusted import MAX_PAYLOAD_BYTES, check_replies, epoch_seconds, read_model_names, text, whole

if TYPE_CHECKING:
    from redis.asyncio import Redis

_READ_JOBS = Script(__file__, "read_jobs")

# The limits for what is read of one job: a field of its hash, and the packed text of its failure.
_MAX_FIELD_BYTES = 64 << 10
_MAX_PACKED_FAILURE_BYTES = 256 << 10

# The same for a job's data in a list. To read more for a hundred jobs at a time would keep the endpoint busy.
MAX_LISTED_DATA_BYTES = 64 << 10

# The most characters that are shown: of a prompt in a list (or token ids), of a sentence there, of a failure in full
# (its end), of a prompt, and of one other field of a request, as JSON.
MAX_SHORT_PROMPT = 200
MAX_SENTENCE = 1000
MAX_FAILURE_SHOWN = 64 << 10
MAX_PROMPT_SHOWN = 20_000
MAX_VALUE_SHOWN = 2000

_FIELDS = (
    "status", "origin", "created_at", "enqueued_at", "started_at", "ended_at", "worker_name", ATTEMPTS_FIELD,
    CRASHES_FIELD, "retries_left", "timeout", "result_ttl", "dependency_ids",
)  # fmt: skip

# What a list says of a failure, by the error's class; the first that fits.
_KINDS: tuple[tuple[type[FastGPT2Error], str], ...] = (
    (JobTimedOut, "timeout"),
    (PromptTooLong, "prompt_too_long"),
    (BadRequest, "bad_request"),
    (ModelError, "model_error"),
    (PoisonJob, "poison"),
    (JobStopped, "on_request"),
)


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it lies in Redis. Its fields are bytes, of which anybody may have written any.

    Attributes:
        fields: those of its hash that there are.
        call: what its data ask for; None if they were not asked for, or cannot be read.
        failure: the text of its failure; "" if it has not failed.
    """

    id: str
    fields: dict[str, bytes]
    call: Call | None
    failure: str

    @property
    def status(self) -> str:
        """RQ's word; "" if there is no such job."""
        return text(self.fields.get("status"))

    @property
    def queue(self) -> str:
        return text(self.fields.get("origin"))

    def moment(self, name: str) -> float | None:
        """Return a moment in seconds since 1970."""
        return epoch_seconds(self.fields.get(name))

    def count(self, name: str) -> int | None:
        return whole(self.fields.get(name))

    @property
    def worker(self) -> str | None:
        return text(self.fields.get("worker_name")) or None

    @property
    def prompt(self) -> Any:
        return None if self.call is None else self.call.prompt


async def read_queues(connection: Redis, name: str) -> list[str]:
    """Return the RQ queues of a pool, with those of the models that it remembers."""
    pipeline: Any = connection.pipeline(transaction=False)
    pipeline.execute_command(*list_models(name))
    (models,) = check_replies(await pipeline.execute(raise_on_error=False))
    return queues_of(name, read_model_names(models))


async def read_jobs(connection: Redis, ids: Sequence[bytes], most_data: int = MAX_PAYLOAD_BYTES) -> list[StoredJob]:
    """Read jobs by their ids, which may be any bytes.

    Args:
        most_data: the limit for a job's data, packed or not; 0 leaves them out.
    """
    if not ids:
        return []
    arguments = _MAX_FIELD_BYTES, most_data, _MAX_PACKED_FAILURE_BYTES, len(_FIELDS), *_FIELDS, *ids
    replies = await _READ_JOBS.run_async(connection, (), arguments)
    # In a thread, as it takes a while to look through a hundred pickles, or one of megabytes.
    return await asyncio.to_thread(lambda: [_read_job(*pair, most_data) for pair in zip(ids, replies, strict=True)])


def _read_job(job_id: bytes, reply: list[bytes], most_data: int) -> StoredJob:
    *values, data, failure = reply
    fields = {name: value for name, value in zip(_FIELDS, values, strict=True) if value}
    call = read_call(data, most_data) if data else None
    return StoredJob(job_id.decode("utf-8", "backslashreplace"), fields, call, read_failure(failure))


def describe_failure(job: StoredJob, show_prompts: bool) -> tuple[str | None, str | None]:
    """Return the kind of a job's failure and its sentence, both None if it has not failed."""
    if not job.failure:
        return None, None
    # A prompt of several lines is hidden as a whole, before the last line is taken for the sentence.
    name, sentence = split_failure(job.failure if show_prompts else without_prompt(job))
    known = _error_of_ours(name)
    kind = next((word for base, word in _KINDS if known is not None and issubclass(known, base)), "error")
    # Of another's error, such as a KeyError, the sentence alone may say nothing.
    if known is None and name and name != sentence:
        sentence = f"{name}: {sentence}"
    return kind, shorten(sentence, MAX_SENTENCE)


def _error_of_ours(name: str) -> type[FastGPT2Error] | None:
    found = getattr(errors, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, FastGPT2Error) else None


def without_prompt(job: StoredJob) -> str:
    """Return the text of a job's failure without its prompt."""
    if job.call is not None or not job.failure:
        return hide_prompts(job.failure, [] if job.call is None else job.call.secrets)
    # The prompt cannot be read, so nobody knows where it stands. The sentences of our own errors hold none.
    name, _ = split_failure(job.failure)
    is_ours = _error_of_ours(name) is not None
    return job.failure if is_ours else f"{name or 'an error'} (what it says is not shown: it may hold the prompt)"


def describe_in_full(job: StoredJob, pool: str, show_prompts: bool) -> dict[str, Any]:
    """Return what a list does not tell of a job, as JSON: where it waits, what it asks for, its failure in full.

    Args:
        pool: the name of the pool's queue.
    """
    failure = job.failure if show_prompts else without_prompt(job)
    if len(failure) > MAX_FAILURE_SHOWN:
        failure = f"… {failure[-MAX_FAILURE_SHOWN:]}"
    return {
        "queue": job.queue,
        "priority": priority_of(job.queue, pool),
        "model": model_of(job.queue) or _model_asked(job.call),
        "created_at": job.moment("created_at"),
        "crashes": job.count(CRASHES_FIELD) or 0,
        "retries_left": job.count("retries_left"),
        "job_timeout": job.count("timeout"),
        "result_ttl": job.count("result_ttl"),
        "depends_on": _read_ids(job.fields.get("dependency_ids", b"")),
        "request": _describe_request(job.call, show_prompts),
        "shows_prompts": show_prompts,
        "failure": failure or None,
    }


def priority_of(queue_name: str, pool: str) -> Priority:
    """Return the priority of the jobs of one of a pool's RQ queues."""
    plain = plain_queue_of(queue_name)
    return next((priority for priority in PRIORITIES if queue_of(pool, priority) == plain), "normal")


def _model_asked(call: Call | None) -> str | None:
    return text(call.kwargs.get("model")) or None if call is not None else None


def _read_ids(value: bytes) -> list[str]:
    try:
        found = json.loads(value or b"[]")
    except (ValueError, RecursionError):
        return []
    return [text(one) for one in found[:100]] if isinstance(found, list) else []


def _describe_request(call: Call | None, show_prompts: bool) -> dict[str, Any] | None:
    """Return the fields of a job's request as its client gave them, each of bounded length; None if it is none.

    An unknown field, whose name may be a slip of the pen for the prompt's, is left out; the failure names it.
    """
    if call is None or call.function != TASK:
        return None
    given = {**({"prompt": call.args[0]} if call.args else {}), **call.kwargs}
    shown: dict[str, Any] = {}
    for name, value in list(given.items())[:100]:
        if name in PROMPT_FIELDS:
            if show_prompts:
                shown[name] = _bounded(value, MAX_PROMPT_SHOWN)
        elif name in job_fields():
            shown[name] = _bounded(value, MAX_VALUE_SHOWN)
    return shown


def _bounded(value: Any, most: int) -> Any:
    """Return a value that JSON has, and whose JSON is not long; otherwise a text that begins like it."""
    if isinstance(value, str):
        return shorten(value, most)
    try:
        written = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        return shorten(ascii(value), most)
    return value if len(written) <= most else shorten(written, most)


def short_prompt(prompt: Any) -> str | list[int] | None:
    """Return the beginning of a prompt, for a list of jobs; of a chat, lines of each message's role and content.

    Returns:
        None for what is neither a text nor token ids nor messages.
    """
    if isinstance(prompt, str):
        return prompt[:MAX_SHORT_PROMPT]
    if not isinstance(prompt, list | tuple):
        return None
    shown = list(prompt[:MAX_SHORT_PROMPT])
    if shown and all(isinstance(one, Mapping) and "role" in one for one in shown):
        return "\n".join(map(_describe_message, shown))[:MAX_SHORT_PROMPT]
    return shown if all(isinstance(one, int) and not isinstance(one, bool) for one in shown) else None


def _describe_message(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return f"{text(message['role'])}: {' '.join(one for one in texts if isinstance(one, str))}"


def shorten(value: str, most: int) -> str:
    """Return a text, of a long one its beginning and how much there is more."""
    return value if len(value) <= most else f"{value[:most]}… ({counted(len(value) - most, 'more character')})"
