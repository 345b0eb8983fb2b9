"""Tests that a password and a prompt do not appear where they must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.redis_process import OpenRedis
from support.running import wait_until

from fastgpt2 import Client
from fastgpt2.errors import QueueUnavailable

pytestmark = pytest.mark.processes

PASSWORD = "hunter2-is-no-password"
PROMPT = "The secret of the old clockmaker was"


class LockedRedis(OpenRedis):
    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"


def test_the_password_and_the_prompts_are_nowhere_to_be_seen(tmp_path: Path) -> None:
    with LockedRedis("--requirepass", PASSWORD, folder=tmp_path / "redis") as server:
        log = tmp_path / "log"
        own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_LOG_LEVEL": "debug"}
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "up", "--workers", "1", "--port", "0"],
                env={**os.environ, **own},
                stdout=out,
                stderr=out,
            )
        try:
            wait_until(lambda: "fastgpt2 is ready" in log.read_text(), "the system to be ready", 30)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(children) == 2
            for pid in [str(process.pid), *children]:
                assert PASSWORD.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            with Client(server.url) as client:
                job = client.enqueue(PROMPT, max_new_tokens=3)
                job.result(timeout=20)
                refused = client.connection.hget(f"rq:job:{job.id}", "description")
                assert refused == b"generate"
                assert PASSWORD not in repr(client) + repr(job)
                for key in client.connection.scan_iter("rq:worker:*"):
                    if client.connection.type(key) == b"hash":
                        assert PASSWORD not in str(client.connection.hgetall(key))
        finally:
            process.terminate()
            assert process.wait(30) == 0
        assert PASSWORD not in log.read_text()
        assert "clockmaker" not in log.read_text()
    with Client(server.url) as client, pytest.raises(QueueUnavailable) as caught:
        client.enqueue("a")
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None
