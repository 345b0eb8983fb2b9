"""The ledger of a worker's jobs, written into Redis as RQ writes it: started, finished, failed, cancelled, given back.

The one place that knows these internals of RQ 3.0, and for many jobs a worker. An end is written only if Redis still
has the job as started by this worker, in this execution: who cancelled or deleted the job meanwhile is not overruled,
and a worker that was taken for dead comes too late.
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
from rq.repeat import Repeat
from rq.utils import as_text, utcformat
from rq.utils import now as utc_now
from rq.worker import BaseWorker, WorkerStatus

from fastgpt2.engine.decoding.records import Usage
from fastgpt2.events import about
from fastgpt2.protocol import keys
from fastgpt2.protocol.messages import STREAM_TTL_SECONDS, Piece, end_entry, piece_to_entry
from fastgpt2.protocol.scripts import Script
from fastgpt2.worker.aftermath import ENDED, complete, free_slot
from fastgpt2.worker.batch import Attempt, End, EndKind
from fastgpt2.worker.claims import Claim
from fastgpt2.worker.fencing import IfClaimed, IfRunning, Verdict, run_fenced
from fastgpt2.worker.registration import GRACE_SECONDS
from fastgpt2.worker.rq_job import GenerationJob, describe_error, fail_malformed, fetch
from fastgpt2.worker.set_aside import shown, unclaim
from fastgpt2.worker.unfit import execute_what_fits

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
_LET_GO = Script(__file__, "let_go")

# The statuses of a job that this worker may start: that it has as started is so if the answer to a start was lost.
_STARTABLE = (JobStatus.QUEUED, JobStatus.STARTED)


class Ledger:
    """The ledger writes into Redis what becomes of one worker's jobs.

    Args:
        pool: the name of the pool's queue.
        malformed: called with the id of each job that was failed for the state of its entry.
    """

    def __init__(self, worker: BaseWorker, pool: str, malformed: Callable[[str], None]) -> None:
        self._worker = worker
        self._pool = pool
        self._malformed = malformed
        self._connection = worker.connection

    def read(self, claims: Sequence[Claim]) -> list[Attempt]:
        """Fetch claimed jobs and return those that may be started.

        Those that cannot be read are failed; those that have ended, are cancelled or are gone are let go of.
        """
        found: list[Attempt] = []
        jobs = fetch(self._connection, [job_id for _, job_id in claims], self._worker.serializer)
        for (queue, job_id), job in zip(claims, jobs, strict=True):
            if isinstance(job, Exception):
                self.fail_malformed(queue, job_id, job)
            elif job is None or job.get_status(refresh=False) not in _STARTABLE:
                complete(queue, job_id, self._claimed_key(queue), None if job is None else _limit_of(job))
            else:
                execution = Execution("", job_id, self._connection)
                found.append(Attempt(job_id, job, queue, execution, time.monotonic()))
        return found

    def fail_malformed(self, queue: Queue, job_id: str, reason: BaseException) -> None:
        """Fail a claimed or running job that RQ cannot fail, for the state of its entry."""
        error = fail_malformed(queue, job_id, reason, self._worker.name, self._claimed_key(queue))
        free_slot(self._connection, job_id)
        log.warning("%s: job %s failed: %s", self._worker.name, shown(job_id), error, extra=about(job_id=job_id))
        self._malformed(job_id)

    def start(self, attempts: list[Attempt]) -> list[Attempt]:
        """Write that claimed jobs are started. Return those that are: not what was cancelled meanwhile."""
        if not attempts:
            return []
        fenced = []
        for attempt in attempts:
            job, queue, write = attempt.rq_job, attempt.queue, bound(self._add_start, attempt)
            fenced.append(IfClaimed(job.key, self._worker.name, self._claimed_key(queue), job.id, queue.name, write))
        started = []
        for attempt, (verdict, reply) in zip(attempts, run_fenced(self._connection, fenced), strict=True):
            if verdict == Verdict.DONE:
                attempt.number = int(reply)
                self._worker.executions[attempt.execution.id] = attempt.execution
                started.append(attempt)
            elif verdict == Verdict.MALFORMED:
                self.fail_malformed(attempt.queue, attempt.id, reply)
            else:  # cancelled, deleted, or started elsewhere since it was read
                free_slot(self._connection, attempt.id, _limit_of(attempt.rq_job))
                self._unclaim(attempt.queue, attempt.id)
        return started

    def _add_start(self, attempt: Attempt, pipeline: Pipeline) -> None:
        job, queue, worker = attempt.rq_job, attempt.queue, self._worker
        job.origin = queue.name
        ttl = worker.get_heartbeat_ttl(job)
        attempt.execution = Execution.create(job, ttl, pipeline=pipeline, worker_name=worker.name)
        job.prepare_for_execution(worker.name, pipeline=pipeline)
        pipeline.persist(job.key)
        pipeline.hset(job.key, keys.EXECUTION_FIELD, attempt.execution.id)
        # A job that was cancelled and enqueued again is still among the cancelled.
        pipeline.zrem(keys.registry_key("canceled", queue.name), job.id)
        worker.set_state(WorkerStatus.BUSY, pipeline=pipeline)
        self._let_worker_expire(pipeline)
        pipeline.hincrby(job.key, keys.ATTEMPTS_FIELD, 1)

    def write(self, end: End) -> bool:
        """Write how a job ends, or put it back into its queue if it is to run again.

        Returns:
            False if the job is not this worker's any more: cancelled, deleted, or taken back.

        Raises:
            RedisError: Redis cannot be reached or takes no commands, or a key of the job is of the wrong kind.
        """
        if end.kind in (EndKind.CANCELED, EndKind.LOST):
            return False
        attempt, job = end.attempt, end.attempt.rq_job
        fails = end.kind in (EndKind.FAILED, EndKind.STOPPED)
        dependents_key = job.dependents_key if end.kind == EndKind.FINISHED else None
        job.rewind()
        # A job that fails, or has a slot to free, leaves this worker's list last of all; others with their end.
        leaves = not fails and (not job.has_rate_limit or _runs_again_at_once(end))
        fenced = self._if_running(attempt, bound(self._add_end, end, leaves), dependents_key)
        ((verdict, reply),) = run_fenced(self._connection, [fenced])
        if verdict == Verdict.MALFORMED:
            raise reply
        ready = self._write_and_move_dependents(end) if verdict == Verdict.HAS_DEPENDENTS else None
        if verdict != Verdict.DONE and ready is None:
            return False
        if fails:
            complete(attempt.queue, job.id, self._claimed_key(attempt.queue), _limit_of(job))
        elif ready is not None or not leaves:
            attempt.queue.enqueue_ready_jobs_by_queue(ready or {})
            free_slot(self._connection, job.id, _limit_of(job))
            self._unclaim(attempt.queue, job.id)
        return True

    def _write_and_move_dependents(self, end: End) -> dict[str, list[str]] | None:
        """Write a result in a transaction that first reads which jobs wait for it.

        Returns:
            The ids of those that are ready now, by the names of their queues; None if the job is not this worker's.
        """
        attempt = end.attempt
        job = attempt.rq_job
        expected = JobStatus.STARTED.value, self._worker.name, attempt.execution.id
        with self._connection.pipeline() as pipeline:
            while True:
                try:
                    pipeline.watch(job.key, job.dependents_key)
                    known: Any = pipeline.hmget(job.key, "status", "worker_name", keys.EXECUTION_FIELD)
                    if known != [word.encode() for word in expected]:
                        return None
                    ready = attempt.queue.move_dependents_to_ready(job, pipeline=pipeline)
                    if not pipeline.explicit_transaction:
                        pipeline.multi()
                    self._add_end(end, False, pipeline)
                    pipeline.execute()
                    return ready
                except WatchError:
                    pipeline.reset()

    def _if_running(
        self, attempt: Attempt, write: Callable[[Pipeline], None], dependents_key: str | None = None
    ) -> IfRunning:
        return IfRunning(attempt.rq_job.key, self._worker.name, attempt.execution.id, write, dependents_key)

    def _add_end(self, end: End, unclaim: bool, pipeline: Pipeline) -> None:
        """Add what RQ writes of an end, and the end of the job's stream; with `unclaim`, take the job off the list."""
        attempt, worker, job = end.attempt, self._worker, end.attempt.rq_job
        job.rewind()
        job.ended_at = utc_now()
        execution: dict[str, Any] = {
            "worker_name": worker.name,
            "execution_id": attempt.execution.id,
            "execution_started_at": attempt.execution.created_at,
            "execution_ended_at": job.ended_at,
        }
        if end.partial is not None:
            pipeline.hset(job.key, "meta", _meta_with(job, end.partial))
        match end.kind:
            case EndKind.FINISHED:
                self._add_success(end, execution, pipeline)
            case EndKind.RETRIED:
                _add_retry(attempt, pipeline)
                worker.increment_failed_job_count(pipeline)
            case _:
                assert end.error is not None
                status = JobStatus.STOPPED if end.kind == EndKind.STOPPED else JobStatus.FAILED
                job.set_status(status, pipeline=pipeline)
                job._handle_failure(describe_error(end.error), pipeline=pipeline, **execution)
                worker.increment_failed_job_count(pipeline)
        self._add_end_of_execution(attempt, end.last_pieces, pipeline)
        self._add_usage(end, pipeline)
        if unclaim:
            pipeline.lrem(self._claimed_key(attempt.queue), 1, job.id)

    def _add_success(self, end: End, execution: dict[str, Any], pipeline: Pipeline) -> None:
        attempt, worker, job = end.attempt, self._worker, end.attempt.rq_job
        job._result = end.result
        job._status = JobStatus.FINISHED
        worker.increment_successful_job_count(pipeline=pipeline)
        result_ttl = job.get_result_ttl(worker.default_result_ttl)
        if result_ttl != 0:
            job._handle_success(result_ttl, pipeline=pipeline, **execution)
        if job.repeats_left is not None and job.repeats_left > 0:
            Repeat.schedule(job, attempt.queue, pipeline=pipeline)
        else:
            job.cleanup(result_ttl, pipeline=pipeline, remove_from_queue=False)
            job._status = JobStatus.FINISHED

    def let_go(self, end: End, last_pieces: Sequence[Piece] | None, partial: dict[str, Any]) -> EndKind:
        """Let go of a job whose end could not be written; what had been generated is kept if it was cancelled.

        Args:
            last_pieces: what the job's stream ends with if the job was cancelled; None if it has no stream.
            partial: the JSON of a result of what had been generated.

        Returns:
            CANCELED; LOST if the job was deleted or taken back; the kind of the end itself if this worker had written
            it, but never heard that it was written.
        """
        attempt, job, claimed = end.attempt, end.attempt.rq_job, self._claimed_key(end.attempt.queue)
        fields = ("ended_at", utcformat(utc_now()), "meta", _meta_with(job, partial))
        status = as_text(_LET_GO.run(self._connection, [job.key], [attempt.execution.id, *fields]))
        kind = EndKind.LOST
        if status == JobStatus.CANCELED:
            kind = EndKind.CANCELED
        elif status in ENDED:
            kind = end.kind
        # If the job was taken back, what stands in the list may be a later claim, and stays.
        is_over = bool(status) and status not in _STARTABLE
        with self._connection.pipeline() as pipeline:
            self._add_end_of_execution(attempt, last_pieces if kind == EndKind.CANCELED else None, pipeline)
            if kind == EndKind.CANCELED:
                self._add_usage(end, pipeline)
            if is_over and status not in ENDED and not job.has_rate_limit:
                pipeline.lrem(claimed, 1, job.id)
            execute_what_fits(pipeline)
        if is_over and (status in ENDED or job.has_rate_limit):
            # Only now: RQ holds a slot for as long as the execution is there.
            complete(attempt.queue, job.id, claimed, _limit_of(job))
        return kind

    def give_back(self, attempts: Iterable[Attempt], crashed: bool = False) -> set[str]:
        """Put running jobs back to the front of their queues, as if they had never been claimed.

        Args:
            crashed: it is the work on them that failed, and one of them may be the cause.

        Returns:
            The ids of the jobs that were put back.
        """
        # The one that was claimed first is to stand in front.
        backwards = sorted(attempts, key=lambda attempt: attempt.execution.created_at, reverse=True)
        fenced = [self._if_running(attempt, bound(self._add_return, attempt, crashed)) for attempt in backwards]
        verdicts = run_fenced(self._connection, fenced)
        return {each.id for each, (verdict, _) in zip(backwards, verdicts, strict=True) if verdict == Verdict.DONE}

    def _add_return(self, attempt: Attempt, crashed: bool, pipeline: Pipeline) -> None:
        job, queue = attempt.rq_job, attempt.queue
        if crashed:
            pipeline.hincrby(job.key, keys.CRASHES_FIELD, 1)
        pipeline.hset(job.key, mapping={"status": JobStatus.QUEUED.value, "worker_name": "", "started_at": ""})
        pipeline.hdel(job.key, keys.EXECUTION_FIELD)
        if job.ttl and job.ttl > 0:  # how long it may wait; the start took that off
            pipeline.expire(job.key, job.ttl)
        self._worker.cleanup_execution(job, pipeline=pipeline, execution=attempt.execution)
        # If the queue's key is no list, the script ends here, and the job stays in this worker's list.
        pipeline.lpush(queue.key, job.id)
        pipeline.lrem(self._claimed_key(queue), 1, job.id)

    def keep_alive(self, attempts: Sequence[Attempt]) -> list[Attempt]:
        """Write heartbeats of running jobs.

        Returns:
            Those that are not this worker's any more: cancelled, deleted, or taken back.
        """
        fenced = [self._if_running(attempt, bound(self._add_heartbeat, attempt)) for attempt in attempts]
        verdicts = run_fenced(self._connection, fenced)
        return [attempt for attempt, (verdict, _) in zip(attempts, verdicts, strict=True) if verdict == Verdict.REFUSED]

    def _add_heartbeat(self, attempt: Attempt, pipeline: Pipeline) -> None:
        job = attempt.rq_job
        ttl = int(self._worker.get_heartbeat_ttl(job, working_time=time.monotonic() - attempt.began_at))
        attempt.execution.heartbeat(job.started_job_registry, ttl, pipeline=pipeline)
        job.heartbeat(utc_now(), ttl, pipeline=pipeline, xx=True)

    def _add_end_of_execution(self, attempt: Attempt, last_pieces: Sequence[Piece] | None, pipeline: Pipeline) -> None:
        """Add the time that the worker spent on the job, what RQ deletes of the execution, and the stream's end."""
        job = attempt.rq_job
        if job.started_at is not None:
            seconds = (job.ended_at or utc_now()) - job.started_at
            self._worker.increment_total_working_time(max(seconds, timedelta()), pipeline)
        self._let_worker_expire(pipeline)
        self._worker.cleanup_execution(job, pipeline=pipeline, execution=attempt.execution)
        if last_pieces is not None:
            key = keys.stream_key(attempt.id)
            for piece in last_pieces:
                pipeline.xadd(key, piece_to_entry(piece))
            pipeline.xadd(key, end_entry(attempt.number))
            pipeline.expire(key, STREAM_TTL_SECONDS)

    def _add_usage(self, end: End, pipeline: Pipeline) -> None:
        """Add what a job has used to the counts of the token by which it was enqueued, and to what its limits read."""
        token, usage = end.attempt.rq_job.token, end.usage or Usage(0, 0)
        if token is None:
            return
        totals = keys.token_totals_key(self._pool)
        pipeline.hincrby(totals, keys.token_totals_field(token, keys.PROMPT_TOKENS), usage.prompt_tokens)
        pipeline.hincrby(totals, keys.token_totals_field(token, keys.GENERATED_TOKENS), usage.completion_tokens)
        pipeline.expire(totals, keys.TOTALS_TTL_SECONDS)
        # The stream is there if the token has limits.
        entry: dict[Any, Any] = {"job": end.attempt.id, "tokens": usage.total_tokens}
        pipeline.xadd(keys.usage_key(self._pool, token), entry, nomkstream=True, maxlen=keys.MAX_USAGES)

    def _let_worker_expire(self, pipeline: Pipeline) -> None:
        """Add the expiry of the worker's hash, as a heartbeat sets it: what is written there may have made it anew."""
        pipeline.expire(self._worker.key, self._worker.worker_ttl + GRACE_SECONDS)

    def _unclaim(self, queue: Queue, job_id: str) -> None:
        unclaim(self._connection, self._claimed_key(queue), job_id)

    def _claimed_key(self, queue: Queue) -> str:
        return keys.claimed_key(self._worker.name, queue.name)


