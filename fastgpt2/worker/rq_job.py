"""An RQ job that can be nothing but text generation: how it is fetched, read and failed."""

from __future__ import annotations

import hashlib
import logging
import re
import time
import traceback
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.results import Result
from rq.utils import now as utc_now
from rq.utils import utcformat

from fastgpt2.engine.decoding.records import RANDOM_SEED_BITS, GenerationRequest
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed
from fastgpt2.events import about
from fastgpt2.protocol import untrusted
from fastgpt2.protocol.keys import CRASHES_FIELD, TOKEN_FIELD, TOKEN_NAME, check_model_name, job_key
from fastgpt2.protocol.messages import TASK, JobOptions, parse_job
from fastgpt2.protocol.request_context import RequestContext
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.stored_jobs import Call, hide_prompts
from fastgpt2.worker.entry_fields import MAX_DIGITS, check_fields
from fastgpt2.worker.set_aside import set_aside, shown, unclaim

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")
MALFORMED_TTL_SECONDS = 24 * 3600

# Far beyond what a request needs; what is larger is not even fetched.
MAX_ENTRY_BYTES = 64 << 20
_FETCH_ENTRIES = Script(__file__, "fetch_entries")
_FAIL_ENTRY = Script(__file__, "fail_entry")
_FORGET = Script(__file__, "forget")


