"""What becomes of a job, written into Redis as RQ writes it: started, finished, failed, cancelled, given back.

The one place that knows these internals of RQ 3.0, and for many jobs a worker. An end is written only if Redis still
has the job as started by this worker: who cancelled or deleted it meanwhile is not overruled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial as bound
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError, WatchError
from rq import Queue
from rq.executions import Execution
from rq.job import JobStatus
from rq.rate_limit import release_slot
from rq.registry import CanceledJobRegistry
from rq.repeat import Repeat
from rq.utils import now as utc_now
from rq.utils import utcformat
from rq.worker import BaseWorker, WorkerStatus

from fastgpt2.worker.claims import Claim
from fastgpt2.worker.guarded import Guarded, Verdict, carry_out
from fastgpt2.worker.names import ATTEMPTS_FIELD, PARTIAL_META, stream_key
from fastgpt2.worker.rq_job import GenerationJob, fail_malformed
from fastgpt2.worker.stream import STREAM_TTL_SECONDS, Piece, end_entry, piece_to_entry

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")

# Far beyond what a request needs; what is larger is not even fetched.
MAX_ENTRY_BYTES = 64 << 20

# KEYS: jobs' hashes. ARGV: the most bytes that one may have. Of each its fields and values, its size if that is more,
# or what it is if it is no hash.
_FETCH = """
local found = {}
for i, key in ipairs(KEYS) do
    local kind, size = redis.call('TYPE', key).ok, 0
    if kind == 'hash' then
        for _, field in ipairs(redis.call('HKEYS', key)) do size = size + redis.call('HSTRLEN', key, field) end
    end
    if kind ~= 'hash' and kind ~= 'none' then found[i] = kind
    elseif size > tonumber(ARGV[1]) then found[i] = size
    else found[i] = redis.call('HGETALL', key) end
