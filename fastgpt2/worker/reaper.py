"""Taking jobs back from a worker that died: to the front of their queues, or given up if workers die of them."""

from __future__ import annotations

import logging
import queue as thread_queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution
from rq.job import JobStatus
from rq.utils import as_text, utcformat
from rq.utils import now as utc_now

from fastgpt2.errors import FastGPT2Error, PoisonJob
from fastgpt2.process import stop_signals_held
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import (
    ATTEMPTS_FIELD,
    CRASHES_FIELD,
    EXECUTION_FIELD,
    POISON,
    claimed_key,
    ended_field,
    leases_key,
    queues_of,
    restarts_field,
    stream_key,
    totals_key,
)
from fastgpt2.protocol.messages import STREAM_TTL_SECONDS, end_entry
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import JSONOnlySerializer, is_of_entry
from fastgpt2.worker.fencing import Held, Verdict, carry_out
from fastgpt2.worker.rq_job import GenerationJob, fail_malformed, recorded

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")

# A job that so many workers died of is given up. Before the last two times it was alone with them.
MAX_CRASHES = 4

# A worker whose lease lapsed so long ago, and that holds nothing, will not claim anything any more.
FORGET_SECONDS = 60.0

_REAP = Script(__file__, "reap")
_COUNT_ONE = Script(__file__, "count_one")


@dataclass(frozen=True, slots=True)
class Reaped:
    """What became of the jobs that a dead worker had in its hands: their ids; and how many it had finished before."""

    put_back: list[str]
    given_up: list[str]
    settled: list[str]
    finished: int

    def __bool__(self) -> bool:
        return bool(self.put_back or self.given_up or self.settled)


class Reaper:
    """Takes jobs back from dead workers of a pool, for whoever notices that they are dead.

    Each worker is dealt with by one script, so that two reapers cannot both take a job back, and one that dies itself
    leaves nothing half done: what a script cannot do stays in the dead worker's list until it is done.

    Args:
        queue: the name of the pool's queue.
    """

    def __init__(self, connection: Redis, queue: str) -> None:
        self._connection = connection
        self._leases_key, self._totals_key = leases_key(queue), totals_key(queue)
        self._queues = [Queue(name, connection, serializer=JSONOnlySerializer) for name in queues_of(queue)]

    def reap(self, worker_name: str, leased: str = "") -> Reaped | None:
        """Take back what a worker has in its hands.

        Args:
            leased: what stands in its lapsed lease; without it, the worker's process is known to have ended.

        Returns:
            None if the worker has been heard of since, or somebody else was first.

        Raises:
            RedisError: Redis cannot be reached, or takes no commands.
        """
        keys = [self._leases_key]
        for queue in self._queues:
            keys += (queue.key, claimed_key(worker_name, queue.name))
        limits = MAX_CRASHES, int(FORGET_SECONDS * 1000)
        names = [queue.name for queue in self._queues]
        arguments = worker_name, leased, *limits, utcformat(utc_now()), self._totals_key, *names
        reply = _REAP.run(self._connection, keys, arguments)
        if not reply[0]:
            return None
        put_back, poison, over = ([as_text(job_id) for job_id in ids] for ids in reply[1:4])
        for queue in self._queues:
            key = claimed_key(worker_name, queue.name)
            for job_id in {as_text(job_id) for job_id in self._connection.lrange(key, 0, -1)} if poison or over else ():
                if job_id in poison:
                    self._give_up(queue, job_id, worker_name)
                if job_id in poison or job_id in over:
                    settle(queue, job_id, key)
        if leased == "" and (poison or over):
            self._connection.zrem(self._leases_key, worker_name)
        reaped = Reaped(put_back, poison, over, int(reply[4]))
        if reaped:
            log.warning(
                "worker %s is dead: %d of its jobs put back to the front of the queue%s",
                *(worker_name, len(put_back), f", {len(poison)} given up: {', '.join(poison)}" if poison else ""),
            )
        return reaped

    def _give_up(self, queue: Queue, job_id: str, worker_name: str) -> None:
        """Fail a job that too many workers died of."""
        job = GenerationJob(job_id, connection=self._connection, serializer=JSONOnlySerializer)
        fields: Any = self._connection.hgetall(job.key)
        try:
            crashes = int(fields.get(CRASHES_FIELD.encode(), 0))
            attempt = int(fields.get(ATTEMPTS_FIELD.encode(), 1))
            execution_id = as_text(fields.get(EXECUTION_FIELD.encode(), b""))
            job.restore(fields)
            job.origin = queue.name
        except Exception as reason:  # whatever RQ's parsing meets
            self._fail_malformed(queue, job_id, reason, worker_name)
            return
        error = PoisonJob(
            job_id,
            f"{crashes} workers died while they ran it, the last of them while they ran nothing else; it is not tried "
            "again (each worker's log, or the kernel's if memory ran out, may say why)",
        )
        execution = Execution(execution_id, job_id, self._connection, worker_name)

        def write(pipeline: Pipeline) -> None:
            job.ended_at = utc_now()
            job.set_status(JobStatus.FAILED, pipeline=pipeline)
            job._handle_failure(recorded(error), pipeline=pipeline, worker_name=worker_name)
            execution.delete(job, pipeline)
            pipeline.xadd(stream_key(job_id), end_entry(attempt), nomkstream=True)
            pipeline.expire(stream_key(job_id), STREAM_TTL_SECONDS)

        ((verdict, reply),) = carry_out(self._connection, [Held(job.key, worker_name, execution_id, write)])
        if verdict == Verdict.MALFORMED:
            self._fail_malformed(queue, job_id, reply, worker_name)
        elif verdict == Verdict.DONE:
            self.count(ended_field(*POISON))
        log.error("job %s %s: %s", job_id, PoisonJob.how, error.reason)

    def _fail_malformed(self, queue: Queue, job_id: str, reason: Exception, worker_name: str) -> None:
        fail_malformed(queue, job_id, reason, worker_name, claimed_key(worker_name, queue.name))
        self.count(ended_field("failed", "malformed"))

    def count(self, field: str) -> None:
        """Add one to the pool's totals.

        Raises:
            RedisError
        """
        _COUNT_ONE.run(self._connection, [self._totals_key], [field])