class GenerationJob(Job):
    """A job as a worker of this package sees it.

    Whatever function, callback or webhook an entry in Redis names, none of it is imported, called or fetched: the name
    of the function is compared with the one task, and the worker's decoder does the rest. An id may be any text, as it
    might be before RQ 3: with colons, dots, spaces and line breaks.

    Attributes:
        too_large: whether the data would inflate beyond the limit; they are not inflated then.
        crashes: how many workers have died while they ran the job.
        token: the name of the endpoint's token by which it was enqueued; None if there was none.
    """

    too_large = False
    crashes = 0
    token: str | None = None

    def __init__(self, job_id: str | None = None, connection: Redis | None = None, serializer: Any = None) -> None:
        super().__init__(None, connection, serializer)
        self._id = job_id

    @property  # type: ignore[misc]
    def id(self) -> str:
        """The id, which RQ 3 would refuse in an entry of an older RQ."""
        return "" if self._id is None else self._id

    @classmethod
    def fetch(cls, job_id: str, connection: Redis | None = None, serializer: Any = None) -> GenerationJob:
        """Fetch a job as RQ does, whose own takes what stands before the first colon for the id."""
        job = cls(job_id, connection, serializer)
        job.refresh()  # type: ignore[no-untyped-call]
        return job

    @classmethod
    def fetch_many(cls, job_ids: Iterable[str], connection: Redis, serializer: Any = None) -> list[Job | None]:
        """Fetch jobs as RQ does; one that cannot be read is None, as if it were not there."""
        ids = list(job_ids)
        found: list[Job | None] = []
        for job_id, job in zip(ids, fetch(connection, ids, serializer), strict=True):
            if isinstance(job, Exception):
                log.warning("job %s cannot be read (%s)", shown(job_id), str(job)[:200], extra=about(job_id=job_id))
            found.append(None if isinstance(job, Exception) else job)
        return found

    def restore(self, raw_data: dict[Any, Any]) -> None:
        """Read the entry as RQ does, but do not inflate data that would inflate beyond the limit.

        Raises:
            Exception: RQ cannot read the entry, or could not write what follows from it.
        """
        inflater = zlib.decompressobj()
        with suppress(zlib.error):  # not compressed; the serializer looks at its size
            inflater.decompress(raw_data.get(b"data", b""), untrusted.MAX_PAYLOAD_BYTES)
            self.too_large = bool(inflater.unconsumed_tail)
        crashes = raw_data.get(CRASHES_FIELD.encode(), b"")
        self.crashes = int(crashes) if crashes.isdigit() and len(crashes) <= MAX_DIGITS else 0
        token = raw_data.get(TOKEN_FIELD.encode(), b"").decode("utf-8", "replace")
        self.token = token if re.fullmatch(TOKEN_NAME, token) else None
        fields = check_fields(raw_data)
        super().restore({**fields, b"data": b"{}"} if self.too_large else fields)
        if not isinstance(self.meta, dict):  # kept as it is, as RQ keeps what it cannot read
            self._unreadable_meta = raw_data[b"meta"]
            self.meta = {"unserialized": self._unreadable_meta}
        # Less than zero means for ever; RQ understands -1 everywhere, and other numbers in some places.
        self.result_ttl = None if self.result_ttl is None else max(-1, self.result_ttl)
        self.failure_ttl = None if self.failure_ttl is None else max(-1, self.failure_ttl)
        self.retry_intervals = self.retry_intervals or None
        self._counters = self.retries_left, self.repeats_left, self.repeat_intervals
        if untrusted.is_pickle(self.data):
            self.serializer = untrusted.PlainPickleSerializer

    @property
    def request_context(self) -> RequestContext:
        """The request and the trace that the job's metadata tell of."""
        return RequestContext.from_meta(self.meta)

    def without_prompt(self, said: object) -> str:
        """Return what an error says, without the prompt that it may quote: for logs and traces."""
        try:
            call = Call(self.func_name or "", list(self.args), dict(self.kwargs))
        except (DeserializationError, TypeError, ValueError):  # `parse` says what is wrong
            return str(said)
        return hide_prompts(str(said), call.secrets)

    def rewind(self) -> None:
        """Set RQ's counters of retries and repeats to what was read: RQ changes them while an end is recorded."""
        self.retries_left, self.repeats_left, self.repeat_intervals = self._counters

    func = property(lambda _job: None)
    success_callback = property(lambda _job: None)
    failure_callback = property(lambda _job: None)
    stopped_callback = property(lambda _job: None)

    def send_webhooks(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def perform(self) -> Any:
        raise RuntimeError("a worker that runs many jobs performs none by itself")

    @property
    def model(self) -> str | None:
        """The name of the model that the job is for; None if it names none, or what can be no name."""
        try:
            kwargs = self.kwargs
            model = kwargs.get("model") if isinstance(kwargs, dict) else None
            return None if model is None else str(check_model_name("model", model))
        except (DeserializationError, BadRequest):  # `parse` says what is wrong
            return None

    def parse(self) -> tuple[GenerationRequest, JobOptions]:
        """Return the validated request, with a seed if it draws.

        Raises:
            BadRequest: the entry cannot be read, names another function, or its arguments are not a request.
        """
        try:
            name = self.func_name
        except DeserializationError as error:
            if self.too_large:
                raise BadRequest(f"the job's data has more than {untrusted.MAX_PAYLOAD_BYTES} bytes") from None
            cause = str(error.__cause__ or "unknown")[:200]
            raise BadRequest(
                f"the job's data is neither JSON nor a pickle of plain values ({cause}); enqueue with "
                "serializer=JSONSerializer"
            ) from None
        if name != TASK:
            raise BadRequest(f"the job names the function {str(name)[:200]!r}; only {TASK} is run here")
        request, options = parse_job(self.args, self.kwargs)
        return request.with_seed(seed_of(self)), options


def seed_of(job: Job) -> int:
    """Return the seed of a job that came without one, as what no client of ours has enqueued: each run has the same."""
    digest = hashlib.sha256(f"{job.id} {job.created_at}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest) >> (8 * len(digest) - RANDOM_SEED_BITS)


def fetch(connection: Redis, job_ids: Sequence[str], serializer: Any) -> list[GenerationJob | Exception | None]:
    """Fetch jobs in one round trip; an entry that is too large is not fetched.

    Returns:
        For each id its job; None if there is none; an error that says why, if it cannot be read.
    """
    keys = [job_key(job_id) for job_id in job_ids]
    replies = _FETCH_ENTRIES.run(connection, keys, [MAX_ENTRY_BYTES]) if keys else []
    return [_read(connection, job_id, reply, serializer) for job_id, reply in zip(job_ids, replies, strict=True)]


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


def fail_malformed(queue: Queue, job_id: str, reason: BaseException, worker_name: str, claimed_key: str) -> BadRequest:
    """Record the failure of an entry that RQ cannot turn into a Job, and so cannot fail itself; return the failure.

    Where a key of the job is of another kind than it should be, what cannot be written is left out, and the job is
    noted among what was set aside.

    Args:
        claimed_key: the worker's list that has the job; the job is taken off it.
    """
    error = BadRequest(f"the job's entry in Redis is malformed ({type(reason).__name__}: {str(reason)[:200]})")
    job = GenerationJob(job_id, connection=queue.connection, serializer=untrusted.JSONOnlySerializer)
    with queue.connection.pipeline() as pipeline:
        _FAIL_ENTRY.add_to_transaction(pipeline, [job.key], [MALFORMED_TTL_SECONDS, utcformat(utc_now())])
        pipeline.zadd(queue.failed_job_registry.key, {job_id: int(time.time()) + MALFORMED_TTL_SECONDS})
        Result.create_failure(job, MALFORMED_TTL_SECONDS, describe_error(error), worker_name, pipeline=pipeline)
        _FORGET.add_to_transaction(pipeline, [], [queue.name, job_id])
        replies = pipeline.execute(raise_on_error=False)
    refused = [reply for reply in replies if isinstance(reply, Exception)]
    for reply in refused:
        if untrusted.is_of_service(reply):
            raise reply
        log.warning("job %s cannot be failed as it should be (%s)", shown(job_id), reply, extra=about(job_id=job_id))
    if refused:
        set_aside(queue, job_id.encode(), str(error), worker_name)
    unclaim(queue.connection, claimed_key, job_id)
    return error


def describe_error(error: BaseException) -> str:
    """Return what RQ keeps of a failure: the sentence of an error that was foreseen; the traceback of a defect."""
    if isinstance(error, FastGPT2Error):
        reason = error.reason if isinstance(error, JobFailed) else error
        return f"{type(error).__module__}.{type(error).__qualname__}: {reason}\n"
    return "".join(traceback.format_exception(error))
