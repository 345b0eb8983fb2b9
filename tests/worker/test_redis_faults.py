"""A Redis that hangs, is full, or has become a replica: workers keep what they have, and clients are told in time."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.redis_process import OpenRedis, config_set
from support.running import GOLDEN, HOLDABLE, jobs_held, wait_until

from fastgpt2 import AsyncClient, Client
from fastgpt2.errors import QueueUnavailable
from fastgpt2.protocol import connection

pytestmark = pytest.mark.processes

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ONLY_LONG = pytest.mark.skipif(not os.environ.get("TEST_LONG"), reason="half a minute more; TEST_LONG=1 runs it")
Start = Callable[..., tuple["subprocess.Popen[bytes]", Path]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OpenRedis]:
    with OpenRedis(folder=tmp_path / "redis") as made:
        yield made


@pytest.fixture
def start(server: OpenRedis, tmp_path: Path) -> Iterator[Start]:
    """Run a worker of its own on that server."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"worker-{len(started)}.log"
        own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_MAX_BATCH": "4", **environment}
        with log.open("w") as out:
            process = subprocess.Popen([*HOLDABLE, "worker"], env={**os.environ, **own}, stderr=out)
        started.append(process)
        wait_until(lambda: "is ready" in log.read_text(), "the worker to be ready")
        return process, log

    yield start
    for process in started:
        process.kill()
        process.wait()


def enqueue_long(client: Client, count: int = 4) -> list[Any]:
    jobs = [client.enqueue(entry["prompt"], max_new_tokens=480, ignore_eos=True) for entry in ENTRIES[:count]]
    wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
    return jobs


def all_right(jobs: list[Any], seconds: float = 30) -> None:
    for job, entry in zip(jobs, ENTRIES, strict=False):
        assert list(job.result(timeout=seconds).token_ids[:100]) == entry["ids"]


@pytest.fixture
def patient_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let connections wait for minutes: who is told sooner is told by the time that the caller named."""
    monkeypatch.setattr(connection, "SOCKET_SECONDS", 300.0)
    monkeypatch.setitem(connection._OPTIONS, "socket_timeout", 300.0)


def took(what: Callable[[], object]) -> float:
    began = time.monotonic()
    with pytest.raises(QueueUnavailable, match="does not answer"):
        what()
    return time.monotonic() - began


def test_a_client_of_a_hanging_redis_is_told_when_the_connection_gives_up(server: OpenRedis) -> None:
    with Client(server.url) as client:
        job = client.enqueue("a")
        with server.stopped():
            assert took(job.status) < 60


@pytest.mark.usefixtures("patient_connections")
def test_clients_of_a_hanging_redis_are_told_within_their_time(server: OpenRedis) -> None:
    with Client(server.url) as client:
        job, other = client.enqueue("a"), client.enqueue("b")
        with server.stopped():
            assert took(lambda: job.result(timeout=1)) < 60
            assert took(lambda: list(job.stream(timeout=1))) < 60
            told = subprocess.run(
                [sys.executable, "-m", "fastgpt2", "result", "--timeout", "1", job.id],
                env={**os.environ, "FASTGPT2_REDIS_URL": server.url},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert told.returncode == 4
            assert "does not answer" in told.stderr
            assert len(told.stderr.splitlines()) == 1
        # No late answer is taken for that of another question.
        client.cancel(other.id)
        for _ in range(5):
            assert (job.status(), other.status(), client.workers()) == ("queued", "canceled", 0)


@pytest.mark.usefixtures("patient_connections")
def test_asyncio_clients_too(server: OpenRedis) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            job, other = await client.enqueue("a"), await client.enqueue("b")
            with server.stopped():
                began = time.monotonic()
                with pytest.raises(QueueUnavailable, match="does not answer"):
                    await job.result(timeout=1)
                assert time.monotonic() - began < 60
            await other.cancel()
            for _ in range(5):
                assert (await job.status(), await other.status()) == ("queued", "canceled")

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=ONLY_LONG)])
def test_a_redis_that_hangs_costs_no_job(server: OpenRedis, start: Start, seconds: float) -> None:
    process, log = start()
    with Client(server.url) as client:
        with ExitStack() as fault:
            with jobs_held():
                jobs = enqueue_long(client)
                fault.enter_context(server.stopped())
            time.sleep(seconds)  # it is the fault itself
        all_right(jobs, 60)
        assert {client.connection.hget(f"rq:job:{job.id}", "fastgpt2_attempts") for job in jobs} == {b"1"}
    assert process.poll() is None
    assert "Traceback" not in log.read_text()


def test_a_full_redis_is_waited_for_and_clients_are_told(server: OpenRedis, start: Start) -> None:
    process, log = start()
    with Client(server.url) as client, server.administered() as admin:
        with jobs_held():
            jobs = enqueue_long(client)
            config_set(admin, "maxmemory", 1)
        wait_until(lambda: "the end of job" in log.read_text(), "the worker to say that it cannot write")
        with pytest.raises(QueueUnavailable, match="its memory is full: raise maxmemory"):
            client.enqueue("a")
        config_set(admin, "maxmemory", 0)
        all_right(jobs)
        assert {client.connection.hget(f"rq:job:{job.id}", "fastgpt2_attempts") for job in jobs} == {b"1"}
        (after,) = [client.enqueue(ENTRIES[0]["prompt"], max_new_tokens=5, ignore_eos=True)]
        assert list(after.result(timeout=20).token_ids) == ENTRIES[0]["ids"][:5]
    assert process.poll() is None
    assert "Traceback" not in log.read_text()


def test_a_redis_that_became_a_replica_is_waited_for_and_clients_are_told(server: OpenRedis, start: Start) -> None:
    """Make it a replica of a server that is away, so that nothing is copied over what there is."""
    process, log = start()
    with Client(server.url) as client, server.administered() as admin:
        with jobs_held():
            jobs = enqueue_long(client)
            admin.replicaof("127.0.0.1", "1")
        wait_until(lambda: "the end of job" in log.read_text(), "the worker to say that it cannot write")
        with pytest.raises(QueueUnavailable, match="it is a replica: name the primary"):
            client.enqueue("a")
        admin.replicaof("no", "one")
        all_right(jobs)
    assert process.poll() is None
    assert "Traceback" not in log.read_text()


def test_redis_is_killed_mid_everything_and_comes_back(server: OpenRedis, start: Start) -> None:
    start()
    with Client(server.url) as client:
        with jobs_held():
            jobs = enqueue_long(client)
            waiting = [client.enqueue(entry["prompt"], max_new_tokens=100, ignore_eos=True) for entry in ENTRIES[4:8]]
            stream = client.enqueue(ENTRIES[0]["prompt"], max_new_tokens=100, ignore_eos=True, stream=True)
            os.kill(server.pid, 9)
            wait_until(lambda: server.poll() is not None, "Redis to die")
        server.start()
        all_right(jobs)
        for job, entry in zip(waiting, ENTRIES[4:8], strict=True):
            assert list(job.result(timeout=30).token_ids) == entry["ids"]
        text = "".join(piece.text for piece in stream.stream(timeout=30))
        assert text == stream.result(timeout=30).text