def settle(queue: Queue, job_id: str, taken: str) -> None:
    """Do what follows from a job's end, release those that wait for it, and then let go of it.

    May be done twice.
    """
    job = GenerationJob(job_id, connection=queue.connection, serializer=JSONOnlySerializer)
    try:
        if queue.connection.exists(job.dependents_key):
            job.restore(queue.connection.hgetall(job.key))
            queue.enqueue_dependents(job)
    except RedisError as reason:
        if not is_of_entry(reason):
            raise
        log.warning("what waits for job %s cannot be released (%s)", job_id, reason)
    except Exception:  # an entry that RQ cannot read, of this job or of one that waits for it
        log.warning("what waits for job %s cannot be released", job_id, exc_info=True)
    queue.connection.lrem(taken, 1, job_id)


# NOTE worker.background_reaper: A supervisor's talk with Redis, in a thread of its own: supervising goes on while
# Redis is away.
RETRY_SECONDS = 1.0


class BackgroundReaper:
    """A thread that takes back the jobs of processes that have ended, and counts those that are started again, as soon
    as Redis can be reached.

    Args:
        redis_url, queue: where the jobs are.
        told: called, in the thread, with the name of each, whether it had jobs in its hands, and how many it had
            finished.
    """

    def __init__(self, redis_url: str, queue: str, told: Callable[[str, bool, int], None]) -> None:
        self._told = told
        self._connection = connect(redis_url)
        self._reaper = Reaper(self._connection, queue)
        self._tasks: thread_queue.SimpleQueue[Callable[[], bool] | None] = thread_queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        with stop_signals_held():  # they are the main thread's, which may hold them back
            self._thread.start()

    def reap(self, worker_name: str) -> None:
        """Soon, in the thread."""
        self._tasks.put(partial(self._reaped, worker_name))

    def count_restart(self, reason: str) -> None:
        """Soon, in the thread; see `measures.RESTARTS`."""
        self._tasks.put(partial(self._counted, restarts_field(reason)))

    def close(self, patience: float) -> None:
        """Finish what there is to do, within so many seconds."""
        self._ending.set()
        self._tasks.put(None)
        self._thread.join(timeout=patience)
        self._connection.close()

    def _run(self) -> None:
        while (done := self._tasks.get()) is not None:
            while not done():
                # Told to end, it tries once more, so that it ends although Redis is away.
                if self._ending.wait(RETRY_SECONDS) and not done():
                    return

    def _reaped(self, name: str) -> bool:
        try:
            reaped = self._reaper.reap(name)
            if reaped is not None:
                self._told(name, bool(reaped), reaped.finished)
        except (RedisError, FastGPT2Error) as reason:
            log.warning("the jobs of the dead worker %s cannot be taken back yet (%s)", name, reason)
            return False
        except Exception:
            log.exception("the jobs of the dead worker %s cannot be taken back", name)
        return True

    def _counted(self, field: str) -> bool:
        try:
            self._reaper.count(field)
        except RedisError:
            return False
        return True
