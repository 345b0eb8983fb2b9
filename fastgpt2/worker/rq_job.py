"""An RQ job that can be nothing but text generation."""

from __future__ import annotations

import logging
import time
import traceback
import zlib
from typing import Any

from rq import Queue
from rq.exceptions import DeserializationError
from rq.job import Job, JobStatus
from rq.results import Result

from fastgpt2.engine.generation import GenerationRequest
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed
from fastgpt2.worker.guarded import FORGET_EXECUTIONS
from fastgpt2.worker.job import TASK, JobOptions, parse_job
from fastgpt2.worker.names import CRASHES_FIELD
from fastgpt2.worker.payload import MAX_PAYLOAD_BYTES, JSONOnlySerializer, PlainPickleSerializer, is_pickle

log = logging.getLogger("fastgpt2.worker")

MALFORMED_TTL_SECONDS = 24 * 3600


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


def fail_malformed(queue: Queue, job_id: str, reason: Exception, worker_name: str, taken_key: str) -> BadRequest:
    """Record the failure of an entry that RQ cannot turn into a Job, and so cannot fail itself. Returns the failure.

    Where a key of the job is of another kind than it should be, what cannot be written is left out.

    Args:
        taken_key: the worker's list that holds the job, and will not any more.
    """
    error = BadRequest(f"the job's entry in Redis is malformed ({type(reason).__name__}: {str(reason)[:200]})")
    job = GenerationJob(job_id, connection=queue.connection, serializer=JSONOnlySerializer)
    with queue.connection.pipeline() as pipeline:
        pipeline.lrem(taken_key, 1, job_id)
        pipeline.hset(job.key, "status", JobStatus.FAILED.value)
        pipeline.expire(job.key, MALFORMED_TTL_SECONDS)
        pipeline.zadd(queue.failed_job_registry.key, {job_id: int(time.time()) + MALFORMED_TTL_SECONDS})
        Result.create_failure(job, MALFORMED_TTL_SECONDS, recorded(error), worker_name, pipeline=pipeline)
        pipeline.eval(f"{FORGET_EXECUTIONS} forget_executions(ARGV[1], ARGV[2])", 0, queue.name, job_id)
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
