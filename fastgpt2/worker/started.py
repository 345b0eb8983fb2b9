"""A job that a worker has started, as its ledger knows it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from rq import Queue
from rq.executions import Execution

from fastgpt2.worker.rq_job import GenerationJob


@dataclass(eq=False, slots=True)
class Started:
    """A job that this worker has started.

    Attributes:
        attempt: how often it has been started, this time included.
        crashes: how many workers have died with it in their hands.
        began_at: when, on `time.monotonic`'s clock.
    """

    job: GenerationJob
    queue: Queue
    execution: Execution
    attempt: int
    began_at: float
    crashes: int

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def waited_seconds(self) -> float:
        """From being enqueued until started, by the clocks of two machines; never below zero."""
        return seconds_between(self.job.enqueued_at, self.job.started_at)


def seconds_between(earlier: datetime | None, later: datetime | None) -> float:
    """Time between two moments that RQ noted; 0 where one is missing or the clocks of two machines disagree."""
    if earlier is None or later is None:
        return 0.0
    return max(0.0, (_aware(later) - _aware(earlier)).total_seconds())


def _aware(moment: datetime) -> datetime:
    """RQ notes moments in UTC, with or without saying so."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
