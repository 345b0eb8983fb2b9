"""The soak runs against a Redis with its file, and two supervised pools; all of it may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer

QUEUE = "soak"
POOLS = 2


class PoolProcess:
    """A process of `fastgpt2 pool`.

    Args:
        environment: variables of its own.

    Attributes:
        down_until: not to be started again before this, on the monotonic clock.
    """

    def __init__(self, redis_url: str, workers: int, log: Path, **environment: str) -> None:
        self._redis_url, self._workers, self._log, self._environment = redis_url, workers, log, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.down_until = 0.0

    def start(self) -> None:
        own = {
            "FASTGPT2_REDIS_URL": self._redis_url,
            "FASTGPT2_QUEUE": QUEUE,
            "FASTGPT2_MODEL": "demo",
            "FASTGPT2_THREADS": "1",
            "FASTGPT2_MAX_BATCH": "4",
            **self._environment,
        }
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "pool", "--workers", str(self._workers)],
                env={**os.environ, **own},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def worker_pids(self) -> list[int]:
        """Return the ids of the processes that run, or are stopped, now."""
        if self.process is None or self.process.poll() is not None:
            return []
        with suppress(OSError):
            pid = self.process.pid
            return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def kill(self, workers_too: bool) -> None:
        """Send SIGKILL; the workers of a supervisor that dies alone are told by the kernel to stop."""
        pids = self.worker_pids() if workers_too else []
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            send(pid, signal.SIGKILL)


class Cluster:
    """Redis and the pools; `tend` starts again what is down and due."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.redis = RedisServer(folder=folder / "redis").start()
        self.redis_down_until = 0.0
        self.url = self.redis.url
        self.folder = folder
        per_pool = max(1, workers // POOLS)
        self.pools = [PoolProcess(self.url, per_pool, folder / f"pool-{n}.log") for n in range(POOLS)]
        for pool in self.pools:
            pool.start()

    def connect(self) -> Redis:
        return connect(self.url)

    def tend(self, now: float) -> None:
        if self.redis.poll() is not None and now >= self.redis_down_until:
            self.redis.start()
        for pool in self.pools:
            if (pool.process is None or pool.process.poll() is not None) and now >= pool.down_until:
                pool.start()

    def worker_pids(self) -> list[int]:
        return [pid for pool in self.pools for pid in pool.worker_pids()]

    def redis_pid(self) -> int | None:
        process = self.redis._process
        return process.pid if process is not None and process.poll() is None else None

    def stop(self) -> None:
        """Stop the pools in good order; Redis is left to be read."""
        for pool in self.pools:
            for pid in pool.worker_pids():
                send(pid, signal.SIGCONT)
            if pool.process is not None:
                send(pool.process.pid, signal.SIGTERM)
        for pool in self.pools:
            if pool.process is not None:
                pool.process.wait(60)

    def kill(self) -> None:
        for pool in self.pools:
            pool.kill(workers_too=True)
        self.redis.stop()


def send(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def patiently(connection: Redis, seconds: float = 30.0) -> Redis:
    """Return a connection, once Redis answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection.ping()
            return connection
        except RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
