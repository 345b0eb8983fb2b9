"""An RQ job that can be nothing but text generation."""

from __future__ import annotations

import logging
import time
import traceback
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.exceptions import DeserializationError
from rq.job import Job, JobStatus
from rq.results import Result

from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed
from fastgpt2.protocol.keys import CRASHES_FIELD
from fastgpt2.protocol.messages import TASK, JobOptions, parse_job
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import MAX_PAYLOAD_BYTES, JSONOnlySerializer, PlainPickleSerializer, is_pickle

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")
MALFORMED_TTL_SECONDS = 24 * 3600
_FORGET = Script(__file__, "forget")


class GenerationJob(Job):
    """A job as a worker of this package sees it.

    Whatever function, callback or webhook an entry in Redis names, none of it is imported, called or fetched: the name
    of the function is compared with the one task, and the worker's decoder does the rest.
    """

    too_large = False
    # How many workers have died with it in their hands.
    crashes = 0

    def restore(self, raw_data: dict[Any, Any]) -> None:
        """As RQ does, but data that would inflate beyond the limit is not inflated."""
        inflater = zlib.decompressobj()
        try:
            inflater.decompress(raw_data.get(b"data", b""), MAX_PAYLOAD_BYTES)
            self.too_large = bool(inflater.unconsumed_tail)
        except zlib.error:  # not compressed; the serializer looks at its size
            pass
        crashes = raw_data.get(CRASHES_FIELD.encode(), b"")
        self.crashes = int(crashes) if crashes.isdigit() else 0
        super().restore({**raw_data, b"data": b"{}"} if self.too_large else raw_data)
        if is_pickle(self.data):
            self.serializer = PlainPickleSerializer

    @property
    def func(self) -> None:
        return None

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def send_webhooks(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def perform(self) -> Any:
        raise RuntimeError("a worker that holds many jobs performs none by itself")

    def asked(self) -> tuple[GenerationRequest, JobOptions]:
        """The validated request.

        Raises:
            BadRequest: the entry cannot be read, names another function, or its arguments are not a request.
        """
        try:
            name = self.func_name
        except DeserializationError as error:
            raise self.unreadable(error) from None
        if name != TASK:
            raise BadRequest(f"the job names the function {str(name)[:200]!r}; only {TASK} is run here")
        return parse_job(self.args, self.kwargs)

    def unreadable(self, error: DeserializationError) -> BadRequest:
        """What a job whose data cannot be read fails with."""
        if self.too_large:
            return BadRequest(f"the job's data has more than {MAX_PAYLOAD_BYTES} bytes")
        cause = str(error.__cause__ or "unknown")[:200]
        return BadRequest(
            f"the job's data is neither JSON nor a pickle of plain values ({cause}); enqueue with "
            "serializer=JSONSerializer"
        )


def fail_malformed(queue: Queue, job_id: str, reason: Exception, worker_name: str, claimed_key: str) -> BadRequest:
    """Record the failure of an entry that RQ cannot turn into a Job, and so cannot fail itself. Returns the failure.

    Where a key of the job is of another kind than it should be, what cannot be written is left out.

    Args:
        claimed_key: the worker's list that holds the job, and will not any more.
    """
    error = BadRequest(f"the job's entry in Redis is malformed ({type(reason).__name__}: {str(reason)[:200]})")
    job = GenerationJob(job_id, connection=queue.connection, serializer=JSONOnlySerializer)
    with queue.connection.pipeline() as pipeline:
        pipeline.lrem(claimed_key, 1, job_id)
        pipeline.hset(job.key, "status", JobStatus.FAILED.value)
        pipeline.expire(job.key, MALFORMED_TTL_SECONDS)
        pipeline.zadd(queue.failed_job_registry.key, {job_id: int(time.time()) + MALFORMED_TTL_SECONDS})
        Result.create_failure(job, MALFORMED_TTL_SECONDS, recorded(error), worker_name, pipeline=pipeline)
        _FORGET.add_to_transaction(pipeline, [], [queue.name, job_id])
        replies = pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception):
            log.warning("job %s cannot be failed as it should be (%s)", job_id, reply)
    return error


def recorded(error: BaseException) -> str:
    """What RQ keeps of a failure: of an error that was foreseen its sentence alone, of a defect all that is known."""
    kind = type(error)
    if isinstance(error, JobFailed):
        return f"{kind.__module__}.{kind.__qualname__}: {error.reason}\n"
    if isinstance(error, FastGPT2Error):
        return f"{kind.__module__}.{kind.__qualname__}: {error}\n"
    return "".join(traceback.format_exception(error))


# NOTE worker.entries: Jobs' entries as they stand in Redis, fetched with a bound and read with care.

# Far beyond what a request needs; what is larger is not even fetched.
MAX_ENTRY_BYTES = 64 << 20

_FETCH_ENTRIES = Script(__file__, "fetch_entries")


def fetch(connection: Redis, job_ids: Sequence[str], serializer: Any) -> list[GenerationJob | Exception | None]:
    """All of them in one round trip.

    Returns:
        Each one's job; None if there is none; what is the matter with it if it cannot be read.

    Raises:
        RedisError
    """
    keys = [GenerationJob.key_for(job_id) for job_id in job_ids]
    replies = _FETCH_ENTRIES.run(connection, keys, [MAX_ENTRY_BYTES]) if keys else []
    return [_read(connection, pair[0], pair[1], serializer) for pair in zip(job_ids, replies, strict=True)]


def _read(connection: Redis, job_id: str, reply: Any, serializer: Any) -> GenerationJob | Exception | None:
    if isinstance(reply, int):
        return ValueError(f"{reply} bytes; the limit is {MAX_ENTRY_BYTES}")
    if not isinstance(reply, list):
        return ValueError(f"it is a {reply.decode()}, no hash")
    if not reply:
        return None
    try:
        job = GenerationJob(job_id, connection=connection, serializer=serializer)
        job.restore(dict(zip(reply[::2], reply[1::2], strict=True)))
    except Exception as reason:  # whatever RQ's parsing meets
        return reason
    return job
