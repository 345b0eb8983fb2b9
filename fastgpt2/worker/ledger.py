"""What becomes of a job, written into Redis as RQ writes it: started, finished, failed, cancelled, given back.

The one place that knows these internals of RQ 3.0, and for many jobs a worker. An end is written only if Redis still
has the job as started by this worker, in this execution: who cancelled or deleted it meanwhile is not overruled, and
who was taken for dead comes too late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial as bound
from typing import TYPE_CHECKING, Any

from redis.exceptions import WatchError
from rq import Queue
from rq.executions import Execution
from rq.job import JobStatus
from rq.rate_limit import release_slot
from rq.registry import CanceledJobRegistry
from rq.repeat import Repeat
from rq.utils import now as utc_now
from rq.utils import utcformat
from rq.worker import BaseWorker, WorkerStatus

from fastgpt2.protocol.keys import ATTEMPTS_FIELD, EXECUTION_FIELD, PARTIAL_META, claimed_key, stream_key
from fastgpt2.protocol.messages import STREAM_TTL_SECONDS, Piece, end_entry, piece_to_entry
from fastgpt2.protocol.scripts import Script
from fastgpt2.worker.batch import Started
from fastgpt2.worker.claims import Claim
from fastgpt2.worker.fencing import Held, Taken, Verdict, carry_out
from fastgpt2.worker.reaper import settle
from fastgpt2.worker.rq_job import GenerationJob, fail_malformed, fetch

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
_OVER = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED)
_GIVE_BACK = Script(__file__, "give_back")
_LET_GO = Script(__file__, "let_go")


class Ledger:
    """Writes for one worker.

    Args:
        malformed: called with the id of each job that was failed for the state of its entry.
    """

    def __init__(self, worker: BaseWorker, malformed: Callable[[str], None]) -> None:
        self._worker = worker
        self._malformed = malformed
        self._connection = worker.connection

    def read(self, claims: Sequence[Claim]) -> list[Started]:
        """Fetch claimed jobs, not started yet. Those that cannot be read are failed; the cancelled are let go of."""
        found: list[Started] = []
        jobs = fetch(self._connection, [job_id for _, job_id in claims], self._worker.serializer)
        for (queue, job_id), job in zip(claims, jobs, strict=True):
            if isinstance(job, Exception):
                self.fail_malformed(queue, job_id, job)
            elif job is None or job.get_status(refresh=False) == JobStatus.CANCELED:
                self._connection.lrem(self._taken(queue), 1, job_id)
            elif job.get_status(refresh=False) in _OVER:
                settle(queue, job_id, self._taken(queue))
            else:
                execution = Execution("", job.id, self._connection)
                found.append(Started(job, queue, execution, 0, time.monotonic(), job.crashes))
        return found

    def fail_malformed(self, queue: Queue, job_id: str, reason: Exception) -> None:
        """Fail a claimed or started job that RQ cannot fail, for the state of its entry."""
        error = fail_malformed(queue, job_id, reason, self._worker.name, self._taken(queue))
        log.warning("%s: job %s failed: %s", self._worker.name, job_id, error)
        self._malformed(job_id)

    def start(self, everything: list[Started]) -> list[Started]:
        """Note that claimed jobs have been started. Returns those that have: not what was cancelled meanwhile."""
        if not everything:
            return []
        name = self._worker.name
        guarded = [
            Taken(each.job.key, name, self._taken(each.queue), each.id, each.queue.name, bound(self._begin, each))
            for each in everything
        ]
        started = []
        for each, (verdict, attempt) in zip(everything, carry_out(self._connection, guarded), strict=True):
            if verdict == Verdict.DONE:
                each.attempt = int(attempt)
                self._worker.executions[each.execution.id] = each.execution
                started.append(each)
            elif verdict == Verdict.MALFORMED:
                self.fail_malformed(each.queue, each.id, attempt)
            else:  # cancelled, deleted, or started elsewhere since it was read
                self._connection.lrem(self._taken(each.queue), 1, each.id)
        return started

    def _taken(self, queue: Queue) -> str:
        return claimed_key(self._worker.name, queue.name)

    def _begin(self, started: Started, pipeline: Pipeline) -> None:
        job, queue, worker = started.job, started.queue, self._worker
        job.origin = queue.name
        ttl = worker.get_heartbeat_ttl(job)
        started.execution = Execution.create(job, ttl, pipeline=pipeline, worker_name=worker.name)
        job.prepare_for_execution(worker.name, pipeline=pipeline)
        pipeline.persist(job.key)
        pipeline.hset(job.key, EXECUTION_FIELD, started.execution.id)
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

        def write_and_let_go(pipeline: Pipeline) -> None:
            write(pipeline)
            pipeline.lrem(self._taken(started.queue), 1, job.id)

        held = Held(job.key, worker.name, started.execution.id, write_and_let_go, job.dependents_key)
        ((verdict, reply),) = carry_out(self._connection, [held])
        if verdict == Verdict.MALFORMED:
            raise reply
        if verdict == Verdict.REFUSED:
            return False
        if verdict == Verdict.HAS_DEPENDENTS:
            if not self._watching(started, release, write):
                return False
            started.queue.enqueue_ready_jobs_by_queue(ready)
            # Last: should this worker die before, whoever finds the job in its list releases those that wait for it.
            self._connection.lrem(self._taken(started.queue), 1, job.id)
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
            if retry:
                pipeline.hdel(job.key, EXECUTION_FIELD)
                pipeline.lrem(self._taken(started.queue), 1, job.id)

        held = Held(job.key, worker.name, started.execution.id, write)
        ((verdict, reply),) = carry_out(self._connection, [held])
        if verdict == Verdict.MALFORMED:
            raise reply
        if verdict != Verdict.DONE:
            return False
        if not retry:
            settle(started.queue, job.id, self._taken(started.queue))
        release_slot(job)
        return True

    def let_go(self, started: Started, last: Piece | None, partial: Any) -> JobStatus | None:
        """Let go of a job that is not this worker's to end; what had been generated is kept if it was cancelled.

        Returns:
            Its status: cancelled, or over if its end was written by this worker, but not heard of. None if it is gone,
            or was taken back.
        """
        job, queue = started.job, started.queue
        keys = job.key, self._taken(queue)
        fields = ("ended_at", utcformat(utc_now()), "meta", self._with_partial(job, partial))
        status = _LET_GO.run(self._connection, keys, [started.id, started.execution.id, *fields])
        if over := next((each for each in _OVER if status == each.value.encode()), None):
            settle(queue, started.id, self._taken(queue))
        with self._connection.pipeline() as pipeline:
            self._count_time(job, pipeline)
            self._end(started, last if status == b"canceled" else None, pipeline)
            pipeline.execute()
        return JobStatus.CANCELED if status == b"canceled" else over

    def give_back(self, everything: Iterable[Started], crashed: bool = False) -> list[str]:
        """Put jobs back to the front of their queues, as if they had never been taken. Returns the ids of those put.

        Args:
            crashed: it is the work on them that failed, and one of them may be the cause.
        """
        worker = self._worker
        # The one that was taken first is to stand in front.
        backwards = sorted(everything, key=lambda started: started.execution.created_at, reverse=True)
        with self._connection.pipeline() as pipeline:
            for started in backwards:
                keys = started.job.key, started.queue.key, self._taken(started.queue)
                words = started.id, worker.name, started.execution.id, int(crashed)
                _GIVE_BACK.add_to_transaction(pipeline, keys, words)
            for started in backwards:
                worker.cleanup_execution(started.job, pipeline=pipeline, execution=started.execution)
            replies = pipeline.execute()
        return [started.id for started, reply in zip(backwards, replies, strict=False) if reply][::-1]

    def keep_alive(self, everything: Sequence[Started]) -> list[Started]:
        """Heartbeats of started jobs. Returns those that are not this worker's any more: cancelled, deleted, lost."""
        held = [
            Held(each.job.key, self._worker.name, each.execution.id, bound(self._beat, each)) for each in everything
        ]
        verdicts = carry_out(self._connection, held) if held else []
        return [each for each, (verdict, _) in zip(everything, verdicts, strict=True) if verdict == Verdict.REFUSED]

    def _beat(self, started: Started, pipeline: Pipeline) -> None:
        job = started.job
        ttl = int(self._worker.get_heartbeat_ttl(job, working_time=time.monotonic() - started.began_at))
        started.execution.heartbeat(job.started_job_registry, ttl, pipeline=pipeline)
        job.heartbeat(utc_now(), ttl, pipeline=pipeline, xx=True)

    def _watching(self, started: Started, read: Callable[[Pipeline], None], write: Callable[[Pipeline], None]) -> bool:
        """The same in a transaction that first reads. Returns whether the job was this worker's."""
        job = started.job
        with self._connection.pipeline() as pipeline:
            while True:
                try:
                    pipeline.watch(job.key, job.dependents_key)
                    known: Any = pipeline.hmget(job.key, "status", "worker_name", EXECUTION_FIELD)
                    mine = JobStatus.STARTED.value, self._worker.name, started.execution.id
                    if known != [word.encode() for word in mine]:
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
        pipeline.hset(job.key, "meta", self._with_partial(job, partial))

    def _with_partial(self, job: GenerationJob, partial: Any) -> bytes:
        """The job's metadata as RQ keeps it, with what had been generated."""
        meta = job.meta if isinstance(job.meta, dict) and "unserialized" not in job.meta else {}
        job.meta = {**meta, PARTIAL_META: partial}
        written: bytes = job.serializer.dumps(job.meta)
        return written


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
