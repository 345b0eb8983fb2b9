"""What the tests share: a real Redis, real worker processes, the engine with the shipped model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

from fastgpt2 import Client, Engine, settings
from fastgpt2.system import System
from fastgpt2.worker.connection import connect
from fastgpt2.worker.names import leases_key
from fastgpt2.worker.redis_server import RedisServer

GOLDEN = Path(__file__).parent / "golden"

WaitFor = Callable[..., None]
StartWorker = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not reach into the tests."""
    for name in list(os.environ):
        if name.startswith(("FASTGPT2_", "HF_")):
            monkeypatch.delenv(name)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Poll a condition up to a deadline; fails the test with `what` when it passes."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for: {what}")
        time.sleep(0.01)


def half_the_time(client: Client, prompt: str) -> float:
    """In which the worker, once warm, gets through about half of 480 tokens, however fast the machine is today."""
    client.enqueue(prompt, max_new_tokens=1).result(timeout=60)
    began = time.monotonic()
    client.enqueue(prompt, max_new_tokens=480, ignore_eos=True).result(timeout=60)
    return (time.monotonic() - began) / 2


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The shipped model. Four slots, so that batches are mixed.

    It keeps no prefixes: in how many steps a prompt is read, and by how much, would depend on the tests before. It
    guesses nothing: what it guesses depends on the time that steps take, and two runs shall have the same bits.
    """
    return Engine.load("demo", max_batch=4, prefix_memory=0, drafts="off")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    connection = connect(redis_server.url)
    yield connection
    connection.close()


@pytest.fixture
def queue_name() -> str:
    """A queue of the test's own on the shared server."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def client(redis_server: RedisServer, queue_name: str) -> Iterator[Client]:
    with Client(redis_server.url, queue_name) as made:
        yield made


@pytest.fixture
def start_worker(redis_server: RedisServer, redis: Redis, queue_name: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts `fastgpt2 worker` as a process, its log in a file; waits until it is registered unless told not to."""
    started: list[subprocess.Popen[str]] = []

    def start(wait: bool = True, **environment: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"worker-{len(started)}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "worker"],
            env={
                **os.environ,
                "FASTGPT2_REDIS_URL": redis_server.url,
                "FASTGPT2_QUEUE": queue_name,
                "FASTGPT2_MODEL": "demo",
                "FASTGPT2_THREADS": "1",
                **environment,
            },
            stdout=log,
            stderr=log,
            text=True,
        )
        log.close()
        started.append(process)
        if wait:
            wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == len(started), "the worker to register")
            # A moment later; that of a first one is what tells clients that the queue is served.
            wait_until(lambda: redis.zcard(leases_key(queue_name)), "the worker to take its lease")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@dataclass
class RunningEndpoint:
    """A process of `fastgpt2 api`."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return self.log.read_text().partition("endpoint on ")[2].split()[0]

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port


StartEndpoint = Callable[..., RunningEndpoint]


@pytest.fixture
def start_endpoint(redis_server: RedisServer, queue_name: str, tmp_path: Path) -> Iterator[StartEndpoint]:
    """Starts `fastgpt2 api` as a process, its log in a file; waits until it listens."""
    started: list[RunningEndpoint] = []

    def start(*options: str, **environment: str) -> RunningEndpoint:
        log = tmp_path / f"api-{len(started)}.log"
        own = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name, **environment}
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "api", "--port", "0", *options],
                env={**os.environ, **own},
                stderr=out,
                text=True,
            )
        started.append(RunningEndpoint(process, log))
        wait_until(lambda: "endpoint on" in log.read_text(), "the endpoint to listen")
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.process.kill()
        endpoint.process.wait()


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """The whole system, as `fastgpt2 up` runs it."""
    values = settings.of_system(model="demo", workers="2", port="0", redis_port="0", log_level="warning")
    with System(values) as running:
        yield running
