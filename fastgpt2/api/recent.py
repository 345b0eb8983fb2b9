"""What the pool did lately, from what workers told by ten seconds at a time: rates, means, a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2.api.replies import real
from fastgpt2.worker.measures import (
    BUCKET_SECONDS,
    DEPTH,
    FAILED,
    JOBS,
    OF_JOBS,
    RECENT_FIELDS,
    RECENT_TTL_SECONDS,
    ROOM,
    SEQUENCES,
    STEPS,
    TOKENS,
    count_field,
)
from fastgpt2.worker.names import queues_of, recent_key

if TYPE_CHECKING:
    from redis.asyncio import Redis

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
