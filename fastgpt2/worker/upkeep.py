"""The upkeep of a pool's queues as RQ's workers do it: jobs that are due are enqueued, registries are cleaned.

Each part stands alone: an entry or a key that RQ stumbles over keeps none of the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rq import Queue, worker_registration
from rq.group import Group
from rq.rate_limit import RateLimitRegistry
from rq.registry import (
    BaseRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ReadyJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.scheduler import RQScheduler
from rq.scripts import ACQUIRE_OR_REFRESH_LOCK_SCRIPT
from rq.utils import as_text, current_timestamp
from rq.worker import BaseWorker

from fastgpt2.events import about
from fastgpt2.protocol.keys import registry_key
from fastgpt2.protocol.untrusted import is_of_service
from fastgpt2.worker.rq_job import GenerationJob, fail_malformed, fetch
from fastgpt2.worker.served_names import ServedNames
from fastgpt2.worker.set_aside import shown
from fastgpt2.worker.unfit import execute_what_fits, tell

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")

# How many jobs that are due are enqueued at one go.
MOST_DUE = 1000

# What RQ's scheduler adds to the time between two of its looks.
LOCK_GRACE_SECONDS = 60


@contextmanager
def guarded(key: str, what: str) -> Iterator[None]:
    """Leave out what fails in the block for another reason than Redis, and tell which key it is about.

    Raises:
        RedisError: Redis cannot be reached, or cannot serve.
    """
    try:
        yield
    except Exception as reason:
        if is_of_service(reason):
            raise
        tell(key, f"{type(reason).__name__}: {reason}", what)


class StartedJobs(StartedJobRegistry):
    """RQ's registry of started jobs, whose members are "job id:execution id"; an id may have colons of its own."""

    @staticmethod
    def parse_job_id(entry: str | bytes) -> str:
        text = entry.decode("utf-8", "replace") if isinstance(entry, bytes) else entry
        return text.rpartition(":")[0] or text

    def get_expired_job_ids(self, timestamp: float | None = None) -> list[str]:
        """Return the ids of the jobs that nobody has kept alive; without those that cannot be read."""
        ids = list(dict.fromkeys(super().get_expired_job_ids(timestamp)))
        found = fetch(self.connection, ids, self.serializer)
        return [job_id for job_id, job in zip(ids, found, strict=True) if isinstance(job, GenerationJob)]

    def get_queue(self) -> Queue:
        return Queue(self.name, connection=self.connection, job_class=self.job_class, serializer=self.serializer)


