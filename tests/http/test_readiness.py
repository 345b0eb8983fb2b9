"""Tests of `/ready`: it says no wherever a job that is sent now would not be run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from redis import Redis
from rq.suspension import suspend
from support.redis_process import OpenRedis
from support.running import RunningEndpoint, StartEndpoint, wait_until

from fastgpt2.api.pool.status import check_readiness
from fastgpt2.protocol.connection import connect, connect_async
from fastgpt2.protocol.keys import HEARD_FIELD, LEASE_SECONDS, SILENT_SECONDS, leases_key

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def own_redis() -> Iterator[tuple[str, Redis]]:
    """The URL of a Redis that a test may suspend, fill or make a replica, and a connection to it."""
    with OpenRedis() as server:
        connection = connect(server.url)
        yield server.url, connection
        connection.close()


def obstacle(url: str, queue: str) -> str | None:
    async def look() -> str | None:
        async with connect_async(url) as connection:
            return await check_readiness(connection, queue)

    return asyncio.run(look())


def pretend_worker(connection: Redis, queue: str, name: str, heard_seconds_ago: float) -> None:
    """Write the lease and the hash of a worker whose loop was heard of so long ago."""
    seconds, _ = connection.time()
    connection.zadd(leases_key(queue), {name: (seconds + LEASE_SECONDS - 1) * 1000})
    connection.hset(f"rq:worker:{name}", HEARD_FIELD, seconds - heard_seconds_ago)


def ready(endpoint: RunningEndpoint) -> tuple[int, str]:
    answer = httpx.get(f"{endpoint.url}/ready", trust_env=False)
    return answer.status_code, answer.json().get("error", "")


def test_while_suspended(start_endpoint: StartEndpoint, own_redis: tuple[str, Redis], queue_name: str) -> None:
    url, connection = own_redis
    endpoint = start_endpoint(FASTGPT2_REDIS_URL=url)
    pretend_worker(connection, queue_name, "w", 0)
    wait_until(lambda: ready(endpoint) == (200, ""), "the endpoint to be ready")
    suspend(connection)
    wait_until(lambda: ready(endpoint)[0] == 503, "the endpoint to say no")
    assert ready(endpoint)[1] == "all workers are suspended: `rq resume --url REDIS_URL` lets them go on"
    rq = Path(sys.executable).with_name("rq")
    subprocess.run([rq, "resume", "--url", url], check=True, capture_output=True, timeout=60)
    pretend_worker(connection, queue_name, "w", 0)
    wait_until(lambda: ready(endpoint) == (200, ""), "the endpoint to be ready again")


def test_where_all_workers_hang(own_redis: tuple[str, Redis], queue_name: str) -> None:
    url, connection = own_redis
    for name in ("a", "b"):
        pretend_worker(connection, queue_name, name, SILENT_SECONDS + 2)
    reason = obstacle(url, queue_name)
    assert reason is not None
    assert reason.startswith("all workers are silent, 2 of them: ")
    pretend_worker(connection, queue_name, "b", 1)
    assert obstacle(url, queue_name) is None
    # What is no moment tells nothing, and an older worker tells none.
    connection.hset("rq:worker:b", HEARD_FIELD, "soon")
    assert obstacle(url, queue_name) is None
    connection.delete("rq:worker:b")
    connection.set("rq:worker:b", "of another kind")
    assert obstacle(url, queue_name) is None


@pytest.mark.parametrize(
    ("setting", "value", "back", "told"),
    [
        ("maxmemory", "1", "0", "used memory > 'maxmemory'"),
        ("min-replicas-to-write", "1", "0", "NOREPLICAS"),
        ("replicaof", "127.0.0.1 1", "no one", "read only replica"),
    ],
)
def test_where_redis_takes_no_jobs(
    own_redis: tuple[str, Redis], queue_name: str, setting: str, value: str, back: str, told: str
) -> None:
    url, connection = own_redis
    pretend_worker(connection, queue_name, "w", 0)

    def change(to: str) -> Any:
        words = ["REPLICAOF", *to.split()] if setting == "replicaof" else ["CONFIG", "SET", setting, to]
        return connection.execute_command(*words)  # type: ignore[no-untyped-call]

    change(value)
    try:
        reason = obstacle(url, queue_name)
    finally:
        change(back)
    assert reason is not None
    assert reason.startswith("Redis takes no jobs (")
    assert told in reason
    assert "127.0.0.1" not in reason, "anybody may ask"
    assert obstacle(url, queue_name) is None


def test_a_strange_key_is_no_obstacle(own_redis: tuple[str, Redis], queue_name: str) -> None:
    url, connection = own_redis
    pretend_worker(connection, queue_name, "w", 0)
    now = int(time.time())
    for bucket in range(now - now % 10 - 20, now + 40, 10):
        connection.set(f"fastgpt2:recent:{queue_name}:{bucket}", "x", ex=60)
    assert obstacle(url, queue_name) is None
