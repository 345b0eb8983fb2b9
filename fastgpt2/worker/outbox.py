"""The outbox of a worker: how its jobs end is noted at once, written when Redis can take it, and then confirmed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial as bound
from typing import Any

from redis.exceptions import RedisError

from fastgpt2.errors import FastGPT2Error, JobFailed, JobStopped, JobTimedOut
from fastgpt2.events import about
from fastgpt2.plurals import counted
from fastgpt2.protocol.messages import describe_result, figures_of_result
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.batch import ActiveJob, Attempt, Batch, End, EndKind
from fastgpt2.worker.confirmation import Confirmation
from fastgpt2.worker.job_spans import record_job
from fastgpt2.worker.ledger import Ledger
from fastgpt2.worker.reporting import Metrics

log = logging.getLogger("fastgpt2.worker")


class Outbox:
    """The ends of the jobs of a batch.

    Attributes:
        written: how many jobs have ended here; those that were given back are not counted.
    """

    def __init__(
        self, batch: Batch, ledger: Ledger, metrics: Metrics, confirmation: Confirmation, worker_name: str
    ) -> None:
        self._batch = batch
        self._ledger = ledger
        self._metrics = metrics
        self._confirmation = confirmation
        self._name = worker_name
        self._unwritten: deque[tuple[ActiveJob, End]] = deque()
        # The ids of the jobs of which the log says already that their ends wait for Redis.
        self._told: set[str] = set()
        self.written = 0

    def __len__(self) -> int:
        """Return how many ends are not written yet."""
        return len(self._unwritten)

    def __iter__(self) -> Iterator[Attempt]:
        """Yield the attempts whose ends are not written yet, or not confirmed."""
        yield from (end.attempt for _, end in self._unwritten)
        yield from self._confirmation

    def finish(self, job: ActiveJob) -> None:
        """Note that a job came to its end."""
        end = End(job.attempt, EndKind.FINISHED, result=job.result(), last_pieces=job.last_pieces(), usage=job.usage)
        self._unwritten.append((job, end))

    def fail(self, job: ActiveJob, error: Exception) -> None:
        """Note that an error ends a job.

        What has been generated of a job that was stopped or is out of time is kept.
        """
        self._batch.drop(job)
        self._log_failure(job.attempt, error)
        kind, partial = _kind_of_failure(job.attempt, error), None
        if isinstance(error, JobStopped | JobTimedOut):
            partial = job.partial_result("timeout" if isinstance(error, JobTimedOut) else "cancelled")
        last_pieces = None if kind == EndKind.RETRIED else job.last_pieces()
        end = End(job.attempt, kind, error=error, partial=partial, last_pieces=last_pieces, usage=job.usage)
        self._unwritten.append((job, end))

    def cancel(self, job: ActiveJob, how: str = "was cancelled") -> None:
        """Note that somebody has cancelled a job, or that it is not this worker's any more."""
        self._batch.drop(job)
        log.info("%s: %s %s", self._name, job.attempt.in_words, how, extra=job.attempt.log_extra)
        self._unwritten.append((job, End(job.attempt, EndKind.LOST, usage=job.usage)))

    def refuse(self, attempt: Attempt, error: Exception) -> None:
        """Fail a job that cannot even begin. This is written at once."""
        self._log_failure(attempt, error)
        end = End(attempt, _kind_of_failure(attempt, error), error=error)
        try:
            if self._ledger.write(end):
                self._metrics.count_end(end)
                self._confirmation.hold(attempt, bound(self._ledger.write, end))
        except RedisError as reason:
            if not is_of_entry(reason):
                raise
            self._ledger.fail_malformed(attempt.queue, attempt.id, reason)
        self.written += 1
        record_job(attempt, end.kind.name.lower(), error=error)

    def give_back(self, jobs: Sequence[ActiveJob], crashed: bool = False) -> None:
        """Put jobs back to the front of their queues; as those of a crash, if it is the work on them that failed."""
        if not jobs:
            return
        for job in jobs:
            self._batch.drop(job)
        try:
            given = self._ledger.give_back([job.attempt for job in jobs], crashed)
        except RedisError as reason:
            them = "it" if len(jobs) == 1 else "them"
            message = "%s: %s could not be given back (%s); whoever serves the queue next finds %s"
            log.error(message, self._name, counted(len(jobs), "job"), reason, them)
            return
        log.info("%s: %s given back to the queue", self._name, counted(len(given), "job"))
        returned = [job for job in jobs if job.id in given]
        self._metrics.count_given_back(returned)
        for job in returned:
            record_job(job.attempt, "given_back", job)
            self._confirmation.hold(job.attempt, bound(self._ledger.give_back, [job.attempt], crashed))
        self._unwritten += [(job, End(job.attempt, EndKind.LOST)) for job in jobs if job.id not in given]

    def write(self) -> None:
        """Write the ends that are noted, and again those that Redis has lost since.

        What Redis cannot take now is kept: nothing else holds the work that was done.

        Raises:
            RedisError: Redis cannot be reached, or takes nothing now; some ends are still to be written.
        """
        while self._unwritten:
            job, end = self._unwritten[0]
            kind = end.kind
            try:
                if not self._ledger.write(end):
                    kind = self._ledger.let_go(end, job.last_pieces(), job.partial_result("cancelled"))
                elif end.result is not None:
                    self._log_result(job.attempt, end.result)
            except Exception as reason:
                if not isinstance(reason, RedisError):
                    extra = job.attempt.log_extra
                    log.exception("%s: the end of job %s cannot be written", self._name, job.id, extra=extra)
                elif not is_of_entry(reason):
                    self._tell_of_waiting()
                    raise
                self._ledger.fail_malformed(job.attempt.queue, job.id, reason)  # which also counts the job
                kind = EndKind.LOST
            self._unwritten.popleft()
            self._told.discard(job.id)
            self.written += 1
            self._metrics.count_end(replace(end, kind=kind), job)
            record_job(job.attempt, kind.name.lower(), job, end.error)
            if kind == end.kind and kind != EndKind.LOST:
                self._confirmation.hold(job.attempt, bound(self._ledger.write, end))
        self._confirmation.settle()

    def _tell_of_waiting(self) -> None:
        """Say in the log which ends wait for Redis, each once: they are tried again several times a second."""
        for job, _ in self._unwritten:
            if job.id not in self._told:
                self._told.add(job.id)
                extra = job.attempt.log_extra
                log.warning("%s: the end of job %s cannot be written yet", self._name, job.id, extra=extra)

    def _log_result(self, attempt: Attempt, result: dict[str, Any]) -> None:
        extra = about(**attempt.log_extra["fields"], **figures_of_result(result))
        log.info("%s: %s finished: %s", self._name, attempt.in_words, describe_result(result), extra=extra)

    def _log_failure(self, attempt: Attempt, error: Exception) -> None:
        """Write one line into the log, without the prompt; with a traceback only for a defect."""
        name, extra = attempt.in_words, attempt.log_extra
        if isinstance(error, FastGPT2Error):
            reason = attempt.rq_job.without_prompt(error.reason if isinstance(error, JobFailed) else error)
            extra["fields"]["error"] = type(error).__name__
            log.warning("%s: %s failed: %s", self._name, name, reason, extra=extra)
        else:
            log.error("%s: %s failed: %s", self._name, name, error, exc_info=error, extra=extra)


def _kind_of_failure(attempt: Attempt, error: Exception) -> EndKind:
    if isinstance(error, JobStopped):
        return EndKind.STOPPED
    return EndKind.RETRIED if attempt.rq_job.should_retry else EndKind.FAILED
