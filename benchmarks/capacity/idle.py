"""The cost to a Redis of workers that wait for jobs: some real ones, and the mere entries of a thousand."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from rq import Queue
from rq.worker_registration import clean_worker_registry

from benchmarks.capacity.fleet import fleet
from benchmarks.capacity.redis_use import memory_used, metered
from benchmarks.common import progress
from fastgpt2.api.client.flow import Driver
from fastgpt2.api.client.session import Session
from fastgpt2.api.pool.status import read_status
from fastgpt2.bench import Values
from fastgpt2.protocol.connection import connect, connect_async
from fastgpt2.protocol.keys import LEASE_SECONDS, WORKER_PREFIX, workers_key
from fastgpt2.protocol.untrusted import JSONOnlySerializer
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.liveness import BEAT_SECONDS, Lease

QUEUE = "capacity"
READS = 20


def measure_idle(asked: argparse.Namespace) -> Values:
    """Return what idle workers cost, and what grows with their number."""
    counts = [measure_fleet(count, asked) for count in (0, *asked.idle)]
    nobody = counts.pop(0)
    for found in counts:
        for key in ("cpu_us_per_s", "command_us_per_s", "commands_per_s", "connections", "memory_bytes"):
            found[f"{key}_each"] = (found[key] - nobody[key]) / found["workers"]
    many = measure_entries(asked, nobody["cpu_us_per_s"])
    return {"seconds": asked.idle_seconds, "nobody": nobody, "counts": counts, "thousand": many}


def measure_fleet(count: int, asked: argparse.Namespace) -> Values:
    """Return what a Redis with `count` idle workers does in some seconds, and what it holds for them."""
    progress(f"{count} idle workers")
    with RedisServer() as redis, fleet(redis.url, QUEUE, count) as workers:
        connection = workers.connection
        # By then a worker has done what it does only at its start, and its first heartbeat.
        time.sleep(asked.settle_seconds)
        with metered(connection) as used:
            time.sleep(asked.idle_seconds)
        progress("")
        return {
            "workers": count,
            "cpu_us_per_s": used["cpu_us"] / used["seconds"],
            "command_us_per_s": used["command_us"] / used["seconds"],
            "commands_per_s": used["commands"] / used["seconds"],
            # Without our own.
            "connections": connection.info("clients")["connected_clients"] - 1,
            "memory_bytes": memory_used(connection),
            "by_command": used["by_command"],
        }


def measure_entries(asked: argparse.Namespace, nobody: float) -> Values:
    """Return what a thousand workers cost that exist only in Redis, and what reads all of them.

    There are their leases, which the project's own code renews from this one process on one connection, and entries
    like that of a real worker.

    Args:
        nobody: microseconds a second that Redis takes for itself.
    """
    with RedisServer() as redis, closing(connect(redis.url)) as connection:
        entry = entry_of_a_worker(redis.url)
        leases = [Lease(connection, QUEUE, f"paper.{number}", lambda *_: None) for number in range(asked.leases)]
        found: Values = {"leases": asked.leases, "beats": []}
        for count in sorted({1, 100, asked.leases}):
            progress(f"{count} leases")
            found["beats"].append(measure_beats(connection, leases[:count], asked.idle_seconds, 0, nobody))
        progress("a tenth of the leases lapse")
        time.sleep(LEASE_SECONDS + BEAT_SECONDS)  # the rest renew theirs at their first beat
        silent = asked.leases // 10
        found["beats"].append(measure_beats(connection, leases[silent:], asked.idle_seconds, silent, nobody))
        found["reads"] = measure_reads(connection, redis.url, entry, asked.leases)
    progress("")
    return found


def entry_of_a_worker(url: str) -> Values:
    """Return the hash of a real worker."""
    with fleet(url, QUEUE, 1) as workers:
        key = min(workers.connection.smembers(workers_key(QUEUE)))
        return dict(workers.connection.hgetall(key))


def measure_beats(connection: Any, leases: list[Lease], seconds: float, silent: int, nobody: float) -> Values:
    """Renew each lease once a second, spread evenly over the second, as those of many workers are. Return the costs.

    Args:
        silent: how many other leases have lapsed.
        nobody: microseconds a second that Redis takes for itself.
    """
    made, late = 0, 0.0
    with metered(connection) as used:
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            due = began + made * BEAT_SECONDS / len(leases)
            if due > now:
                time.sleep(due - now)
            else:
                late = max(late, now - due)
            leases[made % len(leases)].beat()
            made += 1
    return {
        "leases": len(leases),
        "silent": silent,
        "beats_per_s": made / used["seconds"],
        "late_seconds": late,
        "us_each": (used["cpu_us"] - nobody * used["seconds"]) / made,
        "command_us_each": used["command_us"] / made,
        "output_bytes_each": used["output_bytes"] / made,
    }


def measure_reads(connection: Any, url: str, entry: Values, count: int) -> Values:
    """Return what each way of reading all workers costs.

    These are the status of the pool, a client's question what models take, and the part of RQ's clean-up that every
    worker does every ten minutes for each of its three queues.
    """
    connection.flushall()
    with connection.pipeline(transaction=False) as pipeline:
        for number in range(count):
            pipeline.hset(f"{WORKER_PREFIX}paper.{number}", mapping=entry)
            pipeline.sadd(workers_key(QUEUE), f"{WORKER_PREFIX}paper.{number}")
        pipeline.execute()
    queue = Queue(QUEUE, connection, serializer=JSONOnlySerializer)
    driver = Driver(url)

    def ask_limits() -> None:
        driver.run(Session(url, QUEUE, None).limits.refresh(QUEUE))

    ways: dict[str, Callable[[], object]] = {
        "status": partial(asyncio.run, read_statuses(url)),
        "limits": ask_limits,
        "clean_up": partial(clean_worker_registry, queue),
    }
    found = {}
    for name, way in ways.items():
        with metered(connection) as used:
            if name == "status":
                way()
            else:
                for _ in range(READS):
                    way()
        found[name] = {key: used[key] / READS for key in ("cpu_us", "command_us", "output_bytes")}
    return found


async def read_statuses(url: str) -> None:
    """Read the pool's status over and over on one connection."""
    connection = connect_async(url)
    for _ in range(READS):
        await read_status(connection, QUEUE)
    await connection.aclose()
