"""The aftermath of a job's end: what follows in Redis once the end is written, and may be done twice.

A worker keeps the job in its list of claimed jobs until all of it is done. So whoever finds the job there, be it the
worker itself or a reaper after its death, does it again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from redis.exceptions import NoPermissionError, RedisError
from rq import Queue
from rq.job import JobStatus
from rq.rate_limit import RateLimitRegistry
from rq.utils import as_text

from fastgpt2.events import about
from fastgpt2.protocol.keys import job_key
from fastgpt2.protocol.untrusted import JSONOnlySerializer, check_replies, is_of_entry, is_of_service
from fastgpt2.worker.rq_job import GenerationJob
from fastgpt2.worker.set_aside import shown, unclaim

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")

# The statuses of a job whose end is written.
ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED)


def complete(queue: Queue, job_id: str, claimed_key: str, limit: str | None = None) -> None:
    """Release the jobs that wait for one that has ended, free its slot, and then take it off a worker's list.

    Args:
        limit: the job's rate limit, as `free_slot` takes it.
    """
    _release_dependents(queue, job_id)
    free_slot(queue.connection, job_id, limit)
    unclaim(queue.connection, claimed_key, job_id)


def _release_dependents(queue: Queue, job_id: str) -> None:
    try:
        job = GenerationJob(job_id, connection=queue.connection, serializer=JSONOnlySerializer)
        if queue.connection.exists(job.dependents_key):
            job.restore(queue.connection.hgetall(job.key))
            if job.get_status(refresh=False) in ENDED:
                queue.enqueue_dependents(job)
    except Exception as reason:  # an entry that RQ cannot read, of this job or of one that waits for it
        if is_of_service(reason):
            raise
        log.warning(
            "what waits for job %s cannot be released (%s)",
            shown(job_id),
            str(reason)[:200],
            extra=about(job_id=job_id),
        )


def free_slot(connection: Redis, job_id: str, limit: str | None = None) -> None:
    """Free the slot that a job has under an RQ rate limit, and enqueue those that wait for it.

    Nothing happens if the job still needs the slot: if it is queued or started, or somebody runs it.

    Args:
        limit: the key of the job's rate limit; empty if it has none, None if it must be found out.
    """
    try:
        limits = limits_of(connection, job_id) if limit is None else [limit] if limit else []
        for key in limits:
            RateLimitRegistry(key, connection).release_stale_and_enqueue(job_id)
    except (RedisError, ValueError) as reason:
        # RQ's upkeep, minutes later, is another chance. What Redis will not have now must not stop the worker.
        if isinstance(reason, RedisError) and not (is_of_entry(reason) or isinstance(reason, NoPermissionError)):
            raise
        log.warning(
            "the slot of job %s under its rate limit cannot be freed yet (%s)",
            shown(job_id),
            reason,
            extra=about(job_id=job_id),
        )


def limits_of(connection: Redis, job_id: str) -> list[str]:
    """Return the keys of the rate limits under which a job may have a slot; those of a deleted job are looked for."""
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.hget(job_key(job_id), "rate_limit_key")
        pipeline.exists(job_key(job_id))
        pipeline.exists(RateLimitRegistry.rl_keys_key)
        limit, is_there, any_limits = check_replies(pipeline.execute(raise_on_error=False))
    if limit:
        return [as_text(limit)]
    if is_there or not any_limits:
        return []
    registries = RateLimitRegistry.all(connection)
    with connection.pipeline(transaction=False) as pipeline:
        for registry in registries:
            pipeline.zscore(registry.allowed_key, job_id)
        scores = check_replies(pipeline.execute(raise_on_error=False))
    return [registry.key for registry, score in zip(registries, scores, strict=True) if score is not None]
