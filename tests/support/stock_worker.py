"""RQ's own worker, for comparison."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rq import Queue

from fastgpt2.system.redis_server import RedisServer

RQ = str(Path(sys.executable).with_name("rq"))


def run_by_stock(queue: Queue, server: RedisServer) -> None:
    """Have an `rq worker` run what is in a queue."""
    command = [RQ, "worker", "--burst", "-S", "json", "-u", server.url, queue.name]
    environment = {**os.environ, "FASTGPT2_MODEL": "demo"}
    subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