class Upkeep:
    """The upkeep of the queues of one worker's pool, those of models that no worker serves any more among them.

    Args:
        served: knows which queues the pool has.
        malformed: called with the id of each job that was failed for the state of its entry.
    """

    def __init__(
        self, worker: BaseWorker, scheduler: RQScheduler, served: ServedNames, malformed: Callable[[str], None]
    ) -> None:
        self._worker, self._scheduler, self._served, self._malformed = worker, scheduler, served, malformed
        self._connection: Redis = worker.connection
        self._options: dict[str, Any] = {
            "connection": worker.connection,
            "job_class": GenerationJob,
            "serializer": worker.serializer,
        }

    def acquire_locks(self) -> None:
        """Become, or stay, the one who looks after the scheduled jobs of those queues that nobody else looks after."""
        locks = {name: self._scheduler.get_locking_key(name) for name in self._served.queues}
        ttl = self._scheduler.interval + LOCK_GRACE_SECONDS
        with self._connection.pipeline(transaction=False) as pipeline:
            for key in locks.values():
                pipeline.eval(ACQUIRE_OR_REFRESH_LOCK_SCRIPT, 1, key, self._scheduler.name, ttl)
            replies = pipeline.execute(raise_on_error=False)
        for key, reply in zip(locks.values(), replies, strict=True):
            if isinstance(reply, Exception):
                with guarded(key, "no job of this queue that waits for its time is enqueued"):
                    raise reply
        self._scheduler._acquired_locks = {name for name, reply in zip(locks, replies, strict=True) if reply in (1, 2)}

    def enqueue_due(self) -> None:
        """Enqueue the jobs that are due, of the queues that are this worker's to look after."""
        names = sorted(self._scheduler.acquired_locks)
        with self._connection.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.zrangebyscore(registry_key("scheduled", name), 0, current_timestamp(), start=0, num=MOST_DUE)
            found = pipeline.execute(raise_on_error=False)
        for name, due in zip(names, found, strict=True):
            queue = Queue(name, **self._options)
            registry: BaseRegistry = ScheduledJobRegistry(name, **self._options)  # type: ignore[no-untyped-call]
            with guarded(registry.key, "no job that waits for its time there is enqueued"):
                if isinstance(due, Exception):
                    raise due
                if not due or not self._takes_jobs(queue):
                    continue
                jobs = self._read(queue, registry, due)
                try:
                    self._enqueue(queue, registry, [job for job in jobs if not job.has_rate_limit])
                    others = [job for job in jobs if job.has_rate_limit]
                except Exception as reason:
                    if is_of_service(reason):
                        raise
                    others = jobs
                for job in others:
                    with guarded(job.key, "it is not enqueued"):
                        self._enqueue(queue, registry, [job])

    def _takes_jobs(self, queue: Queue) -> bool:
        """Tell whether a queue's key is a list, or nothing; if it is something else, say so in the log."""
        kind = self._connection.type(queue.key)
        if kind in (b"list", b"none"):
            return True
        tell(queue.key, f"a {as_text(kind)}, no list", "no job of this queue that is due is enqueued")
        return False

    def _enqueue(self, queue: Queue, registry: BaseRegistry, jobs: list[GenerationJob]) -> None:
        with self._connection.pipeline() as pipeline:
            for job in jobs:
                registry.remove(job.id, pipeline=pipeline)
                enqueue = queue._enqueue_rate_limited_job if job.has_rate_limit else queue._enqueue_job
                enqueue(job, pipeline=pipeline, at_front=job.should_enqueue_at_front())
            execute_what_fits(pipeline)

    def _read(self, queue: Queue, registry: BaseRegistry, entries: Any) -> list[GenerationJob]:
        """Fetch the jobs of a registry. What is gone is taken off it, and what cannot be read is failed."""
        found: list[GenerationJob] = []
        ids = []
        for entry in entries:
            try:
                ids.append(as_text(entry))
            except UnicodeDecodeError:
                log.warning("%s is no job's id; it is taken off %s", shown(entry), registry.key)
                self._connection.zrem(registry.key, entry)
        for job_id, job in zip(ids, fetch(self._connection, ids, self._worker.serializer), strict=True):
            if isinstance(job, GenerationJob):
                found.append(job)
                continue
            self._connection.zrem(registry.key, job_id)
            if isinstance(job, Exception):
                error = fail_malformed(queue, job_id, job, self._worker.name, "")
                log.warning(
                    "%s: job %s failed: %s", self._worker.name, shown(job_id), error, extra=about(job_id=job_id)
                )
                self._malformed(job_id)
        return found

    def clean(self) -> None:
        """Clean the registries as RQ does; of several workers, one does it at a time."""
        for name in self._served.queues:
            queue = Queue(name, **self._options)
            with guarded(queue.key, "its registries are not cleaned"):
                if queue.acquire_maintenance_lock():
                    try:
                        self._clean_queue(queue)
                    finally:
                        queue.release_maintenance_lock()  # type: ignore[no-untyped-call]
        with guarded(RateLimitRegistry.rl_keys_key, "rate limits are not cleaned"):
            for limit in RateLimitRegistry.all(self._connection):
                with guarded(limit.config_key, "this rate limit is not cleaned"):
                    limit.cleanup()
        with guarded(Group.REDIS_GROUP_KEY, "groups are not cleaned"):
            self._worker.clean_group_registries()  # type: ignore[no-untyped-call]

    def _clean_queue(self, queue: Queue) -> None:
        for kind in (FinishedJobRegistry, StartedJobs, FailedJobRegistry, ReadyJobRegistry):
            registry = kind(queue.name, **self._options)
            with guarded(registry.key, "it is not cleaned"):
                if isinstance(registry, ReadyJobRegistry):
                    self._read(queue, registry, self._connection.zrange(registry.key, 0, -1))
                registry.cleanup()
        with guarded(f"{worker_registration.REDIS_WORKER_KEYS}:{queue.name}", "workers that are gone stay there"):
            worker_registration.clean_worker_registry(queue)
        with guarded(queue.intermediate_queue.key, "it is not cleaned"):
            queue.intermediate_queue.cleanup(self._worker, queue)
