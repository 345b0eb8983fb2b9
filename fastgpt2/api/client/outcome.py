"""How a job ended, read from RQ's hash of it, `rq:job:<id>`, and from its stream of results, `rq:results:<id>`."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rq.job import JobStatus
from rq.results import Result

from fastgpt2 import errors
from fastgpt2.api.client.flow import Together, call
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobCancelled, JobFailed, JobNotFound, JobTimedOut
from fastgpt2.protocol.keys import PARTIAL_META
from fastgpt2.protocol.messages import result_from_json

MAX_REASON_BYTES = 1 << 20

# How long a worker may take to write down what it had generated of a job that was cancelled.
LETTING_GO_SECONDS = 5.0

# What XREVRANGE answers: (id, {field: value}), bytes throughout.
Entries: TypeAlias = Sequence[tuple[Any, Any]]

# How a job ended: errors are values here, as one job's must not disturb the others that are read with it.
Outcome: TypeAlias = GenerationResult | FastGPT2Error


def results_key(job_id: str) -> str:
    return f"rq:results:{job_id}"


def job_key(job_id: str) -> str:
    return f"rq:job:{job_id}"


def known_status(job_id: str, status: bytes | None) -> str:
    """RQ's status of a job as text. Raises JobNotFound where the job's hash has none."""
    if status is None:
        raise JobNotFound(f"no job {job_id!r}: it was never enqueued here, or its result has expired")
    return status.decode("utf-8", "replace")


def unwrapped(outcome: Outcome) -> GenerationResult:
    """The result, or the error raised."""
    if isinstance(outcome, FastGPT2Error):
        raise outcome
    return outcome


class Awaited:
    """A job whose end is waited for, and what was read of it so far.

    Attributes:
        after: the id of the latest entry of its results that has been read; to be waited for is what comes after it.
        letting_go: it was cancelled, and its worker still has to write down what it had generated.
    """

    def __init__(self, job_id: str) -> None:
        self.id = job_id
        self.key = results_key(job_id)
        self.after: bytes | str = "0-0"
        self._cancelled_since: float | None = None

    @property
    def letting_go(self) -> bool:
        return self._cancelled_since is not None

    def look(self) -> Together:
        """What reads the state of the job; in one transaction, so that its status and its result go together."""
        return Together(
            (
                call("hmget", job_key(self.id), "status", "worker_name", "meta"),
                call("xrevrange", self.key, "+", "-", 1),
            ),
            at_once=True,
        )

    def seen(self, answers: Sequence[Any], now: float) -> Outcome | None:
        """How the job ended, from the answers to `look`; None while it has not, or will run again."""
        (status, worker_name, meta), entries = answers
        if entries:
            self.after = entries[-1][0]
        if status == JobStatus.CANCELED.value.encode():
            self._cancelled_since = self._cancelled_since or now
            if worker_name and now - self._cancelled_since < LETTING_GO_SECONDS:
                return None
            return JobCancelled(self.id, "on request", "JobCancelled", _partial(meta))
        try:
            ended = _read(self.id, entries, meta)
            if ended is None and known_status(self.id, status) in _ENDED:
                return JobNotFound(f"job {self.id} has ended, but its result has expired or was not kept")
        except FastGPT2Error as error:
            return error
        return ended

    def heard(self, entries: Entries) -> Outcome | None:
        """The result, if it is what has come in; all other ends take a look at the job."""
        for entry_id, fields in entries:
            self.after = entry_id
            if fields.get(b"type") == _SUCCESSFUL:
                try:
                    return result_from_json(_return_value(fields))
                except FastGPT2Error as error:
                    return error
        return None


_SUCCESSFUL = str(Result.Type.SUCCESSFUL.value).encode()
_ENDED = (JobStatus.FINISHED.value, JobStatus.FAILED.value, JobStatus.STOPPED.value)


def _read(job_id: str, entries: Entries, meta: bytes | None) -> Outcome | None:
    """What the latest entry says."""
    if not entries:
        return None
    fields = entries[0][1]
    try:
        kind = Result.Type(int(fields[b"type"]))
    except (KeyError, ValueError):
        raise FastGPT2Error(f"the result of job {job_id} in Redis is none that RQ writes") from None
    if kind == Result.Type.RETRIED:
        return None
    if kind == Result.Type.SUCCESSFUL:
        return result_from_json(_return_value(fields))
    if kind == Result.Type.MAX_RETRIES_EXCEEDED:
        return JobFailed(job_id, "given back to the queue too often")
    return _failure(job_id, _exception_text(fields), _partial(meta))


def _return_value(fields: Mapping[bytes, bytes]) -> Any:
    try:
        return json.loads(base64.b64decode(fields[b"return_value"]))
    except (KeyError, ValueError, RecursionError) as reason:
        raise FastGPT2Error(f"the result is not JSON ({reason}); the worker must use the JSON serializer") from None


def _exception_text(fields: Mapping[bytes, bytes]) -> str:
    try:
        inflater = zlib.decompressobj()
        return inflater.decompress(base64.b64decode(fields[b"exc_string"]), MAX_REASON_BYTES).decode("utf-8", "replace")
    except (KeyError, binascii.Error, zlib.error):
        return ""


def _partial(meta: bytes | None) -> GenerationResult | None:
    """What had been generated, as the worker wrote it into the job's metadata."""
    try:
        return result_from_json(json.loads(meta or b"{}")[PARTIAL_META])
    except (FastGPT2Error, KeyError, TypeError, ValueError, RecursionError):
        return None


def _failure(job_id: str, text: str, partial: GenerationResult | None) -> FastGPT2Error:
    """The last line of a formatted exception is its type and message."""
    lines = [line for line in text.splitlines() if line.strip()]
    match = re.fullmatch(r"([\w.]+)(?:: (.*))?", lines[-1]) if lines else None
    if match is None:
        return JobFailed(job_id, lines[-1] if lines else "no reason was recorded", partial=partial)
    name, reason = match[1].rpartition(".")[2], match[2] or match[1]
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, BadRequest):
        return known(reason)
    # The latter is what a stock `rq worker` says.
    if name in (JobTimedOut.__name__, "JobTimeoutException"):
        return JobTimedOut(job_id, reason, name, partial)
    if isinstance(known, type) and issubclass(known, JobFailed):
        return known(job_id, reason, name, partial)
    return JobFailed(job_id, reason, name, partial)
