"""What the pool is doing, read back from Redis: bounded work however many jobs there are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__
from fastgpt2.worker.names import PRIORITIES, queues_of

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
# Of each worker's jobs in hand.
MAX_JOBS_SHOWN = 100


async def read_status(connection: Redis, queue: str) -> dict[str, Any]:
    """The state of a queue and its workers, as JSON.

    Returns:
        `queue`: name, depth, and the depth by priority; `jobs`: counts by RQ's states (finished and failed ones until
        they expire); `workers`: each with its state, age and time since its last heartbeat (seconds), model, counts and
        the jobs in hand. What a worker says of its steps and its memory is as old as its heartbeat.
    """
    queues = queues_of(queue)
    pipeline = connection.pipeline(transaction=False)
    for name in queues:
        pipeline.llen(f"rq:queue:{name}")
    for key in _REGISTRIES.values():
        for name in queues:
            pipeline.zcard(f"{key}:{name}")
    pipeline.smembers(f"rq:workers:{queue}")
    pipeline.info("server")
    *counts, workers, server = await pipeline.execute()
    of_queues, *of_registries = [counts[at : at + len(queues)] for at in range(0, len(counts), len(queues))]

    names = sorted(workers)[:MAX_WORKERS_SHOWN]
    for key in names:
        pipeline.hgetall(key)
        pipeline.srandmember(f"{key.decode()}:executions", MAX_JOBS_SHOWN)
        pipeline.scard(f"{key.decode()}:executions")
    answers = await pipeline.execute()
    now = datetime.now(UTC)
    depth = sum(of_queues)
    return {
        "version": __version__,
        "queue": {"name": queue, "depth": depth, "by_priority": dict(zip(PRIORITIES, of_queues, strict=True))},
        "jobs": {"queued": depth, **dict(zip(_REGISTRIES, map(sum, of_registries), strict=True))},
        "workers": [
            _worker(key, fields, executions, in_hand, now)
            for key, fields, executions, in_hand in zip(names, answers[::3], answers[1::3], answers[2::3], strict=True)
            if fields  # a worker that was killed stays in the set until RQ's upkeep finds its hash expired
        ],
        "redis": {"version": server.get("valkey_version") or server.get("redis_version")},
    }


def _worker(
    key: bytes, fields: dict[bytes, bytes], executions: list[bytes], in_hand: int, now: datetime
) -> dict[str, Any]:
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
        "in_hand": in_hand,
        # RQ keeps a worker's executions as "job id:execution id".
        "jobs": sorted({execution.decode().rpartition(":")[0] for execution in executions}),
        "max_batch": int(text.get("max_batch", 1)),
        "kv_bytes": int(text.get("kv_bytes", 0)),
        "kv_bytes_limit": int(text.get("kv_bytes_limit", 0)),
        "tokens": int(text.get("tokens", 0)),
        "steps": int(text.get("steps", 0)),
        "step_seconds": float(text.get("step_seconds", 0.0)),
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
