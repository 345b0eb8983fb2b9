"""What is looked at between two decode steps of a job: is it to stop, is its time up, is a heartbeat due."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from rq import Queue

from fastgpt2.errors import FastGPT2Error
from fastgpt2.worker.rq_job import GenerationJob

if TYPE_CHECKING:
    from fastgpt2.worker.generation_worker import GenerationWorker

log = logging.getLogger("fastgpt2.worker")

HEARTBEAT_SECONDS = 5.0


class JobStopped(FastGPT2Error):
    """The job was stopped by `send_stop_job_command`."""


class JobTimedOut(FastGPT2Error):
    """The job took longer than its `job_timeout`."""


class GiveBack(BaseException):
    """A second signal: leave the job to another worker."""


class JobRun:
    """One job on its way through one worker."""

    def __init__(self, worker: GenerationWorker, job: GenerationJob) -> None:
        self.worker = worker
        self.job = job
        self.limit = job.timeout or Queue.DEFAULT_TIMEOUT
        self.started = self.last_heartbeat = time.monotonic()
        self.announced = False

    def between_steps(self) -> None:
        """Keep the job alive in Redis.

        Raises:
            JobStopped, JobTimedOut: the job ends, failed.
            GiveBack: it is to be put back into its queue.
        """
        worker, now = self.worker, time.monotonic()
        if worker.stopped_job_id == self.job.id:
            raise JobStopped("stopped on request")
        if worker.stop_at_once:
            raise GiveBack
        if 0 < self.limit < now - self.started:
            raise JobTimedOut(f"took longer than the {self.limit} s that it was given (job_timeout)")
        if worker.stopping.is_set() and not self.announced:
            self.announced = True
            log.info("%s is told to stop: finishing job %s; a second signal gives it back", worker.name, self.job.id)
        if now - self.last_heartbeat > HEARTBEAT_SECONDS:
            self.last_heartbeat = now
            self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        if self.worker.execution is None:
            return
        try:
            self.worker.maintain_heartbeats(self.job, self.worker.execution)
        except RedisError as reason:
            log.warning("%s: no heartbeat (%s); job %s goes on", self.worker.name, reason, self.job.id)
