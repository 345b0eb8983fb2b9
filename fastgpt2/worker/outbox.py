"""How jobs leave a worker: each end is noted at once, and written as soon as Redis can take it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from redis.exceptions import RedisError
from rq.job import JobStatus

from fastgpt2.errors import FastGPT2Error, JobFailed, JobStopped, JobTimedOut
from fastgpt2.protocol.messages import describe_result
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.batch import Batch, Running, Started
from fastgpt2.worker.ledger import Ledger
from fastgpt2.worker.reporting import Figures
from fastgpt2.worker.rq_job import recorded

log = logging.getLogger("fastgpt2.worker")


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a job ends.

    Attributes:
        write: returns False if it was not this worker's to end.
        count: called once it is known that it was written.
    """

    running: Running
    write: Callable[[], bool]
    count: Callable[[], None]


class Endings:
    """Of the jobs in a batch.

    Attributes:
        written: how many jobs have ended here, given back ones apart.
    """

    def __init__(self, batch: Batch, ledger: Ledger, figures: Figures, worker_name: str) -> None:
        self._batch = batch
        self._ledger = ledger
        self._figures = figures
        self._name = worker_name
        self._pending: deque[_Ending] = deque()
        self.written = 0

    def __len__(self) -> int:
        """How many are not written yet."""
        return len(self._pending)

    def __iter__(self) -> Iterator[Running]:
        """Those that are not written yet."""
        return (ending.running for ending in self._pending)

    def finish(self, running: Running) -> None:
        """It came to its end."""
        value, last = running.result(), running.last()

        def write() -> bool:
            if not self._ledger.finish(running.started, value, last):
                return False
            log.info("%s: job %s finished: %s", self._name, running.id, describe_result(value))
            return True

        self._pending.append(_Ending(running, write, lambda: self._figures.finished(running, value)))

    def fail(self, running: Running, error: Exception) -> None:
        """An error ends it. What has been generated is kept of a job that was stopped or is out of time."""
        self._batch.drop(running)
        self._tell(running.id, error)
        stopped, partial, last = isinstance(error, JobStopped), None, running.last()
        if isinstance(error, JobStopped | JobTimedOut):
            partial = running.partial("cancelled" if stopped else "timeout")
        retry = running.started.job.should_retry and not stopped
        self._pending.append(
            _Ending(
                running,
                lambda: self._ledger.fail(running.started, recorded(error), last, partial, stopped),
                lambda: self._figures.retried(running) if retry else self._figures.failed(running, error),
            )
        )

    def cancel(self, running: Running, how: str = "was cancelled") -> None:
        """Somebody has cancelled it, or it is not this worker's any more."""
        self._batch.drop(running)
        log.info("%s: job %s %s", self._name, running.id, how)
        self._pending.append(_not_ours(running))

    def refuse(self, started: Started, error: Exception) -> None:
        """It cannot even begin. Written at once, so this raises what Redis raises."""
        self._tell(started.id, error)
        retry = started.job.should_retry
        try:
            if self._ledger.fail(started, recorded(error), None):
                self._figures.retried() if retry else self._figures.refused(started.id, error)
        except RedisError as reason:
            if not is_of_entry(reason):
                raise
            self._ledger.fail_malformed(started.queue, started.id, reason)
        self.written += 1

    def give_back(self, everything: Sequence[Running], crashed: bool = False) -> None:
        """Put jobs back to the front of their queues; as those of a crash, if it is the work on them that failed."""
        if not everything:
            return
        for running in everything:
            self._batch.drop(running)
        try:
            given = set(self._ledger.give_back([running.started for running in everything], crashed))
        except RedisError as reason:
            log.error("%s: %d jobs could not be given back (%s)", self._name, len(everything), reason)
            return
        log.info("%s: %d jobs given back to the queue", self._name, len(given))
        self._figures.given_back([running for running in everything if running.id in given])
        self._pending += [_not_ours(running) for running in everything if running.id not in given]

    def write(self) -> None:
        """Write what has ended. What Redis cannot take now is kept, for only this holds the work that was done.

        Raises:
            RedisError: it cannot be reached, or takes nothing now; some are still to be written.
        """
        while self._pending:
            ending = self._pending[0]
            running, count = ending.running, None
            try:
                count = ending.count if ending.write() else self._let_go(ending)
            except RedisError as reason:
                if not is_of_entry(reason):
                    for other in self:
                        log.warning("%s: the end of job %s cannot be written yet", self._name, other.id)
                    raise
                self._ledger.fail_malformed(running.started.queue, running.id, reason)
            except Exception as reason:
                log.exception("%s: the end of job %s cannot be written", self._name, running.id)
                self._ledger.fail_malformed(running.started.queue, running.id, reason)
            self._pending.popleft()
            self.written += 1
            if count is not None:
                count()

    def _let_go(self, ending: _Ending) -> Callable[[], None] | None:
        """It was cancelled or deleted by somebody, or taken over; or written before, and the answer was lost.

        Returns:
            What counts it, if it is this worker's to count.
        """
        running = ending.running
        status = self._ledger.let_go(running.started, running.last(), running.partial("cancelled"))
        if status == JobStatus.CANCELED:
            return lambda: self._figures.cancelled(running)
        return ending.count if status is not None else None

    def _tell(self, job_id: str, error: Exception) -> None:
        """One line in the log; a traceback only for a defect. Prompts stay out of it."""
        if isinstance(error, FastGPT2Error):
            reason = error.reason if isinstance(error, JobFailed) else error
            log.warning("%s: job %s failed: %s", self._name, job_id, reason)
        else:
            log.error("%s: job %s failed: %s", self._name, job_id, error, exc_info=error)


def _not_ours(running: Running) -> _Ending:
    """Somebody else ends it, or has."""
    return _Ending(running, lambda: False, lambda: None)
