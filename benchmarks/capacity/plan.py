"""The formula by which a number of workers is planned, with the coefficients that `capacity.py` has measured.

Everything here is derived; nothing is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastgpt2.bench import Values

WORKERS = 1000
# New tokens of a job.
LENGTHS = (32, 128, 500)
# When more of its core is taken, a Redis makes commands wait for those before them.
SHARE = 0.7
# Connections that are left for clients and endpoints.
SPARE_CONNECTIONS = 1000
KEPT_SECONDS = 600.0


@dataclass(frozen=True)
class Coefficients:
    """The share of Redis and of a host that one worker on one core, and its jobs, take.

    Costs of Redis are microseconds of its main thread, and bytes.

    Attributes:
        job, step, piece: costs of a job, of a worker's step, of a piece of streamed text.
        read, piece_read: costs of reading a job's end, and a piece of streamed text.
        beside: cost per second of a busy worker beside its jobs: its lease.
        idle: cost per second of a worker that waits.
        connections, redis_bytes: connections to Redis, and bytes of Redis, of a worker.
        kept, kept_token: bytes of a finished job, and of each of its new tokens.
        kept_stream, kept_piece: bytes that a streamed job takes beside these, and each of its pieces.
        tokens_per_s: of a worker, while all cores are busy with such workers.
        in_flight: jobs that a worker runs at once.
        weights, private: bytes of a host that its workers share, and bytes of each worker.
        kv_token: bytes of each position of a running job.
        maxclients: the most connections of Redis.
    """

    job: float
    step: float
    piece: float
    read: float
    piece_read: float
    beside: float
    idle: float
    connections: float
    redis_bytes: float
    kept: float
    kept_token: float
    kept_stream: float
    kept_piece: float
    tokens_per_s: float
    in_flight: int
    weights: float
    private: float
    kv_token: int
    maxclients: int


def coefficients(result: Values, entry: Values) -> Coefficients | None:
    """Return the coefficients of one model, None if a part was not measured."""
    if not all(part in result for part in ("redis", "idle", "memory")) or "pools" not in entry:
        return None
    redis, fleet = result["redis"], result["idle"]["counts"][-1]
    thousand = next(found for found in reversed(result["idle"]["thousand"]["beats"]) if not found["silent"])
    plain, streamed = (
        {each["new_tokens"]: each["bytes_each"] for each in result["memory"] if is_finished(each, stream)}
        for stream in (False, True)
    )
    least, most = min(plain), max(plain)
    token = max(0.0, (plain[most] - plain[least]) / (most - least))
    more = {tokens: streamed[tokens] - plain[tokens] for tokens in plain}
    piece = max(0.0, (more[most] - more[least]) / (most - least))
    pool, memory = entry["pools"][-1], entry["memory"][-1]
    return Coefficients(
        **{name: redis["costs_us"][name]["median"] for name in ("job", "step", "piece", "read", "piece_read")},
        beside=thousand["us_each"] * thousand["beats_per_s"] / thousand["leases"],
        idle=fleet["cpu_us_per_s_each"],
        connections=fleet["connections_each"],
        redis_bytes=fleet["memory_bytes_each"],
        kept=plain[least] - token * least,
        kept_token=token,
        kept_stream=more[least] - piece * least,
        kept_piece=piece,
        tokens_per_s=pool["tokens_per_s"]["short"]["median"] / pool["workers"],
        in_flight=entry["in_flight"],
        weights=memory["shared_bytes"]["median"],
        private=memory["private_bytes"]["median"],
        kv_token=entry["kv_bytes_per_token"],
        maxclients=redis["server"]["maxclients"],
    )


def is_finished(each: Values, stream: bool) -> bool:
    """Tell whether an entry about memory is about finished jobs, streamed or not."""
    return bool(each["state"] == "finished" and each["stream"] == stream)


def planned(c: Coefficients, tokens: int, stream: bool, workers: int = WORKERS) -> dict[str, Any]:
    """Return what busy workers and their jobs take, and how many of these workers one Redis bears.

    All jobs are read; a streamed job has a piece of text for each token. The tokens/s are taken to be those measured,
    whatever the jobs' length.

    Args:
        tokens: new tokens of each job.
    """
    tokens_per_s = workers * c.tokens_per_s
    jobs_per_s = tokens_per_s / tokens
    us = jobs_per_s * (c.job + c.read) + tokens_per_s / c.in_flight * c.step + workers * c.beside
    kept = c.kept + c.kept_token * tokens
    if stream:
        us += tokens_per_s * (c.piece + c.piece_read)
        kept += c.kept_stream + c.kept_piece * tokens
    cores = us / 1e6
    by = {
        "Redis's CPU": SHARE * workers / cores,
        "connections": (c.maxclients - SPARE_CONNECTIONS) / c.connections,
        "Redis's CPU, all idle": SHARE * 1e6 / c.idle,
    }
    limit = min(by, key=lambda name: by[name])
    return {
        "tokens_per_s": tokens_per_s,
        "jobs_per_s": jobs_per_s,
        "redis_cores": cores,
        "idle_cores": workers * c.idle / 1e6,
        "connections": workers * c.connections,
        "redis_bytes": workers * c.redis_bytes + jobs_per_s * KEPT_SECONDS * kept,
        "limit": limit,
        "workers_a_redis": math.floor(by[limit]),
        "redises": math.ceil(workers / by[limit]),
    }


def host_bytes(c: Coefficients, workers: int, positions: int) -> float:
    """Return the bytes of memory of a host.

    Args:
        positions: of each running job.
    """
    return c.weights + workers * (c.private + c.in_flight * positions * c.kv_token)
