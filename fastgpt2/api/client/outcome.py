"""How a job ended, read from RQ's hash of the job and from RQ's stream of its results. No I/O: see `flow`."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

from rq.job import JobStatus
from rq.results import Result

from fastgpt2 import errors
from fastgpt2.api.client.flow import Entries, Pipeline, command
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobCancelled, JobFailed, JobNotFound, JobTimedOut
from fastgpt2.protocol.keys import PARTIAL_META, job_key, results_key
from fastgpt2.protocol.messages import result_from_json

MAX_REASON_BYTES = 1 << 20

# How long a worker may take to write down what it had generated of a job that was cancelled.
LETTING_GO_SECONDS = 5.0

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


class Stage(Enum):
    """Where a job stands, for those who wait for its end."""

    # It waits, runs or will run again. Its end will write an entry to its results.
    WAITING = "waiting"

    # Something was written whose meaning only the job's state tells; or nothing is known of the job yet.
    UNCLEAR = "unclear"

    # It was cancelled, and its worker still has to write down what it had generated. That writes no entry.
    LETTING_GO = "letting go"

    ENDED = "ended"


class PendingResult:
    """The end of a job that is waited for.

    Attributes:
        key: of RQ's stream of the job's results.
        after: the id of the last entry read there; the next read begins after it.
        outcome: how the job ended; None until then.
    """

    def __init__(self, job_id: str, stage: Stage = Stage.UNCLEAR) -> None:
        self.id = job_id
        self.key = results_key(job_id)
        self.after: bytes | str = "0-0"
        self.stage = stage
        self.outcome: Outcome | None = None
        self._cancelled_at = 0.0

    def query(self) -> Pipeline:
        """Return what reads the job's state: one transaction, so that its status and its result belong together."""
        return Pipeline(
            (
                command("hmget", job_key(self.id), "status", "worker_name", "meta"),
                command("xrevrange", self.key, "+", "-", 1),
            ),
            transaction=True,
        )

    def on_state(self, replies: Sequence[Any], now: float) -> None:
        """Take in the replies to `query`.

        Args:
            now: on the monotonic clock.
        """
        (status, worker_name, meta), entries = replies
        if entries:
            self.after = entries[-1][0]
        if status == _CANCELED:
            if self.stage is not Stage.LETTING_GO:
                self.stage, self._cancelled_at = Stage.LETTING_GO, now
            if not worker_name or now - self._cancelled_at >= LETTING_GO_SECONDS:
                self.end(JobCancelled(self.id, "on request", "JobCancelled", _partial(meta)))
            return
        self.stage = Stage.WAITING
        try:
            outcome = _outcome_of(self.id, entries, meta)
            if outcome is None and decode_status(self.id, status) in _ENDED:
                outcome = JobNotFound(f"job {self.id} has ended, but its result has expired or was not kept")
        except FastGPT2Error as error:
            outcome = error
        if outcome is not None:
            self.end(outcome)

    def on_entries(self, entries: Entries) -> None:
        """Take in new entries of the job's results. Only success is told by one; for all else, query the state."""
        for entry_id, fields in entries:
            self.after = entry_id
            if fields.get(b"type") == _SUCCESSFUL:
                try:
                    self.end(result_from_json(_return_value(fields)))
                except FastGPT2Error as error:
                    self.end(error)
                return
        if entries:
            self.require_query()

    def require_query(self) -> None:
        if self.stage is Stage.WAITING:
            self.stage = Stage.UNCLEAR

    def end(self, outcome: Outcome) -> None:
        self.stage, self.outcome = Stage.ENDED, outcome


_CANCELED = JobStatus.CANCELED.value.encode()
_SUCCESSFUL = str(Result.Type.SUCCESSFUL.value).encode()
_ENDED = (JobStatus.FINISHED.value, JobStatus.FAILED.value, JobStatus.STOPPED.value)


def _outcome_of(job_id: str, entries: Entries, meta: bytes | None) -> Outcome | None:
    """Return what the latest entry of a job's results says; None if it says that the job runs again."""
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
    """Return what had been generated, if the worker wrote it into the job's metadata."""
    try:
        return result_from_json(json.loads(meta or b"{}")[PARTIAL_META])
    except (FastGPT2Error, KeyError, TypeError, ValueError, RecursionError):
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
