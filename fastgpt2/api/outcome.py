"""How a job ended, read from the stream of results that RQ keeps for it: `rq:results:<id>`."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from rq.job import JobStatus
from rq.results import Result

from fastgpt2 import errors
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed, JobNotFound
from fastgpt2.worker.job import result_from_json

MAX_REASON_BYTES = 1 << 20

# What XREVRANGE answers: (id, {field: value}), bytes throughout; the redis library's own types allow for much more.
Entries = Sequence[tuple[Any, Any]] | None


def results_key(job_id: str) -> str:
    return f"rq:results:{job_id}"


def job_key(job_id: str) -> str:
    return f"rq:job:{job_id}"


def known_status(job_id: str, status: bytes | str | None) -> str:
    """RQ's status of a job as text. Raises JobNotFound where the job's hash has none."""
    if status is None:
        raise JobNotFound(f"no job {job_id!r}: it was never enqueued here, or its result has expired")
    return status.decode() if isinstance(status, bytes) else status


def has_ended(job_id: str, status: bytes | str | None) -> bool:
    """Whether a job in this status has, or had, a result.

    Raises:
        JobFailed: it was cancelled, and will have none.
        JobNotFound: there is no such job.
    """
    known = known_status(job_id, status)
    if known == JobStatus.CANCELED.value:
        raise JobFailed(job_id, "it was cancelled", "JobCancelled")
    return known in (JobStatus.FINISHED.value, JobStatus.FAILED.value, JobStatus.STOPPED.value)


def latest_entry_id(entries: Entries) -> bytes | str:
    """The id after which to wait for the next entry."""
    latest: bytes | str = entries[0][0] if entries else b"0-0"
    return latest


def outcome(job_id: str, entries: Entries) -> GenerationResult | None:
    """What the latest entry says: the result; None when there is none yet or the job will run again.

    Raises:
        BadRequest: the worker refused the request.
        JobFailed: the job failed or was stopped, with the worker's reason.
    """
    if not entries:
        return None
    fields = entries[0][1]
    kind = Result.Type(int(fields[b"type"]))
    if kind == Result.Type.RETRIED:
        return None
    if kind == Result.Type.SUCCESSFUL:
        return result_from_json(_return_value(fields))
    raise _failure(job_id, _exception_text(fields), kind)


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


def _failure(job_id: str, text: str, kind: Result.Type) -> FastGPT2Error:
    """The last line of a formatted exception is its type and message."""
    if kind == Result.Type.MAX_RETRIES_EXCEEDED:
        return JobFailed(job_id, "given back to the queue too often")
    lines = [line for line in text.splitlines() if line.strip()]
    match = re.fullmatch(r"([\w.]+)(?:: (.*))?", lines[-1]) if lines else None
    if match is None:
        return JobFailed(job_id, lines[-1] if lines else "no reason was recorded")
    name, reason = match[1].rpartition(".")[2], match[2] or match[1]
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, BadRequest):
        return known(reason)
    return JobFailed(job_id, reason, name)
