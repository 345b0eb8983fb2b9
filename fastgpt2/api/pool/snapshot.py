"""The state of a pool at one moment. Three round trips read it, with bounded work however many jobs there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.keys import (
    BUCKET_SECONDS,
    CHAT_FIELD,
    EXECUTIONS_SUFFIX,
    HEARD_FIELD,
    JOB_PREFIX,
    MAX_MODELS_OF_POOL,
    MAX_MODELS_OF_WORKER,
    MODEL_FIELD,
    MODELS_FIELD,
    NAMED_ONLY_FIELD,
    PRIORITIES,
    RECENT_FIELDS,
    REGISTRY_PREFIXES,
    SILENT,
    SILENT_SECONDS,
    TOTAL_FIELDS,
    WORKER_PREFIX,
    Priority,
    model_totals_name,
    models_key,
    queue_key,
    queue_of,
    recent_key,
    registry_key,
    totals_key,
    workers_key,
)
from fastgpt2.protocol.untrusted import (
    by_name,
    check_replies,
    read_model_list,
    read_model_names,
    real,
    seconds_since,
    text,
    whole,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

MAX_WORKERS_SHOWN = 1000

# The limit for one worker's claimed jobs.
MAX_JOBS_SHOWN = 100

# RQ's own ids have 36 bytes, but an entry of a queue may be anything.
MAX_ID_BYTES = 1000

# The fields of a worker's hash: RQ's, and those that `fastgpt2.worker.reporting` adds.
_WORKER_FIELDS = (
    "state", "birth", "last_heartbeat", "hostname", "pid", MODEL_FIELD, "computes_by", "fastgpt2_version", "max_batch",
    "kv_bytes", "kv_bytes_limit", "tokens", "steps", "step_seconds", "successful_job_count", "failed_job_count",
    "total_working_time", "tokens_per_second", "batch_mean", "private_bytes", "shared_bytes", "threads", "blas",
    "restarts", "prefix_bytes", "prefix_bytes_limit", "weights", "drafts", "n_positions", "notes", MODELS_FIELD,
    NAMED_ONLY_FIELD, CHAT_FIELD, HEARD_FIELD,
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
        models: the names of its model by which jobs ask for it; results have the first. Empty if it tells none.
        claimed_jobs: the ids of jobs that it has claimed, running ones among them; at most `MAX_JOBS_SHOWN`.
        claimed_count: how many jobs it has claimed.
    """

    name: str
    state: str
    heard_seconds: float | None
    fields: dict[str, Any]
    models: tuple[str, ...]
    claimed_jobs: list[str]
    claimed_count: int


