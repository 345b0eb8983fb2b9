"""Taking jobs back from a worker that died: to the front of their queues, or given up if workers die of them."""

from __future__ import annotations

import logging
import queue as thread_queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bound
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution
from rq.job import JobStatus
from rq.utils import as_text, utcformat
from rq.utils import now as utc_now

from fastgpt2.errors import FastGPT2Error, PoisonJob
from fastgpt2.events import about
from fastgpt2.process import stop_signals_held
from fastgpt2.protocol import keys
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.messages import STREAM_TTL_SECONDS, end_entry
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import JSONOnlySerializer, check_replies, read_model_list, read_model_names
from fastgpt2.worker.aftermath import complete, free_slot
from fastgpt2.worker.fencing import IfRunning, Verdict, run_fenced
from fastgpt2.worker.rq_job import GenerationJob, describe_error, fail_malformed
from fastgpt2.worker.set_aside import set_aside

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")

# A job that this many workers died of is given up. The last two times no other job ran beside it.
MAX_CRASHES = 4

# A worker whose lease lapsed this long ago, and that has no jobs, will not claim any more.
FORGET_SECONDS = 60.0

# How long the supervisor's thread waits before it tries again what Redis did not take.
RETRY_SECONDS = 1.0
_REAP = Script(__file__, "reap")
_COUNT_ONE = Script(__file__, "count_one")


@dataclass(frozen=True, slots=True)
class Recovery:
    """The recovery of the jobs that a dead worker had.

    Attributes:
        put_back: the ids of the jobs that went back to the front of their queues.
        given_up: the ids of the jobs that too many workers have died of.
        released: the ids of the jobs that had ended; those that wait for them, or for their slots, are released.
        finished: how many jobs the worker had finished in its life.
    """

    put_back: list[str]
    given_up: list[str]
    released: list[str]
    finished: int

    def __bool__(self) -> bool:
        """Tell whether the worker had any jobs."""
        return bool(self.put_back or self.given_up or self.released)


class Reaper:
    """A reaper takes jobs back from dead workers of a pool, for whoever notices that they are dead.

    Each worker is dealt with by one script, so that two reapers cannot both take a job back, and one that dies itself
    leaves nothing half done: what a script cannot do stays in the dead worker's list until it is done.

    Args:
        queue: the name of the pool's queue.
    """

    def __init__(self, connection: Redis, queue: str) -> None:
        self._connection = connection
        self._leases_key, self._totals_key = keys.leases_key(queue), keys.totals_key(queue)
        self._queue = queue

    def reap(self, worker_name: str, leased: str = "") -> Recovery | None:
        """Take back the jobs that a worker has claimed or runs.

        Args:
            leased: what stands in its lapsed lease; without it, the worker's process is known to have ended.

        Returns:
            None if the worker has been heard of since, or somebody else was first.
        """
        queues = self._list_queues(worker_name)
        names, of_script = [queue.name for queue in queues], [self._leases_key]
        for queue in queues:
            of_script += (queue.key, keys.claimed_key(worker_name, queue.name))
        limits = MAX_CRASHES, int(FORGET_SECONDS * 1000)
        arguments = worker_name, leased, *limits, utcformat(utc_now()), self._totals_key, *names
        reply = _REAP.run(self._connection, of_script, arguments)
        if not reply[0]:
            return None
        put_back, poison, ended = ([job_id.decode("utf-8", "backslashreplace") for job_id in ids] for ids in reply[1:4])
        if poison or ended:
            self._complete(queues, worker_name, poison, ended)
            if leased == "":
                self._connection.zrem(self._leases_key, worker_name)
        recovery = Recovery(put_back, poison, ended, int(reply[4]))
        if put_back or poison:
            given_up = f", {len(poison)} given up: {', '.join(poison)}" if poison else ""
            message = "worker %s is dead: %d of its jobs put back to the front of the queue%s"
            log.warning(message, worker_name, len(put_back), given_up[:2000])
        return recovery

    def _list_queues(self, worker_name: str) -> list[Queue]:
        """Return all queues of the pool, those that the worker's hash tells of among them: Redis may lack its names.

        Whatever model the worker served, its jobs are in lists of one of these.
        """
        with self._connection.pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*keys.list_models(self._queue))  # type: ignore[no-untyped-call]
            pipeline.hget(f"{keys.WORKER_PREFIX}{worker_name}", keys.MODELS_FIELD)
            found, own = check_replies(pipeline.execute(raise_on_error=False))
        models = sorted({*read_model_names(found), *read_model_list(own)[: keys.MAX_MODELS_OF_WORKER]})
        options: dict[str, Any] = {"job_class": GenerationJob, "serializer": JSONOnlySerializer}
        return [Queue(name, self._connection, **options) for name in keys.queues_of(self._queue, models)]

    def _complete(self, queues: list[Queue], worker_name: str, poison: list[str], ended: list[str]) -> None:
        """Do what the script cannot: fail the jobs that are given up, and what follows from their end and others'."""
        for queue in queues:
            key = keys.claimed_key(worker_name, queue.name)
            entries: Any = self._connection.lrange(key, 0, -1)
            for raw in set(entries):
                try:
                    job_id = as_text(raw)
                except UnicodeDecodeError:
                    set_aside(queue, raw, "an entry that can be no job's id: it is no text in UTF-8", worker_name)
                    continue
                if job_id in poison:
                    self._give_up(queue, job_id, worker_name)
                if job_id in poison or job_id in ended:
                    complete(queue, job_id, key)

    def _give_up(self, queue: Queue, job_id: str, worker_name: str) -> None:
        job = GenerationJob(job_id, connection=self._connection, serializer=JSONOnlySerializer)
        fields: Any = self._connection.hgetall(job.key)
        try:
            crashes = int(fields.get(keys.CRASHES_FIELD.encode(), 0))
            attempt = int(fields.get(keys.ATTEMPTS_FIELD.encode(), 1))
            execution_id = as_text(fields.get(keys.EXECUTION_FIELD.encode(), b""))
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

        def add_failure(pipeline: Pipeline) -> None:
            job.ended_at = utc_now()
            job.set_status(JobStatus.FAILED, pipeline=pipeline)
            execution: dict[str, Any] = {"execution_id": execution_id, "execution_started_at": job.started_at}
            execution["execution_ended_at"] = job.ended_at
            job._handle_failure(describe_error(error), pipeline=pipeline, worker_name=worker_name, **execution)
            Execution(execution_id, job_id, self._connection, worker_name).delete(job, pipeline)
            pipeline.xadd(keys.stream_key(job_id), end_entry(attempt), nomkstream=True)
            pipeline.expire(keys.stream_key(job_id), STREAM_TTL_SECONDS)

        fenced = IfRunning(job.key, worker_name, execution_id, add_failure)
        ((verdict, reply),) = run_fenced(self._connection, [fenced])
        if verdict == Verdict.MALFORMED:
            self._fail_malformed(queue, job_id, reply, worker_name)
        elif verdict == Verdict.DONE:
            self.count(keys.ended_field(*keys.POISON))
        log.error("job %s %s: %s", job_id, PoisonJob.how, error.reason, extra=about(job_id=job_id))

    def _fail_malformed(self, queue: Queue, job_id: str, reason: Exception, worker_name: str) -> None:
        fail_malformed(queue, job_id, reason, worker_name, keys.claimed_key(worker_name, queue.name))
        free_slot(self._connection, job_id)
        self.count(keys.ended_field("failed", "malformed"))

    def count(self, field: str) -> None:
        """Add one to a field of the pool's totals."""
        _COUNT_ONE.run(self._connection, [self._totals_key], [field])


