"""What the pool is doing, read back from Redis: bounded work however many jobs there are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__

if TYPE_CHECKING:
    from redis.asyncio import Redis

# RQ's names for the sorted sets of jobs in each state (rq/registry.py).
_REGISTRIES = {
    "started": "rq:wip",
    "finished": "rq:finished",
    "failed": "rq:failed",
    "deferred": "rq:deferred",
    "scheduled": "rq:scheduled",
    "canceled": "rq:canceled",
}
MAX_WORKERS_SHOWN = 1000


async def read_status(connection: Redis, queue: str) -> dict[str, Any]:
    """The state of a queue and its workers, as JSON.

    Returns:
        `queue`: name and depth, `jobs`: counts by RQ's states (finished and failed ones until they expire), `workers`:
        each with its state, age and time since its last heartbeat (seconds), model, counts and the job in hand.
    """
    pipeline = connection.pipeline(transaction=False)
    pipeline.llen(f"rq:queue:{queue}")
    for key in _REGISTRIES.values():
        pipeline.zcard(f"{key}:{queue}")
    pipeline.smembers(f"rq:workers:{queue}")
    pipeline.info("server")
    depth, *counts, names, server = await pipeline.execute()

    names = sorted(names)[:MAX_WORKERS_SHOWN]
    for name in names:
        pipeline.hgetall(name)
        pipeline.srandmember(f"{name.decode()}:executions")
    answers = await pipeline.execute()
    now = datetime.now(UTC)
    workers = [
        _worker(name, fields, execution, now)
        for name, fields, execution in zip(names, answers[::2], answers[1::2], strict=True)
        if fields  # a worker that was killed stays in the set until RQ's upkeep finds its hash expired
    ]
    return {
        "version": __version__,
        "queue": {"name": queue, "depth": depth},
        "jobs": {"queued": depth, **dict(zip(_REGISTRIES, counts, strict=True))},
        "workers": workers,
        "redis": {"version": server.get("valkey_version") or server.get("redis_version")},
    }


def _worker(key: bytes, fields: dict[bytes, bytes], execution: bytes | None, now: datetime) -> dict[str, Any]:
    text = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    return {
        "name": key.decode().removeprefix("rq:worker:"),
        "state": text.get("state", "?"),
        "age_seconds": _seconds_since(text.get("birth"), now),
        "heartbeat_age_seconds": _seconds_since(text.get("last_heartbeat"), now),
        "host": text.get("hostname"),
        "pid": int(text["pid"]) if text.get("pid", "").isdigit() else None,
        "model": text.get("model"),
        "computes_by": text.get("computes_by"),
        "version": text.get("fastgpt2_version"),
        # RQ keeps a worker's executions as "job id:execution id".
        "job": execution.decode().split(":")[0] if execution else None,
        "jobs_finished": int(text.get("successful_job_count", 0)),
        "jobs_failed": int(text.get("failed_job_count", 0)),
        "busy_seconds": round(float(text.get("total_working_time", 0.0)), 3),
    }


def _seconds_since(moment: str | None, now: datetime) -> float | None:
    """RQ notes moments as ISO 8601 in UTC."""
    if not moment:
        return None
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return round(max(0.0, (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()), 1)
