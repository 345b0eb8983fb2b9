"""The state of a pool at one moment. Two round trips read it, with bounded work however many jobs there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.keys import (
    BUCKET_SECONDS,
    EXECUTIONS_SUFFIX,
    HEARD_FIELD,
    JOB_PREFIX,
    PRIORITIES,
    RECENT_FIELDS,
    REGISTRY_PREFIXES,
    SILENT,
    SILENT_SECONDS,
    TOTAL_FIELDS,
    WORKER_PREFIX,
    queue_key,
    queues_of,
    recent_key,
    registry_key,
    totals_key,
    workers_key,
)
from fastgpt2.protocol.untrusted import by_name, check_replies, real, seconds_since, text, whole

if TYPE_CHECKING:
    from redis.asyncio import Redis

MAX_WORKERS_SHOWN = 1000

# The limit for one worker's claimed jobs.
MAX_JOBS_SHOWN = 100

# RQ's own ids have 36 bytes, but an entry of a queue may be anything.
MAX_ID_BYTES = 1000

# The fields of a worker's hash: RQ's, and those that `fastgpt2.worker.reporting` adds.
_WORKER_FIELDS = (
    "state", "birth", "last_heartbeat", "hostname", "pid", "model", "computes_by", "fastgpt2_version", "max_batch",
    "kv_bytes", "kv_bytes_limit", "tokens", "steps", "step_seconds", "successful_job_count", "failed_job_count",
    "total_working_time", "tokens_per_second", "batch_mean", "private_bytes", "shared_bytes", "threads", "blas",
    "restarts", "prefix_bytes", "prefix_bytes_limit", "weights", "drafts", "n_positions", "notes", HEARD_FIELD,
)  # fmt: skip

# Keys that come from Redis are bytes, which need not be text.
_JOB_PREFIX, _WORKER_PREFIX, _EXECUTIONS = JOB_PREFIX.encode(), WORKER_PREFIX.encode(), EXECUTIONS_SUFFIX.encode()


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """A registered worker.

    Attributes:
        state: RQ's word for what it does, or "silent" if it was not heard of for `SILENT_SECONDS`; "?" if unknown.
        heard_seconds: how long ago its last heartbeat was; None if unknown.
        fields: the fields of its hash as they stand in Redis.
        claimed_jobs: the ids of jobs that it has claimed, running ones among them; at most `MAX_JOBS_SHOWN`.
        claimed_count: how many jobs it has claimed.
    """

    name: str
    state: str
    heard_seconds: float | None
    fields: dict[str, Any]
    claimed_jobs: list[str]
    claimed_count: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a pool.

    Attributes:
        time: the moment by Redis's clock, in seconds since 1970.
        depths: the number of waiting jobs, by priority.
        waits: the seconds that the job at the head of each queue has waited, by priority. None where the queue is
            empty, and where this user of Redis may not read jobs.
        jobs: the number of jobs by RQ's states, without those that wait.
        totals: those of `keys.TOTAL_FIELDS` that there are, as they stand in Redis.
        recent: for each bucket of ten seconds that was asked for, the latest first: the moment at which the bucket
            began, and those of `keys.RECENT_FIELDS` that there are.
        redis: what Redis says of itself (`INFO`), field by field.
        redis_version: the version of Redis or Valkey.
    """

    time: float
    depths: dict[str, int]
    waits: dict[str, float | None]
    jobs: dict[str, int]
    workers: list[WorkerEntry]
    totals: dict[str, Any]
    recent: list[tuple[int, dict[str, Any]]]
    redis: dict[str, Any]
    redis_version: str


