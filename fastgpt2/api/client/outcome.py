"""The outcome of a job, read from RQ's hash of the job and from RQ's stream of its results. No I/O: see `flow`."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, TypeAlias

from rq.job import JobStatus
from rq.results import Result

from fastgpt2 import errors
from fastgpt2.api.client.flow import Entries
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed, JobNotFound, JobTimedOut
from fastgpt2.protocol.keys import PARTIAL_META
from fastgpt2.protocol.messages import result_from_json
from fastgpt2.protocol.stored_jobs import read_failure, split_failure
from fastgpt2.protocol.untrusted import MAX_RESULT_BYTES, MAX_RESULT_OPCODES, read

_ENDED = (JobStatus.FINISHED.value, JobStatus.FAILED.value, JobStatus.STOPPED.value)

# A failed job that was requeued has such a status, and the entry of its earlier failure still.
_BEFORE_END = {
    status.value.encode()
    for status in (
        JobStatus.QUEUED,
        JobStatus.STARTED,
        JobStatus.DEFERRED,
        JobStatus.SCHEDULED,
        JobStatus.RATE_LIMITED,
    )
}

# How a job ended: errors are values here, as one job's must not disturb the others that are read with it.
Outcome: TypeAlias = GenerationResult | FastGPT2Error


def unwrap(outcome: Outcome) -> GenerationResult:
    """Return the result, or raise the error."""
    if isinstance(outcome, FastGPT2Error):
        raise outcome
    return outcome


def decode_status(job_id: str, status: bytes | None) -> str:
    """Return RQ's status of a job as text.

    Raises:
        JobNotFound: the job's hash has none.
    """
    if status is None:
        raise JobNotFound.by(job_id)
    return status.decode("utf-8", "replace")


def read_outcome(job_id: str, status: bytes | None, meta: bytes | None, entries: Entries) -> Outcome | None:
    """Return how a job ended; None if it waits, runs or will run again.

    Args:
        status, meta: those of the job's hash.
        entries: the latest one of the job's results, if there is any.

    Raises:
        FastGPT2Error: what stands there is not what RQ and our workers write.
    """
    fields: Mapping[bytes, bytes] = entries[0][1] if entries else {}
    try:
        kind = Result.Type(int(fields[b"type"])) if entries else None
    except (KeyError, ValueError):
        raise FastGPT2Error(f"the result of job {job_id} in Redis is none that RQ writes") from None
    match kind:
        case Result.Type.SUCCESSFUL:
            return result_from_json(return_value(fields))
        case Result.Type.FAILED | Result.Type.MAX_RETRIES_EXCEEDED if status in _BEFORE_END:
            return None
        case Result.Type.FAILED:
            return _failure(job_id, read_failure(fields.get(b"exc_string", b"")), read_partial(meta))
        case Result.Type.MAX_RETRIES_EXCEEDED:
            return JobFailed(job_id, "given back to the queue too often")
    if decode_status(job_id, status) in _ENDED:
        return JobNotFound(f"job {job_id} has ended, but its result has expired or was not kept")
    return None


def return_value(fields: Mapping[bytes, bytes]) -> Any:
    """Return what the job returned, from the entry of a success.

    A worker writes it as the job came: as JSON, or as a pickle of plain values, for callers that use RQ's default.

    Raises:
        FastGPT2Error: it is neither.
    """
    try:
        return read(base64.b64decode(fields[b"return_value"]), MAX_RESULT_BYTES, MAX_RESULT_OPCODES)
    except (KeyError, ValueError) as reason:
        raise FastGPT2Error(
            f"the result is neither JSON nor a pickle of plain values ({reason}): enqueue with "
            "serializer=rq.serializers.JSONSerializer, for a worker of fastgpt2"
        ) from None


def read_partial(meta: bytes | None) -> GenerationResult | None:
    """Return what had been generated, if the worker wrote it into the job's metadata."""
    try:
        return result_from_json(read(meta or b"{}", MAX_RESULT_BYTES, MAX_RESULT_OPCODES)[PARTIAL_META])
    except (FastGPT2Error, KeyError, TypeError, ValueError):
        return None


def _failure(job_id: str, text: str, partial: GenerationResult | None) -> FastGPT2Error:
    """Return the error that the text of a failure tells of."""
    name, reason = split_failure(text)
    known = getattr(errors, name, None) if name else None
    if isinstance(known, type) and issubclass(known, BadRequest):
        return known(reason)
    # JobTimeoutException is what a stock `rq worker` says.
    if name in (JobTimedOut.__name__, "JobTimeoutException"):
        return JobTimedOut(job_id, reason, name, partial)
    if isinstance(known, type) and issubclass(known, JobFailed):
        return known(job_id, reason, name, partial)
    return JobFailed(job_id, reason, name, partial)
