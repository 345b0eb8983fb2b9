"""A worker as RQ's users know one, whatever it does with its jobs: registered, heard of, commanded, kept in order."""

from __future__ import annotations

import logging
import os
import queue as thread_queue
import socket
import time
import uuid
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq.command import parse_payload
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.utils import now as utc_now
from rq.worker import BaseWorker, WorkerStatus

from fastgpt2.errors import RedisUnfit
from fastgpt2.process import StopFlag
from fastgpt2.protocol.connection import address_of, in_words
from fastgpt2.protocol.keys import model_of, queues_of
from fastgpt2.protocol.server_check import try_rights
from fastgpt2.protocol.untrusted import JSONOnlySerializer
from fastgpt2.worker.listener import Listener
from fastgpt2.worker.liveness import BEAT_SECONDS, Lease
from fastgpt2.worker.reaper import Reaper
from fastgpt2.worker.registration import Registration
from fastgpt2.worker.rq_job import GenerationJob
from fastgpt2.worker.served_names import ServedNames
from fastgpt2.worker.upkeep import Upkeep

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")

# A worker that was killed is off the lists this long after its last heartbeat, plus RQ's own 60 s.
WORKER_TTL_SECONDS = 30
HEARTBEAT_SECONDS = 5.0

# How long RQ may not hear of a running job before it takes the job for abandoned; ours are taken back in seconds.
EXECUTION_TTL_SECONDS = 600

# How long a worker waits at most before it tries again a Redis that was away. After a promotion, the service is back
# this much later; the lease is tried each second anyway.
MAX_RECONNECT_SECONDS = 2.0

# For how long signing off is tried again. A Redis that hangs makes each attempt take longer than this.
SIGN_OFF_SECONDS = 2.0

# How late a job that is due may be enqueued.
UPKEEP_SECONDS = 1.0


