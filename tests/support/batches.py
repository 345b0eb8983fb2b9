"""Fixtures: `fastgpt2 batch` in the test's own process, and a pool of one worker for all tests of a module.

A module that wants them says `pytest_plugins = ["support.batches"]`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from fastgpt2.cli import main
from fastgpt2.process import STOP_SIGNALS
from fastgpt2.protocol.keys import leases_key
from fastgpt2.system.redis_server import RedisServer
from support.running import GOLDEN, wait_until

FEW = ["--max-new-tokens", "4", "--ignore-eos"]

# Runs the command in the test's folder, and returns its status, standard output and standard error.
Batch = Callable[..., tuple[int, str, str]]


TEMPLATE = str(GOLDEN / "chat_templates" / "human-and-assistant.jinja")


@pytest.fixture(scope="module")
def pool(redis_server: RedisServer, redis: Redis) -> Iterator[dict[str, str]]:
    """One worker on a queue of its own, for all tests of a module. Returns the variables that lead to it."""
    queue = f"batches-{uuid.uuid4().hex[:8]}"
    variables = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt2", "worker", "--model", "demo", "--threads", "1", "--chat-template", TEMPLATE],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: redis.zcard(leases_key(queue)), "the worker to take its lease")
        yield variables
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def run_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Batch]:
    """Return a function that runs the command in this process, where there is no Redis."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGPT2_REDIS_URL", "redis://127.0.0.1:1/0")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["batch", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def pool_batch(run_batch: Batch, pool: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Return the same with the pool, for texts of four tokens."""
    for name, value in pool.items():
        monkeypatch.setenv(name, value)
    return lambda *arguments: run_batch(*arguments, *FEW)