end
return found
"""

# KEYS: a job's hash, its queue. ARGV: the job's id, the worker's name. Whether the job was still this worker's.
_GIVE_BACK = """
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name')
if known[1] ~= 'started' or known[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'status', 'queued', 'worker_name', '', 'started_at', '')
redis.call('LPUSH', KEYS[2], ARGV[1])
return 1
"""


@dataclass(eq=False, slots=True)
class Started:
    """A job that this worker has started.

    Attributes:
        attempt: how often it has been started, this time included.
        began_at: when, on `time.monotonic`'s clock.
    """

    job: GenerationJob
    queue: Queue
    execution: Execution
    attempt: int
    began_at: float

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def waited_seconds(self) -> float:
        """From being enqueued until started, by the clocks of two machines; never below zero."""
        return seconds_between(self.job.enqueued_at, self.job.started_at)


def seconds_between(earlier: datetime | None, later: datetime | None) -> float:
    """Time between two moments that RQ noted; 0 where one is missing or the clocks of two machines disagree."""
    if earlier is None or later is None:
        return 0.0
    return max(0.0, (_aware(later) - _aware(earlier)).total_seconds())


def _aware(moment: datetime) -> datetime:
    """RQ notes moments in UTC, with or without saying so."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Ledger:
    """Writes for one worker."""

    def __init__(self, worker: BaseWorker) -> None:
        self._worker = worker
        self._connection = worker.connection

    def start(self, claims: Sequence[Claim]) -> list[Started]:
        """Fetch claimed jobs and note that they have been started; those that cannot be read are failed instead."""
        keys = [GenerationJob.key_for(job_id) for _, job_id in claims]
        with self._connection.pipeline(transaction=False) as pipeline:
            pipeline.eval(_FETCH, len(keys), *keys, MAX_ENTRY_BYTES)
            (replies,) = pipeline.execute()
        started: list[Started] = []
        for claim, reply in zip(claims, replies, strict=True):
            queue, job_id = claim
            job = self._read(claim, reply)
            if isinstance(job, GenerationJob):
                started.append(Started(job, queue, Execution("", job.id, self._connection), 0, time.monotonic()))
            elif isinstance(job, Exception):
                self._fail_malformed(queue, job_id, job)
            else:
                self._connection.lrem(queue.intermediate_queue_key, 1, job_id)
        return self._write_started(started)

    def _read(self, claim: Claim, reply: Any) -> GenerationJob | Exception | None:
        """The job; None if it has been deleted or cancelled; what is the matter with it if it cannot be read."""
        if isinstance(reply, int):
            return ValueError(f"{reply} bytes; the limit is {MAX_ENTRY_BYTES}")
        if not isinstance(reply, list):
            return ValueError(f"it is a {reply.decode()}, no hash")
        if not reply:
            return None
        try:
            job = GenerationJob(claim[1], connection=self._connection, serializer=self._worker.serializer)
            job.restore(dict(zip(reply[::2], reply[1::2], strict=True)))
        except Exception as reason:  # whatever RQ's parsing meets
            return reason
        return None if job.get_status(refresh=False) == JobStatus.CANCELED else job

    def _fail_malformed(self, queue: Queue, job_id: str, reason: Exception) -> None:
        try:
            error = fail_malformed(queue, job_id, reason, self._worker.name)
            log.warning("%s: job %s failed: %s", self._worker.name, job_id, error)
        except ResponseError as refusal:  # its key is no hash, for instance
            log.warning("%s: job %s cannot even be failed: %s", self._worker.name, job_id, refusal)

    def _write_started(self, everything: list[Started]) -> list[Started]:
        if not everything:
            return []
        guarded = [Guarded(each.job.key, "", bound(self._begin, each)) for each in everything]
        started = []
        for each, (verdict, attempt) in zip(everything, carry_out(self._connection, guarded), strict=True):
            if verdict != Verdict.DONE:  # cancelled or deleted since it was read
                self._connection.lrem(each.queue.intermediate_queue_key, 1, each.id)
                continue
            each.attempt = int(attempt)
            self._worker.executions[each.execution.id] = each.execution
            started.append(each)
        return started

    def _begin(self, started: Started, pipeline: Pipeline) -> None:
        job, queue, worker = started.job, started.queue, self._worker
        job.origin = queue.name
        ttl = worker.get_heartbeat_ttl(job)
        started.execution = Execution.create(job, ttl, pipeline=pipeline, worker_name=worker.name)
        job.prepare_for_execution(worker.name, pipeline=pipeline)
        pipeline.persist(job.key)
        pipeline.lrem(queue.intermediate_queue_key, 1, job.id)
        # A job that was cancelled and enqueued again is still among the cancelled.
        pipeline.zrem(CanceledJobRegistry.key_template.format(queue.name), job.id)
        worker.set_state(WorkerStatus.BUSY, pipeline=pipeline)
        pipeline.hincrby(job.key, ATTEMPTS_FIELD, 1)

    def finish(self, started: Started, value: Any, last: Piece | None) -> bool:
        """Write a job's result. `last` ends its stream, if it has one.

        Returns:
            False if it is not this worker's any more: cancelled, deleted, or taken over.
        """
        job, worker = started.job, self._worker
        repeats = job.repeats_left, job.repeat_intervals
        ready: dict[str, list[str]] = {}

        def write(pipeline: Pipeline) -> None:
            job.repeats_left, job.repeat_intervals = repeats
            job.ended_at = utc_now()
            job._result = value
            job._status = JobStatus.FINISHED
            worker.increment_successful_job_count(pipeline=pipeline)
            self._count_time(job, pipeline)
            result_ttl = job.get_result_ttl(worker.default_result_ttl)
            if result_ttl != 0:
                job._handle_success(result_ttl, pipeline=pipeline, worker_name=worker.name, **_execution(started))
            if job.repeats_left is not None and job.repeats_left > 0:
                Repeat.schedule(job, started.queue, pipeline=pipeline)
            else:
                job.cleanup(result_ttl, pipeline=pipeline, remove_from_queue=False)
                job._status = JobStatus.FINISHED
            self._end(started, last, pipeline)

        def release(pipeline: Pipeline) -> None:
            nonlocal ready
            ready = started.queue.move_dependents_to_ready(job, pipeline=pipeline)

        guarded = Guarded(job.key, worker.name, write, job.dependents_key)
        ((verdict, _),) = carry_out(self._connection, [guarded])
        if verdict == Verdict.REFUSED:
            return False
        if verdict == Verdict.HAS_DEPENDENTS:
            if not self._watching(started, release, write):
                return False
            started.queue.enqueue_ready_jobs_by_queue(ready)
        release_slot(job)
        return True

    def fail(
        self, started: Started, reason: str, last: Piece | None, partial: Any = None, stopped: bool = False
    ) -> bool:
        """Write a job's failure, or put it back into its queue if it has retries left.

        Args:
            reason: what RQ keeps as `exc_string`.
            partial: a result of what had been generated, kept in the job's metadata.
            stopped: on request: RQ's status is then `stopped`, and nothing is retried.

        Returns:
            False if it is not this worker's any more.
        """
        job, worker = started.job, self._worker
        retries_left = job.retries_left
        retry = job.should_retry and not stopped

        def write(pipeline: Pipeline) -> None:
            job.retries_left = retries_left
            job.ended_at = utc_now()
            if partial is not None:
                self._keep_partial(job, partial, pipeline)
            if retry:
                _retry(started, pipeline)
            else:
                job.set_status(JobStatus.STOPPED if stopped else JobStatus.FAILED, pipeline=pipeline)
                job._handle_failure(reason, pipeline=pipeline, worker_name=worker.name, **_execution(started))
            worker.increment_failed_job_count(pipeline)
            self._count_time(job, pipeline)
            self._end(started, None if retry else last, pipeline)

        ((verdict, _),) = carry_out(self._connection, [Guarded(job.key, worker.name, write)])
        if verdict != Verdict.DONE:
            return False
        if not retry:
            started.queue.enqueue_dependents(job)
        release_slot(job)
        return True

    def note_cancelled(self, started: Started, last: Piece | None, partial: Any) -> None:
        """Keep what had been generated of a job that somebody else has cancelled, and let go of it."""
        job = started.job
        with self._connection.pipeline() as pipeline:
            while True:
                try:
                    pipeline.watch(job.key)
                    status: Any = pipeline.hget(job.key, "status")
                    pipeline.multi()
                    if status == JobStatus.CANCELED.value.encode():
                        self._keep_partial(job, partial, pipeline)
                        pipeline.hset(job.key, "ended_at", utcformat(utc_now()))
                        # Readers take this for the sign that nothing more will come.
                        pipeline.hdel(job.key, "worker_name")
                    self._count_time(job, pipeline)
                    self._end(started, last, pipeline)
                    pipeline.execute()
                    return
                except WatchError:
                    continue

    def give_back(self, everything: Iterable[Started]) -> list[str]:
        """Put jobs back to the front of their queues, as if they had never been taken. Returns the ids of those put."""
        worker = self._worker
        # The one that was taken first is to stand in front.
        backwards = sorted(everything, key=lambda started: started.execution.created_at, reverse=True)
        with self._connection.pipeline() as pipeline:
            for started in backwards:
                pipeline.eval(_GIVE_BACK, 2, started.job.key, started.queue.key, started.id, worker.name)
            for started in backwards:
                worker.cleanup_execution(started.job, pipeline=pipeline, execution=started.execution)
            replies = pipeline.execute()
        return [started.id for started, reply in zip(backwards, replies, strict=False) if reply][::-1]

    def keep_alive(self, everything: Sequence[Started]) -> None:
        """Heartbeats of started jobs; a job that was deleted meanwhile must not come into being again by them."""
        if not everything:
            return
        with self._connection.pipeline() as pipeline:
            beats = []
            for started in everything:
                job = started.job
                running = time.monotonic() - started.began_at
                ttl = int(self._worker.get_heartbeat_ttl(job, working_time=running))
                started.execution.heartbeat(job.started_job_registry, ttl, pipeline=pipeline)
                beats.append(len(pipeline))
                job.heartbeat(utc_now(), ttl, pipeline=pipeline, xx=True)
            replies = pipeline.execute()
            for started, at in zip(everything, beats, strict=True):
                if replies[at] == 1:  # a new field, so there was no hash
                    pipeline.delete(started.job.key)
            pipeline.execute()

    def _watching(self, started: Started, read: Callable[[Pipeline], None], write: Callable[[Pipeline], None]) -> bool:
        """The same in a transaction that first reads. Returns whether the job was this worker's."""
        job = started.job
        with self._connection.pipeline() as pipeline:
            while True:
                try:
                    pipeline.watch(job.key, job.dependents_key)
                    known: Any = pipeline.hmget(job.key, "status", "worker_name")
                    if known != [JobStatus.STARTED.value.encode(), self._worker.name.encode()]:
                        return False
                    read(pipeline)
                    if not pipeline.explicit_transaction:
                        pipeline.multi()
                    write(pipeline)
                    pipeline.execute()
                    return True
                except WatchError:
                    pipeline.reset()

    def _end(self, started: Started, last: Piece | None, pipeline: Pipeline) -> None:
        self._worker.cleanup_execution(started.job, pipeline=pipeline, execution=started.execution)
        if last is not None:
            key = stream_key(started.id)
            if last.text:
                pipeline.xadd(key, piece_to_entry(last))
            pipeline.xadd(key, end_entry(started.attempt))
            pipeline.expire(key, STREAM_TTL_SECONDS)

    def _count_time(self, job: GenerationJob, pipeline: Pipeline) -> None:
        if job.started_at is not None:
            seconds = (job.ended_at or utc_now()) - job.started_at
            self._worker.increment_total_working_time(max(seconds, timedelta()), pipeline)

    def _keep_partial(self, job: GenerationJob, partial: Any, pipeline: Pipeline) -> None:
        meta = job.meta if isinstance(job.meta, dict) and "unserialized" not in job.meta else {}
        job.meta = {**meta, PARTIAL_META: partial}
        pipeline.hset(job.key, "meta", job.serializer.dumps(job.meta))


def _execution(started: Started) -> dict[str, Any]:
    execution = started.execution
    return {
        "execution_id": execution.id,
        "execution_started_at": execution.created_at,
        "execution_ended_at": started.job.ended_at,
    }


def _retry(started: Started, pipeline: Pipeline) -> None:
    """As `Job.retry`, which writes the status past the pipeline, and so breaks the transaction that watches it."""
    job, queue = started.job, started.queue
    interval = job.get_retry_interval()
    job.retries_left = (job.retries_left or 1) - 1
    if interval:
        job.set_status(JobStatus.SCHEDULED, pipeline=pipeline)
        queue.schedule_job(job, utc_now() + timedelta(seconds=interval), pipeline=pipeline)
    else:
        queue._enqueue_job(job, pipeline=pipeline, at_front=job.enqueue_at_front_on_retry)