class BackgroundReaper:
    """A supervisor's thread that takes back the jobs of processes that have ended, and counts restarts.

    A thread, so that supervising goes on while Redis is away: each task is tried until Redis takes it.

    Args:
        redis_url, queue: where the jobs are.
        note_recovery: called, in the thread, with the name of each worker, whether it had jobs, and how many jobs it
            had finished.
    """

    def __init__(self, redis_url: str, queue: str, note_recovery: Callable[[str, bool, int], None]) -> None:
        self._note_recovery = note_recovery
        self._connection = connect(redis_url)
        self._reaper = Reaper(self._connection, queue)
        self._tasks: thread_queue.SimpleQueue[Callable[[], bool] | None] = thread_queue.SimpleQueue()
        self._ending = threading.Event()
        # The dead workers of which the log says already that Redis is away.
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        with stop_signals_held():  # they are the main thread's, which may hold them back
            self._thread.start()

    def reap(self, worker_name: str, died: bool = True) -> None:
        """Take back the jobs of a worker whose process has ended, soon, in the thread.

        Args:
            died: the process did not end in order. One that did has said itself which jobs it leaves behind, if any.
        """
        self._tasks.put(bound(self._try_reap, worker_name, died))

    def count_restart(self, reason: str) -> None:
        """Count a restart, soon, in the thread; `reason` is one of `keys.RESTARTS`."""
        self._tasks.put(bound(self._try_count, keys.restarts_field(reason)))

    def close(self, patience: float) -> None:
        """Finish what there is to do, within `patience` seconds."""
        self._ending.set()
        self._tasks.put(None)
        self._thread.join(timeout=patience)
        self._connection.close()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            while not task():
                # Told to end, it tries once more, so that it ends although Redis is away.
                if self._ending.wait(RETRY_SECONDS) and not task():
                    return

    # The tasks: each returns whether it is done, and is else tried again.

    def _try_reap(self, name: str, died: bool) -> bool:
        try:
            recovery = self._reaper.reap(name)
            if recovery is not None:
                self._note_recovery(name, bool(recovery), recovery.finished)
        except (RedisError, FastGPT2Error) as reason:
            if died and name not in self._told:
                self._told.add(name)
                message = "the jobs that worker %s may have had when it died are put back when Redis can be used (%s)"
                log.warning(message, name, reason)
            return False
        except Exception:
            log.exception("the jobs of the dead worker %s cannot be taken back", name)
        return True

    def _try_count(self, field: str) -> bool:
        try:
            self._reaper.count(field)
        except RedisError:
            return False
        return True
