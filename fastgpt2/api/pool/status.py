"""The state of a pool: what it does now, what it did lately, and whether it would serve a job.

All of it is read from Redis, so that every endpoint tells the same. What the pool did lately stands there as workers
report it, in one hash for each ten seconds: rates, means and the history come from these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__
from fastgpt2.api.pool.by_model import ModelState, read_model_states
from fastgpt2.api.pool.snapshot import Snapshot, WorkerEntry, read_snapshot
from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import real, seconds_since, text, whole

if TYPE_CHECKING:
    from redis.asyncio import Redis

# The points of the history: fifteen minutes.
POINTS = 90
WINDOWS = {"1m": 60, "5m": 300, "15m": 900}

# All points, and the ten seconds that are not over yet.
BUCKETS = POINTS + 1

# Notes of the greatest length: JSON writes at most twelve bytes for a character, and some around each note.
_MAX_NOTES_BYTES = keys.MAX_NOTES * (12 * keys.MAX_NOTE_CHARACTERS + 100)

# What a worker may not tell of its memory.
_OPTIONAL_BYTES = ("prefix_bytes", "prefix_bytes_limit", "private_bytes", "shared_bytes")

_RECORD_DEPTH = Script(__file__, "record_depth")
_COUNT_SERVING = Script(__file__, "count_serving")


async def read_status(connection: Redis, queue: str, history: bool = False) -> dict[str, Any]:
    """Read the state of a pool, as JSON.

    Args:
        history: add what the pool did in each ten seconds of the last fifteen minutes.

    Returns:
        `queue`: the queue's name, its depth, the depth by priority, and the longest time in seconds that the job at
        the head of a queue has waited (None if no job waits). `jobs`: counts by RQ's states; finished and failed jobs
        count until they expire. `totals`: what was counted since the pool was first used. `rates`: those of the last
        1, 5 and 15 minutes, and None for a mean of nothing. `models`: the names of the models that the workers serve.
        `by_model`: for each name, the workers that serve it, what waits for it, and what was done. `workers`: each
        with its state (RQ's word, or "silent" for one that hangs), age and time since its last heartbeat (seconds), the
        names of its model, notes on the model, counts, pace, memory and the jobs that it has claimed (`in_hand` is
        their number). What a worker says of itself is as old as its heartbeat.
    """
    snapshot = await read_snapshot(connection, queue, BUCKETS)
    depths = snapshot.depths()
    depth = sum(depths.values())
    workers = [_describe_worker(entry, snapshot.time) for entry in snapshot.workers]
    status = {
        "version": __version__,
        "time": round(snapshot.time, 3),
        "queue": {
            "name": queue,
            "depth": depth,
            "by_priority": depths,
            "oldest_wait_seconds": _longest(snapshot.waits()),
        },
        "jobs": {"queued": depth, **snapshot.jobs},
        "totals": _totals(snapshot),
        "rates": _rates(snapshot.recent, snapshot.time),
        "models": sorted({name for entry in snapshot.workers for name in entry.models}),
        "by_model": {state.name: _describe_model(state, snapshot) for state in read_model_states(snapshot)},
        "workers": workers,
        "redis": {"version": snapshot.redis_version},
    }
    return {**status, "history": _history(snapshot.recent)} if history else status


def _longest(waits: dict[str, float | None]) -> float | None:
    known = [seconds for seconds in waits.values() if seconds is not None]
    return round(max(known), 3) if known else None


def _describe_model(state: ModelState, snapshot: Snapshot) -> dict[str, Any]:
    """Return the figures of one name. What was done counts with the first name of the workers that did it."""
    depths, totals = snapshot.depths(state.name), snapshot.totals_by_model.get(state.name, {})
    ended = {outcome: whole(totals.get(keys.ended_field(*outcome))) or 0 for outcome in keys.OUTCOMES}
    return {
        "served": state.is_served,
        "models": sorted({worker.models[0] for worker in state.workers}),
        "workers": len(state.serving),
        "silent": len(state.workers) - len(state.serving),
        "depth": sum(depths.values()),
        "by_priority": depths,
        "oldest_wait_seconds": _longest(snapshot.waits(state.name)),
        "in_hand": sum(worker.claimed_count for worker in state.serving),
        "max_batch": sum(whole(worker.fields.get("max_batch")) or 1 for worker in state.serving),
        "tokens_per_second": round(sum(real(one.fields.get("tokens_per_second")) or 0.0 for one in state.serving), 3),
        "totals": {
            **{name: whole(totals.get(name)) or 0 for name in keys.TOKEN_COUNTS},
            "finished": sum(count for (status, _), count in ended.items() if status == "finished"),
            "failed": sum(count for (status, _), count in ended.items() if status == "failed"),
        },
    }


def _totals(snapshot: Snapshot) -> dict[str, Any]:
    """Return the counts since the pool was first used, or since it was used again after a month without use."""
    totals = snapshot.totals
    return {
        **{name: whole(totals.get(name)) or 0 for name in keys.COUNTS},
        "ended": [
            {"status": status, "reason": reason, "jobs": whole(totals.get(keys.ended_field(status, reason))) or 0}
            for status, reason in keys.OUTCOMES
        ],
        "restarts": {reason: whole(totals.get(keys.restarts_field(reason))) or 0 for reason in keys.RESTARTS},
    }


def _describe_worker(entry: WorkerEntry, now: float) -> dict[str, Any]:
    fields = entry.fields
    max_batch = whole(fields.get("max_batch")) or 1
    batch_mean = real(fields.get("batch_mean"))
    kv_bytes, kv_limit = (whole(fields.get(name)) or 0 for name in ("kv_bytes", "kv_bytes_limit"))
    return {
        "name": entry.name,
        "state": entry.state,
        "age_seconds": _age(seconds_since(fields.get("birth"), now)),
        "heartbeat_age_seconds": _age(entry.heard_seconds),
        "host": text(fields.get("hostname")) or None,
        "pid": whole(fields.get("pid")),
        "model": entry.models[0] if entry.models else None,
        "models": list(entry.models),
        "named_only": fields.get(keys.NAMED_ONLY_FIELD) == b"1",
        "chat": fields.get(keys.CHAT_FIELD) == b"1",
        **{name: text(fields.get(name)) or None for name in ("computes_by", "blas", "weights", "drafts")},
        "notes": _read_notes(fields.get("notes")),
        "n_positions": whole(fields.get("n_positions")),
        "threads": whole(fields.get("threads")),
        "version": text(fields.get("fastgpt2_version")) or None,
        "restarts": whole(fields.get("restarts")),
        "in_hand": entry.claimed_count,
        "jobs": entry.claimed_jobs,
        "max_batch": max_batch,
        "batch_mean": batch_mean,
        "batch_occupancy": None if batch_mean is None else round(min(1.0, batch_mean / max_batch), 4),
        "kv_bytes": kv_bytes,
        "kv_bytes_limit": kv_limit,
        "kv_used": round(min(1.0, kv_bytes / kv_limit), 4) if kv_limit else None,
        **{name: whole(fields.get(name)) for name in _OPTIONAL_BYTES},
        "tokens": whole(fields.get("tokens")) or 0,
        "tokens_per_second": real(fields.get("tokens_per_second")),
        "steps": whole(fields.get("steps")) or 0,
        "step_seconds": real(fields.get("step_seconds")) or 0.0,
        "jobs_finished": whole(fields.get("successful_job_count")) or 0,
        "jobs_failed": whole(fields.get("failed_job_count")) or 0,
        "busy_seconds": round(real(fields.get("total_working_time")) or 0.0, 3),
    }


def _read_notes(value: Any) -> list[str]:
    """Return the notes that a worker has written; [] if the value is none, or longer than a worker would write it."""
    if not isinstance(value, bytes | str) or len(value) > _MAX_NOTES_BYTES:
        return []
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return []
    notes = (
        [one[: keys.MAX_NOTE_CHARACTERS] for one in found if isinstance(one, str)] if isinstance(found, list) else []
    )
    return notes[: keys.MAX_NOTES]


def _age(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


async def record_depth(connection: Redis, queue: str) -> None:
    """Write down how many jobs wait, for the history. Any number of endpoints may do so, however often.

    Raises:
        RedisError: Redis cannot be reached, or takes nothing that is new.
    """
    arguments = (keys.recent_key(queue, ""), keys.models_key(queue), *keys.queues_of(queue))
    await _RECORD_DEPTH.run_async(connection, (), arguments)


def _rates(recent: Sequence[tuple[int, dict[str, Any]]], now: float) -> dict[str, dict[str, float | None]]:
    """Return the figures of each window, over all its full buckets and the one that is not over yet.

    Args:
        recent: `Snapshot.recent`, of `BUCKETS` buckets.
        now: `Snapshot.time`.
    """
    found = {}
    for name, seconds in WINDOWS.items():
        buckets = recent[: seconds // keys.BUCKET_SECONDS + 1]
        counts: dict[str, float] = dict.fromkeys(keys.RECENT_FIELDS, 0.0)
        for _, fields in buckets:
            for field, value in fields.items():
                counts[field] += real(value) or 0.0
        found[name] = _figures(counts, max(1.0, now - buckets[-1][0]))
    return found


def _history(recent: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return a point for each ten seconds that are over, the oldest first; None is a figure that nobody reported."""
    found = []
    for start, fields in reversed(recent[1:]):
        counts = {field: real(value) or 0.0 for field, value in fields.items()}
        known = any(field in counts for field in (keys.TOKENS, keys.JOBS, keys.STEPS))
        point: dict[str, Any] = _figures({**dict.fromkeys(keys.RECENT_FIELDS, 0.0), **counts}, keys.BUCKET_SECONDS)
        if not known and keys.DEPTH not in counts:
            point = dict.fromkeys(point)
        room = counts.get(keys.ROOM, 0.0)
        point["batch_occupancy"] = round(min(1.0, counts.get(keys.SEQUENCES, 0.0) / room), 4) if room else None
        found.append({"at": start, **point, "depth": int(counts[keys.DEPTH]) if keys.DEPTH in counts else None})
    return {"seconds": keys.BUCKET_SECONDS, "points": found}


def _figures(counts: dict[str, float], seconds: float) -> dict[str, float | None]:
    return {
        "tokens_per_second": round(counts[keys.TOKENS] / seconds, 3),
        "jobs_per_second": round(counts[keys.JOBS] / seconds, 4),
        "failed_per_second": round(counts[keys.FAILED] / seconds, 4),
        **{each.name: _mean(counts[each.sum_field], counts[keys.count_field(each)]) for each in keys.OF_JOBS},
        "batch": _mean(counts[keys.SEQUENCES], counts[keys.STEPS]),
    }


def _mean(total: float, count: float) -> float | None:
    return round(total / count, 6) if count else None


async def check_readiness(connection: Redis, queue: str) -> str | None:
    """Return why no job would be served now, as a sentence that anybody may read; None if one would.

    A worker takes a lease once its model is loaded and warmed up. The lease ends seconds after the worker's last sign
    of life. Of a worker that hangs a thread goes on to renew the lease, but its loop is not heard of any more.

    Raises:
        RedisError: Redis cannot be reached, which is a reason of its own.
    """
    arguments = (keys.leases_key(queue), int(keys.LEASE_SECONDS * 1000))
    suspended, leases, serving = await _COUNT_SERVING.run_async(connection, (), arguments)
    if suspended:
        return "all workers are suspended: `rq resume --url REDIS_URL` lets them go on"
    if not leases:
        return (
            "no worker that has loaded its model lives on this queue: start some with `fastgpt2 up` or `fastgpt2 "
            "pool`, or wait until those that start are ready"
        )
    if not serving:
        return f"all workers are silent, {leases} of them: they hang, or do not reach Redis; their logs may say why"
    return await _find_refusal(connection, queue)


async def _find_refusal(connection: Redis, queue: str) -> str | None:
    """Return why Redis takes no jobs, though it can be read: it may be full, a replica, or unable to save its data.

    The depth of the queue is written for the trial, as every ten seconds anyway.
    """
    from redis.exceptions import ResponseError

    try:
        await record_depth(connection, queue)
    except ResponseError as error:
        return f"Redis takes no jobs ({str(error)[:120]}): mend that, or name another one in FASTGPT2_REDIS_URL"
    return None
