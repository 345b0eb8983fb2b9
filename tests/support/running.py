"""Waiting for what happens, and the processes that fixtures start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from fastgpt2 import Client
from fastgpt2.errors import JobTimedOut

T = TypeVar("T")

GOLDEN = Path(__file__).parent.parent / "golden"

WaitFor = Callable[..., None]
StartWorker = Callable[..., subprocess.Popen[str]]


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


def run_out_of_time(client: Client, prompt: str, attempt: Callable[[float], JobTimedOut | None]) -> JobTimedOut:
    """Return how a job of 480 tokens ends whose time is up while it runs, as fast as the machine may be.

    The machine's pace may change from one job to the next. So a job that ended in its time is tried again with less of
    it, and one that had no token yet with more.

    Args:
        attempt: runs such a job with a timeout in seconds, and returns its error; None if it ended in its time.
    """
    client.enqueue(prompt, max_new_tokens=1).result(timeout=60)
    began = time.monotonic()
    client.enqueue(prompt, max_new_tokens=480, ignore_eos=True).result(timeout=60)
    seconds = (time.monotonic() - began) / 2
    for _ in range(20):
        error = attempt(seconds)
        if error is not None and error.partial is not None and error.partial.token_ids:
            return error
        seconds *= 1.5 if error is not None else 0.7
    raise AssertionError("none of 20 jobs ran out of time while it ran")


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
