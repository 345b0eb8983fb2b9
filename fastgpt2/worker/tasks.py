"""The one task that a queue may name.

fastgpt2's own workers recognise the name and run the engine they hold; a stock `rq worker` imports and calls this.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from fastgpt2.worker.job import parse_request, result_to_json

if TYPE_CHECKING:
    from fastgpt2.engine.engine import Engine


def generate(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Continue a prompt with the model that `FASTGPT2_MODEL` names; takes the fields of `GenerationRequest`.

    Returns:
        The result as a JSON object; `fastgpt2.worker.job.result_from_json` reads it.

    Raises:
        BadRequest: a field is unknown, ill-typed or out of bounds.
        ModelError: the model cannot be loaded.
    """
    from rq import get_current_job

    request = parse_request(args, kwargs)
    job = get_current_job()
    engine = _engine()
    (result,) = engine.run([request])
    queued = queue_seconds(job.enqueued_at, job.started_at) if job else 0.0
    return result_to_json(result, queued)


def queue_seconds(enqueued_at: datetime | None, started_at: datetime | None) -> float:
    """Time between two moments that RQ noted (UTC); 0 where the clocks of two machines disagree."""
    if enqueued_at is None or started_at is None:
        return 0.0
    return max(0.0, (_utc(started_at) - _utc(enqueued_at)).total_seconds())


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@cache
def _engine() -> Engine:
    """Loaded once a process. A stock `rq worker` forks a process for each job, and so loads for each job."""
    from fastgpt2 import settings
    from fastgpt2.engine.engine import Engine

    return Engine.load(
        settings.MODEL.resolve(),
        revision=settings.REVISION.resolve(),
        threads=settings.THREADS.resolve(),
        max_batch=1,
        blas=settings.BLAS.resolve(),
    )
