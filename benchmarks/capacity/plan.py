"""The formula by which a number of workers is planned, with the coefficients that `capacity.py` has measured.

Everything here is derived; nothing is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastgpt2.bench import Values

WORKERS = 1000
# New tokens a job.
LENGTHS = (32, 128, 500)
# Beyond so much of its core, what is asked of a Redis begins to wait for what was asked before.
SHARE = 0.7
# Connections for clients and endpoints.
SPARE_CONNECTIONS = 1000
KEPT_SECONDS = 600.0


@dataclass(frozen=True)
class Coefficients:
    """Of Redis in microseconds of its main thread and bytes, of a worker that uses one core.

    Attributes:
        beside: a second, of a worker that is busy: its lease.
        idle: a second, of a worker that waits.
        kept, kept_token: of a finished job and of each of its new tokens; `kept_stream`, `kept_piece` more if streamed.
        tokens_per_s: of a worker, all cores busy with such workers.
        weights, private, kv_token: bytes of a host, of each worker, of each position of a job in hand.
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
    """Of one model; None if a part was not measured."""
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
    return bool(each["state"] == "finished" and each["stream"] == stream)


def planned(c: Coefficients, tokens: int, stream: bool, workers: int = WORKERS) -> dict[str, Any]:
    """So many busy workers, and jobs of so many new tokens, all of them read, with a piece of text a token if streamed.

    The tokens/s are taken to be those measured, whatever the jobs' length.
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
    """RAM of a host, with so many positions in each job in hand."""
    return c.weights + workers * (c.private + c.in_flight * positions * c.kv_token)
