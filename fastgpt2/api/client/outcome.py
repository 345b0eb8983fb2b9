"""The outcome of a job, read from RQ's hash of the job and from RQ's stream of its results. No I/O: see `flow`."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
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
from fastgpt2.protocol.untrusted import MAX_RESULT_BYTES, MAX_RESULT_OPCODES, read

MAX_REASON_BYTES = 1 << 20

_ENDED = (JobStatus.FINISHED.value, JobStatus.FAILED.value, JobStatus.STOPPED.value)

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
        raise JobNotFound(f"no job {job_id!r}: it was never enqueued here, or its result has expired")
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
        case Result.Type.FAILED:
            return _failure(job_id, _exception_text(fields), read_partial(meta))
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


def _exception_text(fields: Mapping[bytes, bytes]) -> str:
    try:
        inflater = zlib.decompressobj()
        return inflater.decompress(base64.b64decode(fields[b"exc_string"]), MAX_REASON_BYTES).decode("utf-8", "replace")
    except (KeyError, binascii.Error, zlib.error):
        return ""


def read_partial(meta: bytes | None) -> GenerationResult | None:
    """Return what had been generated, if the worker wrote it into the job's metadata."""
    try:
        return result_from_json(read(meta or b"{}", MAX_RESULT_BYTES, MAX_RESULT_OPCODES)[PARTIAL_META])
    except (FastGPT2Error, KeyError, TypeError, ValueError):
        return None


def _failure(job_id: str, text: str, partial: GenerationResult | None) -> FastGPT2Error:
    """Return the error that a formatted exception tells of: its last line is the type and the message."""
    lines = [line for line in text.splitlines() if line.strip()]
    match = re.fullmatch(r"([\w.]+)(?:: (.*))?", lines[-1]) if lines else None
    if match is None:
        return JobFailed(job_id, lines[-1] if lines else "no reason was recorded", partial=partial)
    name, reason = match[1].rpartition(".")[2], match[2] or match[1]
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, BadRequest):
        return known(reason)
    # JobTimeoutException is what a stock `rq worker` says.
    if name in (JobTimedOut.__name__, "JobTimeoutException"):
        return JobTimedOut(job_id, reason, name, partial)
    if isinstance(known, type) and issubclass(known, JobFailed):
        return known(job_id, reason, name, partial)
    return JobFailed(job_id, reason, name, partial)
