"""SIGTERM ends a worker in every state, whatever has become of Redis; see also test_faults.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from support.redis_process import OpenRedis
from support.running import jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import leases_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.worker import GenerationWorker

pytestmark = pytest.mark.processes

TESTS = str(Path(__file__).parent.parent)


class Started:
    """A worker process with its log."""

    def __init__(self, log: Path, trouble: str, url: str) -> None:
        self.log = log
        own = {"FASTGPT2_REDIS_URL": url, "FASTGPT2_MODEL": "demo", "FASTGPT2_THREADS": "1", "PYTHONPATH": TESTS}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.troubled_worker", trouble],
                env={**os.environ, **own, "FASTGPT2_DRAIN_TIMEOUT": "0.2"},
                stderr=out,
            )

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.log.read_text(), words)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Started] = []

    def start(trouble: str, url: str) -> Started:
        started.append(Started(tmp_path / f"worker-{len(started)}.log", trouble, url))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def with_a_job(url: str) -> None:
    """Let the one worker there run a job that is long enough to be held."""
    with Client(url) as client:
        job = client.enqueue("My name is", max_new_tokens=500, ignore_eos=True)
        wait_until(lambda: job.status() == "started", "the job to start")


def test_sigterm_ends_a_worker_in_every_state(start: Start, redis_server: RedisServer, tmp_path: Path) -> None:
    """All at once, as each of them only waits."""
    with OpenRedis(folder=tmp_path / "redis") as hanging, socket.create_server(("127.0.0.1", 0)) as silent:
        signing_on = start("none", f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        running = start("none", hanging.url)
        unleased = start("no lease thread", redis_server.url)
        loading = start("none", redis_server.url)
        loading.wait_for("loaded demo")
        loading.process.terminate()
        running.wait_for("is ready")
        unleased.wait_for("is ready")
        signing_on.wait_for("Redis cannot be used")
        with jobs_held():
            with_a_job(hanging.url)
            with hanging.stopped():
                others = [signing_on, running, unleased]
                for each in others:
                    each.process.terminate()
                for each in others:
                    assert each.process.wait(60) == 0, each.log.read_text()
        assert loading.process.wait(60) in (0, -signal.SIGTERM)
    assert "could not be written" in running.log.read_text()


def test_a_worker_that_waits_for_a_name_can_be_stopped(
    engine: Engine, redis: Redis, redis_server: RedisServer, queue_name: str
) -> None:
    """And leaves what it waited for as it was."""
    lease = redis.time()[0] * 1000 + 3_600_000
    redis.zadd(leases_key(queue_name), {"w": lease})
    connection = connect(redis_server.url)
    worker = GenerationWorker(engine, connection, queue_name, "w")
    thread = threading.Thread(target=worker.sign_on)
    thread.start()
    wait_until(lambda: worker._registration._seen, "the other to be seen")
    worker.request_stop(signal.SIGTERM, None)
    thread.join(60)
    assert not thread.is_alive()
    worker.sign_off()
    assert redis.zscore(leases_key(queue_name), "w") == lease
    assert not redis.exists(worker.key)
    worker._claims.close()
    connection.close()


def test_signals_may_come_while_a_signal_is_handled() -> None:
    """A flag whose setting takes a lock would wait for itself, for ever."""
    code = (
        "import os, signal; from fastgpt2.process import StopFlag, on_stop_signals\n"
        "flag, parent = StopFlag(), os.getpid()\n"
        "on_stop_signals(lambda *_: flag.set())\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    for _ in range(50000): os.kill(parent, signal.SIGTERM)\n"
        "    os._exit(0)\n"
        "while os.waitpid(child, os.WNOHANG) == (0, 0): flag.set()\n"
        "assert flag.wait(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