def _add_retry(attempt: Attempt, pipeline: Pipeline) -> None:
    """Add what `Job.retry` writes; it writes the status past the pipeline, where no fence stands before it."""
    job, queue = attempt.rq_job, attempt.queue
    interval = job.get_retry_interval()
    job.retries_left = (job.retries_left or 1) - 1
    if interval:
        job.set_status(JobStatus.SCHEDULED, pipeline=pipeline)
        queue.schedule_job(job, utc_now() + timedelta(seconds=interval), pipeline=pipeline)
    else:
        queue._enqueue_job(job, pipeline=pipeline, at_front=job.enqueue_at_front_on_retry)
    pipeline.hdel(job.key, keys.EXECUTION_FIELD)


def _runs_again_at_once(end: End) -> bool:
    """Tell whether a job goes back into its queue with its end: then it keeps its slot, and must not stay claimed."""
    job = end.attempt.rq_job
    if end.kind == EndKind.RETRIED:
        return not job.get_retry_interval()
    return bool(job.repeats_left) and not Repeat.get_interval(0, job.repeat_intervals or [0])


def _limit_of(job: GenerationJob) -> str:
    """Return the key of the job's rate limit; empty if it has none."""
    return str(job.rate_limit_key) if job.has_rate_limit else ""


def _meta_with(job: GenerationJob, partial: Any) -> bytes:
    """Return the job's metadata as RQ keeps it, with what had been generated."""
    meta = job.meta if isinstance(job.meta, dict) and "unserialized" not in job.meta else {}
    job.meta = {**meta, keys.PARTIAL_META: partial}
    written: bytes = job.serializer.dumps(job.meta)
    return written
