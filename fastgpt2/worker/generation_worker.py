"""An RQ worker that loads the model once and generates one job at a time in its own process."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq import Queue, Retry, SimpleWorker, worker_registration
from rq.exceptions import DequeueTimeout, DeserializationError, StopRequested
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.timeouts import BaseDeathPenalty
from rq.worker import WorkerStatus

from fastgpt2 import __version__
from fastgpt2.errors import BadRequest, FastGPT2Error, RedisAccessDenied
from fastgpt2.worker.connection import address_of, in_words
from fastgpt2.worker.job import describe_result, result_to_json
from fastgpt2.worker.job_run import HEARTBEAT_SECONDS, GiveBack, JobRun
from fastgpt2.worker.process import on_stop_signals
from fastgpt2.worker.rq_job import GenerationJob, JSONOnlySerializer, fail_malformed
from fastgpt2.worker.tasks import queue_seconds

if TYPE_CHECKING:
    from redis import Redis

    from fastgpt2.engine.engine import Engine

log = logging.getLogger("fastgpt2.worker")

# A worker that was killed is off the lists this long after its last heartbeat, plus RQ's own 60 s.
WORKER_TTL_SECONDS = 30
# How long an idle worker may take to notice a signal or an orphaned life.
CLAIM_SECONDS = 1
MAX_RECONNECT_SECONDS = 10.0
UPKEEP_PAUSE_SECONDS = 60.0
# How often a job may be given back by workers that are told to stop at once.
MAX_GIVE_BACKS = 1000


class _NoAlarm(BaseDeathPenalty):
    """RQ's SIGALRM raises wherever it lands, in the midst of the decoder's bookkeeping; the step loop looks instead."""

    def setup_death_penalty(self) -> None:
        pass

    def cancel_death_penalty(self) -> None:
        pass


class GenerationWorker(SimpleWorker):
    """A full RQ worker: statuses, registries, results, retries, heartbeats, stop commands, suspension, `rq info`.

    A first SIGTERM or SIGINT lets it finish the job in hand; a second one puts that job back at the front of its queue.

    Args:
        engine: loaded and warmed up.
        connection: to Redis; see `fastgpt2.worker.connection.connect`.
        queue: name of the queue.
        name: unique among the live workers; default host and process id.
        supervisor_pid: the process without which this one should not live on.
    """

    death_penalty_class = _NoAlarm

    def __init__(
        self,
        engine: Engine,
        connection: Redis,
        queue: str,
        name: str | None = None,
        supervisor_pid: int | None = None,
    ) -> None:
        self.engine = engine
        self.supervisor_pid = supervisor_pid
        self._longest_token_bytes = engine.tokenizer.longest_token_bytes
        self.stopping = threading.Event()
        self.stop_at_once = False
        self._last_heartbeat = 0.0
        self._no_upkeep_before = 0.0
        super().__init__(
            [queue],
            name=name or default_name(),
            connection=connection,
            job_class=GenerationJob,
            serializer=JSONOnlySerializer,
            worker_ttl=WORKER_TTL_SECONDS,
            log_job_description=False,
            prepare_for_work=False,  # would need Redis to be up already
        )
        # RQ's own lines would be five a job.
        self.log.setLevel(logging.WARNING)
        self._scheduler = RQScheduler([queue], connection, logging_level=logging.WARNING, serializer=self.serializer)

    def serialize(self) -> dict[str, Any]:
        """What Redis holds of this worker: RQ's fields, and what clients need to know of the model."""
        config = self.engine.config
        own = {
            "fastgpt2_version": __version__,
            "model": self.engine.model,
            "computes_by": self.engine.describe(),
            "n_positions": config.n_positions,
            "longest_token_bytes": self._longest_token_bytes,
        }
        return {**super().serialize(), **own}

    @property
    def stopped_job_id(self) -> str | None:
        """The job that a stop command named last."""
        return self._stopped_job_id

    def work(self, burst: bool = False, *other: Any, **others: Any) -> bool:
        """Take and run jobs until told to stop; with `burst`, until the queue is empty. Returns whether any was run.

        Raises:
            TypeError: an option of RQ's own `work` other than `burst` was given.
        """
        if other or others:
            raise TypeError(f"{type(self).__name__}.work() takes no option but burst")
        self._install_signal_handlers()
        if not self._register():
            return False
        (queue,) = self.queues
        log.info("%s is ready: model %s, queue %s, process %d", self.name, self.engine.model, queue.name, self.pid)
        worked, failures = False, 0
        try:
            while not self.stopping.is_set() and not self._orphaned():
                try:
                    self.check_for_suspension(burst)
                    if self.stopping.is_set():
                        break
                    claimed = self._claim(burst)
                    if claimed is not None:
                        self.execute_job(*claimed)
                        worked = True
                    elif burst:
                        break
                    failures = 0
                except StopRequested:  # suspended, with burst
                    break
                except RedisError as reason:
                    failures += 1
                    self._wait_for_redis(reason, failures)
                except Exception:
                    # No entry in Redis, however strange, may end a worker.
                    log.exception("%s: unforeseen; going on", self.name)
                    failures += 1
                    self.stopping.wait(_back_off(failures))
        finally:
            self._say_goodbye()
        return worked

    def _register(self) -> bool:
        """Appear among the workers, waiting for a Redis that is not up yet. False when told to stop meanwhile.

        Raises:
            RedisAccessDenied: Redis is up, and will not have this worker.
        """
        failures = 0
        while not self.stopping.is_set():
            try:
                self.hostname, self.pid = socket.gethostname(), os.getpid()
                self._set_ip_address(self.connection)
                self.register_birth()
                self.subscribe()
                self.set_state(WorkerStatus.IDLE)
                return True
            except RedisError as reason:
                error = in_words(address_of(self.connection), reason)
                if isinstance(error, RedisAccessDenied):
                    raise error from None
                failures += 1
                self._wait_for_redis(reason, failures)
            except ValueError as reason:
                raise BadRequest(f"{reason}; give each worker a name of its own") from None
        return False

    def _claim(self, burst: bool) -> tuple[Job, Queue] | None:
        """The next job, waiting for one for a second at most; a heartbeat and RQ's upkeep on the way."""
        self._keep_up()
        try:
            return Queue.dequeue_any(
                self.queues,
                None if burst else CLAIM_SECONDS,
                connection=self.connection,
                job_class=self.job_class,
                serializer=self.serializer,
            )
        except DequeueTimeout:
            return None
        except RedisError:
            raise
        except Exception as reason:
            if not hasattr(reason, "job_id"):
                raise
            # RQ's mark of an entry that was claimed and cannot be read.
            error = fail_malformed(self.queues[0], reason.job_id, reason, self.name)
            log.warning("%s: job %s failed: %s", self.name, reason.job_id, error)
            return None

    def _keep_up(self) -> None:
        """Heartbeat, jobs that are due, RQ's clean-up. An entry that breaks the latter must keep no job waiting."""
        now = time.monotonic()
        if now - self._last_heartbeat > HEARTBEAT_SECONDS:
            self._announce()
            self._last_heartbeat = now
            self._scheduler.acquire_locks()
        if now < self._no_upkeep_before:
            return
        try:
            self._scheduler.enqueue_scheduled_jobs()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
        except RedisError:
            raise
        except Exception:
            log.exception("%s: upkeep failed; trying again in %.0f s", self.name, UPKEEP_PAUSE_SECONDS)
            self._no_upkeep_before = now + UPKEEP_PAUSE_SECONDS

    def _announce(self) -> None:
        """A heartbeat, and an entry anew should Redis have lost its data since."""
        with self.connection.pipeline() as pipeline:
            worker_registration.register(self, pipeline)
            fields: dict[Any, Any] = {**self.serialize(), "state": self._state}
            pipeline.hset(self.key, mapping=fields)
            self.heartbeat(pipeline=pipeline)
            pipeline.execute()

    def execute_job(self, job: Job, queue: Queue) -> None:
        assert isinstance(job, GenerationJob)
        job.run = self._generate
        super().execute_job(job, queue)

    def _generate(self, job: GenerationJob) -> dict[str, Any] | Retry:
        """What `job.perform()` does. An exception becomes the job's failure, a Retry puts it back into its queue."""
        run = JobRun(self, job)
        try:
            (result,) = self.engine.run([job.request()], run.between_steps)
        except GiveBack:
            log.info("%s: job %s given back to the queue", self.name, job.id)
            return Retry(max=MAX_GIVE_BACKS, enqueue_at_front=True)
        return result_to_json(result, queue_seconds(job.enqueued_at, job.started_at))

    def _finalize_success(self, job: Job, queue: Queue, execution: Any, return_value: Any) -> None:
        self._persist(job, lambda: super(GenerationWorker, self)._finalize_success(job, queue, execution, return_value))
        if isinstance(return_value, dict):
            log.info("%s: job %s finished: %s", self.name, job.id, describe_result(return_value))

    def _persist(self, job: Job, write: Callable[[], None]) -> None:
        """Write a job's end, waiting for a Redis that is away: the work is done, and only this holds its result."""
        failures = 0
        while True:
            try:
                write()
                return
            except (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError) as reason:
                if self.stop_at_once:
                    raise
                failures += 1
                log.warning("%s: the end of job %s cannot be written yet", self.name, job.id)
                self._wait_for_redis(reason, failures)

    def _finalize_failure(self, job: Job, queue: Queue, execution: Any, exc_info: Any) -> None:
        """A user's mistake is recorded as its sentence alone; a traceback is for what nobody foresaw."""
        error = exc_info[1]
        if isinstance(error, DeserializationError) and isinstance(job, GenerationJob):
            error = job.unreadable(error)
        if isinstance(error, FastGPT2Error):
            exc_info = (type(error), error, None)
        self._persist(job, lambda: super(GenerationWorker, self)._finalize_failure(job, queue, execution, exc_info))

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """One line in the log; a traceback only for a defect. Prompts stay out of it."""
        error = exc_info[1]
        if isinstance(error, FastGPT2Error):
            log.warning("%s: job %s failed: %s", self.name, job.id, error)
        else:
            log.error("%s: job %s failed: %s", self.name, job.id, error, exc_info=exc_info)

    def _install_signal_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            on_stop_signals(self.request_stop)

    def request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Only sets flags: RQ's own handler raises where it stands, which loses a job that was just claimed."""
        if self.stopping.is_set():
            self.stop_at_once = True
        self.stopping.set()
        self._stop_requested = True

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        self.request_stop(signum, frame)

    def _orphaned(self) -> bool:
        """The supervisor is gone: nobody would stop this worker any more."""
        if self.supervisor_pid is None or os.getppid() == self.supervisor_pid:
            return False
        log.warning("%s: the supervisor is gone; stopping", self.name)
        return True

    def _wait_for_redis(self, reason: Exception, failures: int) -> None:
        seconds = _back_off(failures)
        log.warning("%s: Redis cannot be used (%s); trying again in %.1f s", self.name, reason, seconds)
        if self.stopping.is_set():
            time.sleep(min(seconds, 0.2))  # an event that is set does not wait; a second signal must be seen soon
        else:
            self.stopping.wait(seconds)

    def _say_goodbye(self) -> None:
        try:
            self._scheduler.release_locks()
            self.teardown()
        except RedisError as reason:
            log.warning("%s: could not sign off (%s)", self.name, reason)
        log.info("%s has stopped", self.name)


def default_name() -> str:
    """Unique also when a process id comes round again, as it does in containers."""
    return f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:6]}"


def _back_off(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_RECONNECT_SECONDS, 0.25 * 2.0 ** min(failures, 10))
