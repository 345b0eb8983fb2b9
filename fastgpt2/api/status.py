"""What the pool is doing, as JSON: read from Redis, so that every endpoint tells the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__
from fastgpt2.api.recent import BUCKETS, points, rates
from fastgpt2.api.replies import real, text, whole
from fastgpt2.api.snapshot import Snapshot, WorkerEntry, read_snapshot, seconds_since
from fastgpt2.worker.measures import COUNTS, OUTCOMES, RESTARTS, ended_field, restarts_field

if TYPE_CHECKING:
    from redis.asyncio import Redis


async def read_status(connection: Redis, queue: str, history: bool = False) -> dict[str, Any]:
    """The state of a queue and its workers, as JSON.

    Args:
        history: also what the pool did in each ten seconds of the last fifteen minutes.

    Returns:
        `queue`: name, depth, the depth by priority, and for how long the job at the head of a queue has waited at most
        (None if none waits); `jobs`: counts by RQ's states (finished and failed ones until they expire); `totals`:
        what was counted since the pool was first used; `rates`: of the last 1, 5 and 15 minutes, None for a mean of
        nothing; `models`: those that the workers serve; `workers`: each with its state, age and time since its last
        heartbeat (seconds), model, counts, pace, memory and the jobs in hand. What a worker says of itself is as old as
        its heartbeat.

    Raises:
        RedisError
    """
    snapshot = await read_snapshot(connection, queue, BUCKETS)
    depth = sum(snapshot.depths.values())
    waits = [seconds for seconds in snapshot.waits.values() if seconds is not None]
    workers = [_worker(entry, snapshot.time) for entry in snapshot.workers]
    status = {
        "version": __version__,
        "time": round(snapshot.time, 3),
        "queue": {
            "name": queue,
            "depth": depth,
            "by_priority": snapshot.depths,
            "oldest_wait_seconds": round(max(waits), 3) if waits else None,
        },
        "jobs": {"queued": depth, **snapshot.jobs},
        "totals": _totals(snapshot),
        "rates": rates(snapshot.recent, snapshot.time),
        "models": sorted({worker["model"] for worker in workers if worker["model"]}),
        "workers": workers,
        "redis": {"version": snapshot.redis_version},
    }
    return {**status, "history": points(snapshot.recent)} if history else status


def _totals(snapshot: Snapshot) -> dict[str, Any]:
    """Counts since the pool was first used, or left alone for a month."""
    totals = snapshot.totals
    return {
        **{name: whole(totals.get(name)) or 0 for name in COUNTS},
        "ended": [
            {"status": status, "reason": reason, "jobs": whole(totals.get(ended_field(status, reason))) or 0}
            for status, reason in OUTCOMES
        ],
        "restarts": {reason: whole(totals.get(restarts_field(reason))) or 0 for reason in RESTARTS},
    }


def _worker(entry: WorkerEntry, now: float) -> dict[str, Any]:
    fields = entry.fields
    max_batch = whole(fields.get("max_batch")) or 1
    batch_mean = real(fields.get("batch_mean"))
    kv_bytes, kv_limit = (whole(fields.get(name)) or 0 for name in ("kv_bytes", "kv_bytes_limit"))
    return {
        "name": entry.name,
        "state": text(fields.get("state")) or "?",
        "age_seconds": _age(fields.get("birth"), now),
        "heartbeat_age_seconds": _age(fields.get("last_heartbeat"), now),
        "host": text(fields.get("hostname")) or None,
        "pid": whole(fields.get("pid")),
        "model": text(fields.get("model")) or None,
        "computes_by": text(fields.get("computes_by")) or None,
        "blas": text(fields.get("blas")) or None,
        "weights": text(fields.get("weights")) or None,
        "drafts": text(fields.get("drafts")) or None,
        "threads": whole(fields.get("threads")),
        "version": text(fields.get("fastgpt2_version")) or None,
        "restarts": whole(fields.get("restarts")),
        "in_hand": entry.in_hand,
        "jobs": entry.jobs,
        "max_batch": max_batch,
        "batch_mean": batch_mean,
        "batch_occupancy": None if batch_mean is None else round(min(1.0, batch_mean / max_batch), 4),
        "kv_bytes": kv_bytes,
        "kv_bytes_limit": kv_limit,
        "kv_used": round(min(1.0, kv_bytes / kv_limit), 4) if kv_limit else None,
        "prefix_bytes": whole(fields.get("prefix_bytes")),
        "prefix_bytes_limit": whole(fields.get("prefix_bytes_limit")),
        "private_bytes": whole(fields.get("private_bytes")),
        "shared_bytes": whole(fields.get("shared_bytes")),
        "tokens": whole(fields.get("tokens")) or 0,
        "tokens_per_second": real(fields.get("tokens_per_second")),
        "steps": whole(fields.get("steps")) or 0,
        "step_seconds": real(fields.get("step_seconds")) or 0.0,
        "jobs_finished": whole(fields.get("successful_job_count")) or 0,
        "jobs_failed": whole(fields.get("failed_job_count")) or 0,
        "busy_seconds": round(real(fields.get("total_working_time")) or 0.0, 3),
    }


def _age(moment: Any, now: float) -> float | None:
    seconds = seconds_since(moment, now)
    return None if seconds is None else round(seconds, 1)
