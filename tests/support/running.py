"""Waiting for what happens, and the processes that fixtures start."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fastgpt2 import Client

GOLDEN = Path(__file__).parent.parent / "golden"

WaitFor = Callable[..., None]
StartWorker = Callable[..., subprocess.Popen[str]]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Poll a condition up to a deadline; fails the test with `what` when it passes."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for: {what}")
        time.sleep(0.01)


def hang_up(url: str, path: str, body: Any, condition: Callable[[], object], **headers: str) -> None:
    """Post to an endpoint, and close the connection before the answer, once the condition holds."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **headers})
    wait_until(condition, "the request to have its effect")
    connection.close()


def half_the_time(client: Client, prompt: str) -> float:
    """Return the seconds in which a warm worker generates about half of 480 tokens, as fast as the machine is today."""
    client.enqueue(prompt, max_new_tokens=1).result(timeout=60)
    began = time.monotonic()
    client.enqueue(prompt, max_new_tokens=480, ignore_eos=True).result(timeout=60)
    return (time.monotonic() - began) / 2


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