class RQWorker(BaseWorker):
    """The part of a worker that is RQ's affair; a subclass runs the jobs.

    A first SIGTERM, SIGINT or shutdown command sets `stopping`, a second one `stop_at_once`; nothing is interrupted.

    Args:
        connection: to Redis; see `fastgpt2.protocol.connection.connect`.
        queue: the name of the queue; the more and the less urgent ones beside it are served too (`keys.queues_of`), and
            those of the jobs that name this worker's model.
        names: the names of the model.
        name: unique among the live workers; the default is made of the host's name, the process id and a random part.
        supervisor_pid: the process without which this one should not live on.
        named_only: leave the jobs that name no model to other workers.

    Raises:
        BadRequest: there are too many names, or one is none that a job can give.
    """

    def __init__(
        self,
        connection: Redis,
        queue: str,
        names: Iterable[str],
        name: str | None = None,
        supervisor_pid: int | None = None,
        named_only: bool = False,
    ) -> None:
        self.supervisor_pid = supervisor_pid
        self._pool_name = queue
        self.stopping = StopFlag()
        self.stop_at_once = False
        self._stop_commands: thread_queue.SimpleQueue[str] = thread_queue.SimpleQueue()
        self._last_heartbeat = 0.0
        self._no_upkeep_before = 0.0
        self.served = ServedNames(connection, queue, names)
        queues = queues_of(queue, self.served.own)
        if named_only:
            queues = [one for one in queues if model_of(one) is not None]
        super().__init__(
            queues,
            name=name or make_name(),
            connection=connection,
            job_class=GenerationJob,
            serializer=JSONOnlySerializer,
            worker_ttl=WORKER_TTL_SECONDS,
            log_job_description=False,
            prepare_for_work=False,  # would need Redis to be up already
        )
        # RQ's own lines would be five a job.
        self.log.setLevel(logging.WARNING)
        reaper = Reaper(connection, queue)
        self.lease = Lease(connection, queue, self.name, reaper.reap, self.served.own)
        self._registration = Registration(
            connection, queue, queues, self.name, WORKER_TTL_SECONDS, self.lease, reaper.reap
        )
        self._listener = Listener(connection, self.name, self.pubsub_channel_name, self.handle_payload)
        self._scheduler = RQScheduler(queues, connection, logging_level=logging.WARNING, serializer=self.serializer)
        # RQ would make a pool of its own of this one's class and options; Sentinel's cannot be made so.
        self._scheduler._connection = connection  # type: ignore[assignment]
        self._upkeep = Upkeep(self, self._scheduler, self.served, self.count_malformed)

    def _set_connection(self, connection: Redis) -> Redis:
        """Return the connection as it is; RQ would lengthen its timeout for its own long waits, which there are not."""
        return connection

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Return a time so long that nobody's clean-up fails a job of a dead worker before it has been taken back."""
        return max(EXECUTION_TTL_SECONDS, int(super().get_heartbeat_ttl(job, working_time)))

    def sign_on(self) -> bool:
        """Appear among the workers, waiting for a Redis that is not up yet, and for a dead worker of this name.

        Whatever fails on the way is tried again from the start: all of it may be done twice.

        Returns:
            False if this worker was told to stop meanwhile, or lost its supervisor.

        Raises:
            RedisUnfit: Redis is up, and will not have this worker.
            BadRequest: another worker has the name, or the pool has models of too many names.
        """
        failures = 0
        while not (self.stopping.is_set() or self.is_orphaned()):
            try:
                self.hostname, self.pid = socket.gethostname(), os.getpid()
                try_rights(self.connection, address_of(self.connection), "worker", self._pool_name)
                self._set_ip_address(self.connection)
                self._state = WorkerStatus.IDLE
                self.birth_date = self.birth_date or utc_now()
                self.last_heartbeat = utc_now()
                self.subscribe()  # who is listed hears commands: they are sent to those who are, and are not kept
                # Before this worker is listed: who sees it may name its model.
                self.served.renew()
                if self._registration.take(self._entry(), self.served.queues):
                    self.lease.start()
                    return True
                failures, seconds = 0, BEAT_SECONDS
            except RedisError as reason:
                error = in_words(address_of(self.connection), reason)
                if isinstance(error, RedisUnfit):
                    raise error from None
                failures += 1
                seconds = back_off(failures)
                log.warning("%s: Redis cannot be used (%s); trying again in %.1f s", self.name, reason, seconds)
            self.stopping.wait(seconds)
        return False

    def sign_off(self) -> None:
        """Disappear from among the workers; say so in the log if Redis cannot be told.

        Also after a `sign_on` that did not succeed: Redis may have taken what it never answered.
        """
        self.lease.stop()
        self.unsubscribe()
        deadline = time.monotonic() + SIGN_OFF_SECONDS
        while True:
            try:
                self._registration.leave()
                if not self.lease.is_taken:
                    self.served.leave(self.key)
                self._scheduler.release_locks()
                break
            except RedisError as reason:
                if time.monotonic() > deadline:
                    log.warning("%s: could not sign off (%s); its entry in Redis expires", self.name, reason)
                    break
                time.sleep(0.1)
        log.info("%s has stopped", self.name)

    def subscribe(self) -> None:
        """Listen to RQ's commands, in a thread of this package's own; called again, see that it still does."""
        self._listener.start()
        self._listener.wait_until_subscribed()

    def unsubscribe(self) -> None:
        """Listen to RQ's commands no more."""
        self._listener.stop()

    def keep_up(self) -> bool:
        """Send the heartbeat, enqueue jobs that are due, and run RQ's clean-up, each when it is time.

        An entry that breaks the clean-up keeps no job waiting.

        Returns:
            Whether a heartbeat was due.
        """
        now = time.monotonic()
        due = now - self._last_heartbeat > HEARTBEAT_SECONDS
        if due:
            self.announce()
            self._last_heartbeat = now
            self._listener.start()
            if not self.lease.is_taken:
                self.served.renew()
            self._upkeep.acquire_locks()
        if self.lease.is_taken and not self.stop_at_once:
            log.error("%s was silent for so long that another worker has its name now; stopping", self.name)
            self.stop_at_once = True
            self.stopping.set()
        if now < self._no_upkeep_before:
            return due
        self._no_upkeep_before = now + UPKEEP_SECONDS
        self._upkeep.enqueue_due()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()
        return due

    def clean_registries(self) -> None:
        """Clean the registries of all queues, and of groups and rate limits."""
        self._upkeep.clean()
        self.last_cleaned_at = utc_now()  # type: ignore[assignment]

    def run_maintenance_tasks(self) -> None:
        """Do as RQ does, which would start its scheduler as a process."""
        self.clean_registries()

    def count_malformed(self, job_id: str) -> None:
        """Count a job that was failed for the state of its entry; a subclass that counts does more."""

    def announce(self) -> None:
        """Send a heartbeat, and write the worker's entry anew: Redis may have lost its data since."""
        self.last_heartbeat = utc_now()
        if self._registration.announce(self._entry(), self.pubsub_channel_name) == 0:
            self._listener.renew()

    def _entry(self) -> dict[str, Any]:
        """Return what Redis holds of this worker."""
        return {**self.serialize(), "state": self._state}

    def enter(self, state: WorkerStatus) -> None:
        """Announce a new state, and with it how this worker is doing; the same state again costs nothing."""
        if self.get_state() != state:
            self._state = state
            self.announce()

    def handle_payload(self, message: dict[Any, Any]) -> None:
        """Note a command, in the thread that listens for commands; it is obeyed between two steps."""
        try:
            payload = parse_payload(message)
            command, job_id = payload["command"], str(payload.get("job_id", ""))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            log.warning("%s: a command that cannot be read is ignored", self.name)
            return
        if command in ("stop-job", "stop-execution") and job_id:
            self._stop_commands.put(job_id)
        elif command == "shutdown":
            self.request_stop(0, None)
        else:
            log.warning("%s: the command %s is ignored", self.name, str(command)[:40])

    def take_stop_commands(self) -> Iterable[str]:
        """Yield the ids of the jobs that stop commands have named since the last call."""
        while not self._stop_commands.empty():
            yield self._stop_commands.get()

    def request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Set flags only: RQ's own handler raises where it stands, which loses a job that was just claimed."""
        if self.stopping.is_set():
            self.stop_at_once = True
        self.stopping.set()
        self._stop_requested = True

    def is_orphaned(self) -> bool:
        """Tell whether the supervisor is gone: nobody would stop this worker any more."""
        return self.supervisor_pid is not None and os.getppid() != self.supervisor_pid


def make_name() -> str:
    """Return a worker's name that is unique also when a process id comes round again, as it does in containers."""
    return f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:6]}"


def back_off(failures: int) -> float:
    """Return how many seconds to wait after a number of failures in a row."""
    return min(MAX_RECONNECT_SECONDS, 0.25 * 2.0 ** min(failures, 10))
