"""Waiting for what happens, and the processes that fixtures start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from fastgpt2.errors import JobTimedOut

T = TypeVar("T")

GOLDEN = Path(__file__).parent.parent / "golden"

WaitFor = Callable[..., None]
StartWorker = Callable[..., subprocess.Popen[str]]


# While the file exists, the workers of this process's tests are held. Each of pytest's processes has its own.
HOLD = Path(tempfile.gettempdir()) / f"fastgpt2-tests-{uuid.uuid4().hex}.{os.getpid()}"
os.environ["TEST_HOLD"] = str(HOLD)

# `fastgpt2`, whose workers can be held.
HOLDABLE = (sys.executable, "-P", str(Path(__file__).with_name("holding.py")))


@contextmanager
def jobs_held() -> Iterator[None]:
    """Let no job end by itself that has 100 tokens or more, however fast the machine is; see `support.holding`.

    It holds for workers of `start_worker`, of tests that are `served` and of the `system`, and for what else is started
    as `HOLDABLE`. The jobs go on afterwards.
    """
    HOLD.touch()
    try:
        yield
    finally:
        HOLD.unlink()


@dataclass(frozen=True, slots=True)
class SharedWorker:
    """A worker that several tests have, one after the other."""

    queue: str
    process: subprocess.Popen[str]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Poll a condition up to a deadline; fails the test with `what` when it passes.

    What takes longer is looked at less often: mostly a process starts, and the looks take its core from it.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > seconds:
            pytest.fail(f"waited {seconds} s for: {what}")
        time.sleep(0.01 if waited < 2.0 else 0.03)


def has_ended(pid: int) -> bool:
    """Tell whether a process is no more, also if nobody has asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of fastgpt2 to its end, with these variables besides the test's own."""
    return subprocess.run(
        [sys.executable, "-m", "fastgpt2", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def hang_up(url: str, path: str, body: Any, condition: Callable[[], object], **headers: str) -> None:
    """Post to an endpoint, and close the connection before the answer, once the condition holds."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **headers})
    wait_until(condition, "the request to have its effect")
    connection.close()


def run_out_of_time(attempt: Callable[[float], JobTimedOut]) -> JobTimedOut:
    """Return how a held job ends whose time is up when it has some tokens.

    Args:
        attempt: runs such a job with a timeout in seconds, and returns its error. A job that had no token yet is tried
            again with more time.
    """
    seconds = 0.1
    with jobs_held():
        while (error := attempt(seconds)).partial is None or not error.partial.token_ids:
            seconds *= 2
            assert seconds < 60
    return error


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