async def read_snapshot(connection: Redis, queue: str, buckets: int = 0) -> Snapshot:
    """Read the state of a queue and its workers.

    Args:
        buckets: the number of recent hashes to read, that of this moment included.
    """
    queues = queues_of(queue)
    pipeline: Any = connection.pipeline(transaction=False)
    for name in queues:
        pipeline.llen(queue_key(name))
    for name in queues:
        pipeline.lindex(queue_key(name), 0)
    for state in REGISTRY_PREFIXES:
        for name in queues:
            pipeline.zcard(registry_key(state, name))
    pipeline.time()
    pipeline.info()
    pipeline.srandmember(workers_key(queue), MAX_WORKERS_SHOWN)
    pipeline.hmget(totals_key(queue), list(TOTAL_FIELDS))
    *counts, time, info, members, totals = check_replies(await pipeline.execute(raise_on_error=False))
    rows = [counts[at : at + len(queues)] for at in range(0, len(counts), len(queues))]
    depths, heads, registries = list(map(_count, rows[0])), rows[1], rows[2:]
    now = time[0] + time[1] / 1e6

    keys = sorted(key for key in members or () if isinstance(key, bytes) and key.startswith(_WORKER_PREFIX))
    waiting = [at for at, head in enumerate(heads) if isinstance(head, bytes) and len(head) <= MAX_ID_BYTES]
    starts = [int(now) // BUCKET_SECONDS * BUCKET_SECONDS - BUCKET_SECONDS * ago for ago in range(buckets)]
    for at in waiting:
        pipeline.hget(_JOB_PREFIX + heads[at], "enqueued_at")
    for key in keys:
        pipeline.hmget(key, list(_WORKER_FIELDS))
        pipeline.srandmember(key + _EXECUTIONS, MAX_JOBS_SHOWN)
        pipeline.scard(key + _EXECUTIONS)
    for start in starts:
        pipeline.hmget(recent_key(queue, start), list(RECENT_FIELDS))
    replies = await pipeline.execute(raise_on_error=False) if len(pipeline) else []
    enqueued, answers = _allow_denials(replies[: len(waiting)]), check_replies(replies[len(waiting) :])
    worker_replies, bucket_replies = answers[: 3 * len(keys)], answers[3 * len(keys) :]
    waits: list[float | None] = [None] * len(queues)
    for at, moment in zip(waiting, enqueued, strict=True):
        waits[at] = seconds_since(moment, now)
    entries = zip(keys, worker_replies[::3], worker_replies[1::3], worker_replies[2::3], strict=True)
    return Snapshot(
        time=now,
        depths=dict(zip(PRIORITIES, depths, strict=True)),
        waits=dict(zip(PRIORITIES, waits, strict=True)),
        jobs=dict(zip(REGISTRY_PREFIXES, (sum(map(_count, row)) for row in registries), strict=True)),
        workers=[entry for each in entries if (entry := _read_worker(*each, now)) is not None],
        totals=by_name(TOTAL_FIELDS, totals),
        recent=[(start, by_name(RECENT_FIELDS, reply)) for start, reply in zip(starts, bucket_replies, strict=True)],
        redis=info,
        redis_version=text(info.get("valkey_version") or info.get("redis_version")),
    )


def _read_worker(key: bytes, values: Any, executions: Any, claimed_count: Any, now: float) -> WorkerEntry | None:
    """Return None for a worker that was killed: its key stays in the set until RQ's upkeep finds its hash expired."""
    fields = by_name(_WORKER_FIELDS, values)
    if not fields:
        return None
    name = text(key.removeprefix(_WORKER_PREFIX))
    # RQ keeps a worker's executions as "job id:execution id".
    claimed_jobs = sorted({text(execution).rpartition(":")[0] for execution in executions or ()})
    heard = real(fields.get(HEARD_FIELD))
    # A stock `rq worker` tells the time of its own machine only.
    heard_seconds = seconds_since(fields.get("last_heartbeat"), now) if heard is None else max(0.0, now - heard)
    is_silent = heard_seconds is not None and heard_seconds > SILENT_SECONDS
    state = SILENT if is_silent else text(fields.get("state")) or "?"
    return WorkerEntry(name, state, heard_seconds, fields, claimed_jobs, _count(claimed_count))


def _count(reply: Any) -> int:
    return whole(reply) or 0


def _allow_denials(replies: list[Any]) -> list[Any]:
    """Return the replies, with None in place of each that denies this user of Redis to read a job."""
    from redis.exceptions import NoPermissionError

    return check_replies([None if isinstance(reply, NoPermissionError) else reply for reply in replies])
