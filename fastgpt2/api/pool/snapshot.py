"""The state of a pool at one moment, read in two round trips: bounded work however many jobs there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.keys import (
    BUCKET_SECONDS,
    PRIORITIES,
    RECENT_FIELDS,
    TOTAL_FIELDS,
    queues_of,
    recent_key,
    totals_key,
)
from fastgpt2.protocol.untrusted import by_name, check_replies, seconds_since, text, whole

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

# RQ's ids are of 36; an entry's may be anything.
MAX_ID_BYTES = 1000

# Fields of a worker's hash: RQ's, and those that `fastgpt2.worker.reporting` adds.
_WORKER_FIELDS = (
    "state", "birth", "last_heartbeat", "hostname", "pid", "model", "computes_by", "fastgpt2_version", "max_batch",
    "kv_bytes", "kv_bytes_limit", "tokens", "steps", "step_seconds", "successful_job_count", "failed_job_count",
    "total_working_time", "tokens_per_second", "batch_mean", "private_bytes", "shared_bytes", "threads", "blas",
    "restarts", "prefix_bytes", "prefix_bytes_limit", "weights", "drafts",
)  # fmt: skip
_WORKER_PREFIX = b"rq:worker:"


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """A registered worker: its fields as they stand in Redis, some of its jobs in hand, and how many these are."""

    name: str
    fields: dict[str, Any]
    jobs: list[str]
    in_hand: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a pool.

    Attributes:
        time: by Redis's clock, in seconds since 1970.
        depths: jobs that wait, by priority.
        waits: for how many seconds the job at the head of each queue has waited, by priority; None where the queue is
            empty, or it cannot be told: not by a user of Redis who may not read jobs.
        jobs: counts by RQ's states, those that wait apart.
        totals: of `measures.TOTAL_FIELDS`, what there is, as it stands in Redis.
        recent: of each ten seconds asked for, the latest first, the moment at which they began, and of
            `measures.RECENT_FIELDS` what there is.
        redis_version: of Redis or Valkey.
    """

    time: float
    depths: dict[str, int]
    waits: dict[str, float | None]
    jobs: dict[str, int]
    workers: list[WorkerEntry]
    totals: dict[str, Any]
    recent: list[tuple[int, dict[str, Any]]]
    redis_version: str


async def read_snapshot(connection: Redis, queue: str, buckets: int = 0) -> Snapshot:
    """The state of a queue and its workers.

    Args:
        buckets: how many of the recent hashes to read, that of this moment included.

    Raises:
        RedisError
    """
    queues = queues_of(queue)
    # Keys are bytes where they come from Redis: they need not be text.
    pipeline: Any = connection.pipeline(transaction=False)
    for name in queues:
        pipeline.llen(f"rq:queue:{name}")
    for name in queues:
        pipeline.lindex(f"rq:queue:{name}", 0)
    for registry in _REGISTRIES.values():
        for name in queues:
            pipeline.zcard(f"{registry}:{name}")
    pipeline.time()
    pipeline.info("server")
    pipeline.srandmember(f"rq:workers:{queue}", MAX_WORKERS_SHOWN)
    pipeline.hmget(totals_key(queue), list(TOTAL_FIELDS))
    *counts, time, server, members, totals = check_replies(await pipeline.execute(raise_on_error=False))
    rows = [counts[at : at + len(queues)] for at in range(0, len(counts), len(queues))]
    (depths, heads), registries = ([*map(_count, rows[0])], rows[1]), rows[2:]
    now = time[0] + time[1] / 1e6

    keys = sorted(key for key in members or () if isinstance(key, bytes) and key.startswith(_WORKER_PREFIX))
    waiting = [at for at, head in enumerate(heads) if isinstance(head, bytes) and len(head) <= MAX_ID_BYTES]
    starts = [int(now) // BUCKET_SECONDS * BUCKET_SECONDS - BUCKET_SECONDS * ago for ago in range(buckets)]
    for at in waiting:
        pipeline.hget(b"rq:job:" + heads[at], "enqueued_at")
    for key in keys:
        pipeline.hmget(key, list(_WORKER_FIELDS))
        pipeline.srandmember(key + b":executions", MAX_JOBS_SHOWN)
        pipeline.scard(key + b":executions")
    for start in starts:
        pipeline.hmget(recent_key(queue, start), list(RECENT_FIELDS))
    replies = await pipeline.execute(raise_on_error=False) if len(pipeline) else []
    enqueued, answers = _readable(replies[: len(waiting)]), check_replies(replies[len(waiting) :])
    of_workers, of_buckets = answers[: 3 * len(keys)], answers[3 * len(keys) :]
    waits: list[float | None] = [None] * len(queues)
    for at, moment in zip(waiting, enqueued, strict=True):
        waits[at] = seconds_since(moment, now)
    entries = zip(keys, of_workers[::3], of_workers[1::3], of_workers[2::3], strict=True)
    return Snapshot(
        time=now,
        depths=dict(zip(PRIORITIES, depths, strict=True)),
        waits=dict(zip(PRIORITIES, waits, strict=True)),
        jobs=dict(zip(_REGISTRIES, (sum(map(_count, row)) for row in registries), strict=True)),
        workers=[entry for each in entries if (entry := _worker(*each)) is not None],
        totals=by_name(TOTAL_FIELDS, totals),
        recent=[(start, by_name(RECENT_FIELDS, reply)) for start, reply in zip(starts, of_buckets, strict=True)],
        redis_version=text(server.get("valkey_version") or server.get("redis_version")),
    )


def _worker(key: bytes, values: Any, executions: Any, in_hand: Any) -> WorkerEntry | None:
    """None for a worker that was killed: it stays in the set until RQ's upkeep finds its hash expired."""
    fields = by_name(_WORKER_FIELDS, values)
    if not fields:
        return None
    name = text(key.removeprefix(_WORKER_PREFIX))
    # RQ keeps a worker's executions as "job id:execution id".
    jobs = sorted({text(execution).rpartition(":")[0] for execution in executions or ()})
    return WorkerEntry(name, fields, jobs, _count(in_hand))


def _count(reply: Any) -> int:
    return whole(reply) or 0


def _readable(replies: list[Any]) -> list[Any]:
    """The replies; None where this user of Redis may not read jobs."""
    from redis.exceptions import NoPermissionError

    return check_replies([None if isinstance(reply, NoPermissionError) else reply for reply in replies])
