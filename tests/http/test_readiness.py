"""Tests of `/ready`: it says no wherever a job that is sent now would not be run."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from huggingface_hub import InferenceClient
from redis import Redis
from rq.suspension import suspend
from support.redis_process import OpenRedis
from support.running import RunningEndpoint, StartEndpoint, wait_until

import fastgpt2
from fastgpt2.api.http.openapi import document
from fastgpt2.api.pool.status import check_readiness
from fastgpt2.protocol.connection import connect, connect_async
from fastgpt2.protocol.keys import HEARD_FIELD, LEASE_SECONDS, SILENT_SECONDS, leases_key
from fastgpt2.system.up import System

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


def test_info_tells_of_the_workers_that_serve(start_endpoint: StartEndpoint, redis: Redis, queue_name: str) -> None:
    endpoint = start_endpoint()
    hub = InferenceClient(provider="hf-inference")
    answer = httpx.get(f"{endpoint.url}/info", trust_env=False)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "healthcheck")
    assert answer.json()["error"].startswith("no worker that has loaded its model lives on this queue")
    told = [("a", "gpt2", 1024, 8, 0), ("b", "gpt2", 1024, 4, 0), ("c", "demo", 512, 2, 0), ("d", "demo", 512, 2, 60)]
    told.append(("e", "demo", 512, 2, 60))
    for name, model, n_positions, max_batch, heard_seconds_ago in told:
        pretend_worker(redis, queue_name, name, heard_seconds_ago)
        redis.sadd(f"rq:workers:{queue_name}", f"rq:worker:{name}")
        fields: dict[Any, Any] = {
            "model": model,
            "n_positions": n_positions,
            "max_batch": max_batch,
            "weights": "int8",
            "state": "idle",
        }
        redis.hset(f"rq:worker:{name}", mapping=fields)
    wait_until(lambda: ready(endpoint) == (200, ""), "the endpoint to be ready")
    wait_until(lambda: httpx.get(f"{endpoint.url}/info", trust_env=False).status_code == 200, "the workers to be read")
    info = hub.get_endpoint_info(model=endpoint.url)
    # Of five workers three serve "demo", and two of these hang.
    assert (info["model_id"], info["model_dtype"], info["max_batch_size"]) == ("gpt2", "int8", 4)
    assert (info["max_total_tokens"], info["max_input_tokens"], info["max_input_length"]) == (1024, 1023, 1023)
    schema = document()["components"]["schemas"]["Info"]
    assert info.keys() == set(schema["required"]) == schema["properties"].keys()
    for name in ("a", "b", "c", "d", "e"):
        redis.delete(f"rq:worker:{name}")


def test_info_of_a_real_worker(system: System) -> None:
    info = InferenceClient(provider="hf-inference").get_endpoint_info(model=f"{system.http_url}/")
    # What text-generation-inference 3 tells, by its OpenAPI document; all but the last four are never null there.
    expected = {
        "model_id", "max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens",
        "max_total_tokens", "validation_workers", "max_client_batch_size", "router", "version",
        "model_sha", "model_pipeline_tag", "sha", "docker_label",
    }  # fmt: skip
    assert expected <= info.keys()
    assert (info["model_id"], info["version"], info["model_dtype"]) == ("demo", fastgpt2.__version__, "float32")
    # The limits are those that hold.
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as web:
        of_size: dict[str, Callable[[int], dict[str, Any]]] = {
            "max_total_tokens": lambda n: {"prompt": [5], "max_tokens": n - 1, "ignore_eos": True},
            "max_input_tokens": lambda n: {"prompt": [5] * n, "max_tokens": 1},
            "max_best_of": lambda n: {"prompt": "a", "best_of": n, "temperature": 1, "max_tokens": 1},
            "max_stop_sequences": lambda n: {"prompt": "a", "stop": ["~"] * n, "max_tokens": 1},
            "max_client_batch_size": lambda n: {"prompt": ["a"] * n, "max_tokens": 1},
        }
        for name, values in of_size.items():
            at, beyond = (web.post("/v1/completions", json=values(info[name] + more)) for more in (0, 1))
            assert (at.status_code, beyond.status_code) == (200, 400), name