@dataclass(frozen=True, slots=True)
class QueueState:
    """The queue of one priority, of the jobs that name no model or of those that name one.

    Attributes:
        model: the name that the jobs give; None if they give none.
        depth: the number of waiting jobs.
        wait: the seconds that the job at the head has waited. None if the queue is empty, and where this user of Redis
            may not read jobs.
    """

    model: str | None
    priority: Priority
    depth: int
    wait: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a pool.

    Attributes:
        time: the moment by Redis's clock, in seconds since 1970.
        queues: all queues of the pool.
        jobs: the number of jobs by RQ's states, without those that wait.
        models: the names that jobs may give and did lately, each with the seconds for which a live worker is known to
            serve it; 0 for a name that none serves any more.
        totals: those of `keys.TOTAL_FIELDS` that there are, as they stand in Redis.
        totals_by_model: the same of each model whose workers have this first name.
        recent: for each bucket of ten seconds that was asked for, the latest first: the moment at which the bucket
            began, and those of `keys.RECENT_FIELDS` that there are.
        redis: what Redis says of itself (`INFO`), field by field.
        redis_version: the version of Redis or Valkey.
    """

    time: float
    queues: list[QueueState]
    jobs: dict[str, int]
    workers: list[WorkerEntry]
    models: dict[str, float]
    totals: dict[str, Any]
    totals_by_model: dict[str, dict[str, Any]]
    recent: list[tuple[int, dict[str, Any]]]
    redis: dict[str, Any]
    redis_version: str

    def depths(self, model: str | None = None) -> dict[str, int]:
        """Return the number of waiting jobs by priority: of all jobs, or of those that name this model."""
        return {priority: sum(queue.depth for queue in self._of(priority, model)) for priority in PRIORITIES}

    def waits(self, model: str | None = None) -> dict[str, float | None]:
        """Return the longest wait by priority, of the same jobs; None if none waits, and where that cannot be read."""
        return {
            priority: max((queue.wait for queue in self._of(priority, model) if queue.wait is not None), default=None)
            for priority in PRIORITIES
        }

    def _of(self, priority: str, model: str | None) -> Iterator[QueueState]:
        return (queue for queue in self.queues if queue.priority == priority and model in (None, queue.model))


async def read_snapshot(connection: Redis, queue: str, buckets: int = 0) -> Snapshot:
    """Read the state of a pool.

    Args:
        queue: the pool's name.
        buckets: the number of recent hashes to read, that of this moment included.
    """
    pipeline: Any = connection.pipeline(transaction=False)
    pipeline.time()
    pipeline.info()
    pipeline.zrange(models_key(queue), -MAX_MODELS_OF_POOL, -1, withscores=True)
    pipeline.srandmember(workers_key(queue), MAX_WORKERS_SHOWN)
    pipeline.hmget(totals_key(queue), list(TOTAL_FIELDS))
    time, info, names, members, totals = check_replies(await pipeline.execute(raise_on_error=False))
    now = time[0] + time[1] / 1e6
    models = {name: max(0.0, until / 1000 - now) for name, until in _read_names(names)}
    table = await _read_queues(pipeline, queue, list(models))

    keys = sorted(key for key in members or () if isinstance(key, bytes) and key.startswith(_WORKER_PREFIX))
    waiting = [at for at, head in enumerate(table.heads) if isinstance(head, bytes) and len(head) <= MAX_ID_BYTES]
    starts = [int(now) // BUCKET_SECONDS * BUCKET_SECONDS - BUCKET_SECONDS * ago for ago in range(buckets)]
    for at in waiting:
        pipeline.hget(_JOB_PREFIX + table.heads[at], "enqueued_at")
    for key in keys:
        pipeline.hmget(key, list(_WORKER_FIELDS))
        pipeline.srandmember(key + _EXECUTIONS, MAX_JOBS_SHOWN)
        pipeline.scard(key + _EXECUTIONS)
    for start in starts:
        pipeline.hmget(recent_key(queue, start), list(RECENT_FIELDS))
    replies = await pipeline.execute(raise_on_error=False) if len(pipeline) else []
    enqueued, answers = _allow_denials(replies[: len(waiting)]), check_replies(replies[len(waiting) :])
    worker_replies, bucket_replies = answers[: 3 * len(keys)], answers[3 * len(keys) :]
    entries = zip(keys, worker_replies[::3], worker_replies[1::3], worker_replies[2::3], strict=True)
    return Snapshot(
        time=now,
        queues=table.states({at: seconds_since(moment, now) for at, moment in zip(waiting, enqueued, strict=True)}),
        jobs=table.jobs,
        workers=[entry for each in entries if (entry := _read_worker(*each, now)) is not None],
        models=models,
        totals=by_name(TOTAL_FIELDS, totals),
        totals_by_model=table.totals,
        recent=[(start, by_name(RECENT_FIELDS, reply)) for start, reply in zip(starts, bucket_replies, strict=True)],
        redis=info,
        redis_version=text(info.get("valkey_version") or info.get("redis_version")),
    )


@dataclass(frozen=True, slots=True)
class _QueueTable:
    """What stands in the pool's queues and beside them.

    Attributes:
        kinds: the model and the priority of each queue.
        depths, heads: the number of jobs in each queue, and the id of the first.
        jobs: see `Snapshot`.
        totals: see `Snapshot.totals_by_model`.
    """

    kinds: list[tuple[str | None, Priority]]
    depths: list[int]
    heads: list[Any]
    jobs: dict[str, int]
    totals: dict[str, dict[str, Any]]

    def states(self, waits: Mapping[int, float | None]) -> list[QueueState]:
        """Return the state of each queue.

        Args:
            waits: the wait of the job at a queue's head, by the queue's place here.
        """
        return [
            QueueState(*kind, depth, waits.get(at))
            for at, (kind, depth) in enumerate(zip(self.kinds, self.depths, strict=True))
        ]


async def _read_queues(pipeline: Any, queue: str, models: Sequence[str]) -> _QueueTable:
    """Read all queues of a pool that knows these models."""
    kinds = [(model, priority) for priority in PRIORITIES for model in (None, *models)]
    names = [queue_of(queue, priority, model) for model, priority in kinds]
    for name in names:
        pipeline.llen(queue_key(name))
    for name in names:
        pipeline.lindex(queue_key(name), 0)
    for state in REGISTRY_PREFIXES:
        for name in names:
            pipeline.zcard(registry_key(state, name))
    for model in models:
        pipeline.hmget(totals_key(model_totals_name(queue, model)), list(TOTAL_FIELDS))
    replies = check_replies(await pipeline.execute(raise_on_error=False))
    depths, heads, *registries = (
        replies[at : at + len(names)] for at in range(0, (2 + len(REGISTRY_PREFIXES)) * len(names), len(names))
    )
    totals = zip(models, replies[len(replies) - len(models) :], strict=True)
    return _QueueTable(
        kinds,
        list(map(_count, depths)),
        heads,
        dict(zip(REGISTRY_PREFIXES, (sum(map(_count, row)) for row in registries), strict=True)),
        {model: found for model, reply in totals if (found := by_name(TOTAL_FIELDS, reply))},
    )


def _read_names(reply: Any) -> Iterator[tuple[str, float]]:
    """Yield the models' names that the pool knows, each with the moment until which a worker serves it, in ms."""
    for member, score in reply or ():
        until = real(score)
        if until is not None:
            yield from ((name, until) for name in read_model_names([member]))


def read_models(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a worker's model, the first one first, from fields of its hash; () if it tells none.

    A worker of an earlier release has one name, and no list.
    """
    names = read_model_list(fields.get(MODELS_FIELD)) or read_model_names([fields.get(MODEL_FIELD)])
    return tuple(dict.fromkeys(names[:MAX_MODELS_OF_WORKER]))


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
    return WorkerEntry(name, state, heard_seconds, fields, read_models(fields), claimed_jobs, _count(claimed_count))


def _count(reply: Any) -> int:
    return whole(reply) or 0


def _allow_denials(replies: list[Any]) -> list[Any]:
    """Return the replies, with None in place of each that denies this user of Redis to read a job."""
    from redis.exceptions import NoPermissionError

    return check_replies([None if isinstance(reply, NoPermissionError) else reply for reply in replies])
