"""What the pool is doing, as JSON: read from Redis, so that every endpoint tells the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__
from fastgpt2.api.pool.snapshot import Snapshot, WorkerEntry, read_snapshot
from fastgpt2.protocol.keys import (
    BUCKET_SECONDS,
    COUNTS,
    DEPTH,
    FAILED,
    JOBS,
    LEASE_SECONDS,
    OF_JOBS,
    OUTCOMES,
    RECENT_FIELDS,
    RECENT_TTL_SECONDS,
    RESTARTS,
    ROOM,
    SEQUENCES,
    STEPS,
    TOKENS,
    count_field,
    ended_field,
    leases_key,
    queues_of,
    recent_key,
    restarts_field,
)
from fastgpt2.protocol.untrusted import real, seconds_since, text, whole

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


# NOTE api.recent: What the pool did lately, from what workers told by ten seconds at a time: rates, means, a history.
POINTS = 90
WINDOWS = {"1m": 60, "5m": 300, "15m": 900}

# All points, and the ten seconds that are not over yet.
BUCKETS = POINTS + 1

# What the recent hashes of one pool begin with, and its queues. The time is Redis's own, as with what workers tell.
_SAMPLE = f"""
local now, depth = tonumber(redis.call('TIME')[1]), 0
for i = 2, #ARGV do
    local length = redis.pcall('LLEN', 'rq:queue:' .. ARGV[i])
    if type(length) == 'number' then depth = depth + length end
end
local key = ARGV[1] .. string.format('%d', now - now % {BUCKET_SECONDS})
redis.pcall('HSET', key, '{DEPTH}', depth)
redis.pcall('EXPIRE', key, {RECENT_TTL_SECONDS})
return depth
"""


async def sample(connection: Redis, queue: str) -> None:
    """Note how many jobs wait, for the history. To be called every ten seconds, by any number of endpoints.

    Raises:
        RedisError
    """
    # The keys are no KEYS: a user of Redis would need all rights to them, not only those that are used.
    await connection.eval(_SAMPLE, 0, recent_key(queue, ""), *queues_of(queue))


def rates(recent: Sequence[tuple[int, dict[str, Any]]], now: float) -> dict[str, dict[str, float | None]]:
    """By window: of as many full buckets as it has, and the one that is not over yet.

    Args:
        recent: `Snapshot.recent`, of `BUCKETS` buckets.
        now: `Snapshot.time`.
    """
    found = {}
    for name, seconds in WINDOWS.items():
        buckets = recent[: seconds // BUCKET_SECONDS + 1]
        counts: dict[str, float] = dict.fromkeys(RECENT_FIELDS, 0.0)
        for _, fields in buckets:
            for field, value in fields.items():
                counts[field] += real(value) or 0.0
        found[name] = _figures(counts, max(1.0, now - buckets[-1][0]))
    return found


def points(recent: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """A point for each ten seconds that are over, the oldest first; null is what nobody told."""
    found = []
    for start, fields in reversed(recent[1:]):
        counts = {field: real(value) or 0.0 for field, value in fields.items()}
        known = any(field in counts for field in (TOKENS, JOBS, STEPS))
        point: dict[str, Any] = _figures({**dict.fromkeys(RECENT_FIELDS, 0.0), **counts}, BUCKET_SECONDS)
        if not known and DEPTH not in counts:
            point = dict.fromkeys(point)
        room = counts.get(ROOM, 0.0)
        point["batch_occupancy"] = round(min(1.0, counts.get(SEQUENCES, 0.0) / room), 4) if room else None
        found.append({"at": start, **point, "depth": int(counts[DEPTH]) if DEPTH in counts else None})
    return {"seconds": BUCKET_SECONDS, "points": found}


def _figures(counts: dict[str, float], seconds: float) -> dict[str, float | None]:
    return {
        "tokens_per_second": round(counts[TOKENS] / seconds, 3),
        "jobs_per_second": round(counts[JOBS] / seconds, 4),
        "failed_per_second": round(counts[FAILED] / seconds, 4),
        **{each.name: _mean(counts[each.sum_field], counts[count_field(each)]) for each in OF_JOBS},
        "batch": _mean(counts[SEQUENCES], counts[STEPS]),
    }


def _mean(total: float, count: float) -> float | None:
    return round(total / count, 6) if count else None


# NOTE api.readiness: Whether the pool would serve a job now.

# ARGV: the leases, the length of one in ms. How many reach beyond this moment by Redis's clock, and no further than any
# can that was taken now. Not by KEYS, to which a user of Redis would need all rights.
_LIVING = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = redis.pcall('ZCOUNT', ARGV[1], '(' .. string.format('%.0f', now), string.format('%.0f', now + ARGV[2]))
if type(count) ~= 'number' then return 0 end
return count
"""


async def not_ready(connection: Redis, queue: str) -> str | None:
    """Why no job would be served now, as a sentence for everybody to read; None if at least one worker lives.

    A worker takes a lease when its model is loaded and warmed up, and loses it seconds after it was heard of last.

    Raises:
        RedisError: Redis cannot be reached, which is a reason of its own.
    """
    living: Any = await connection.eval(_LIVING, 0, leases_key(queue), int(LEASE_SECONDS * 1000))
    if living:
        return None
    return (
        "no worker that has loaded its model lives on this queue: start some with `fastgpt2 up` or `fastgpt2 pool`, or "
        "wait until those that start are ready"
    )
