"""The faults that come, one after the other, by a seed."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from chaos.cluster import Cluster, send

# Shorter than the lease: nothing may be taken from who is stopped for so long.
SHORT_STOP_SECONDS = (0.5, 4.0)
# Longer than the lease and all looks.
LONG_STOP_SECONDS = 22.0


@dataclass(frozen=True)
class Kill:
    """The moment at which a worker, or a whole pool of them, was killed while it had jobs.

    Attributes:
        supervised: whether its supervisor lived.
        executions: the ids of the executions that were running there, by job.
    """

    at: float
    supervised: bool
    executions: dict[str, str]


class Faults:
    """Chooses faults and commits them.

    Attributes:
        counts: of each kind.
        kills: for the time to recovery.
        disturbed_at: when Redis was last away or cut, which delays a recovery.
    """

    def __init__(self, cluster: Cluster, connection: Redis, seed: int, lasting: bool) -> None:
        self._cluster, self._connection = cluster, connection
        self._random = random.Random(seed)
        self._to_continue: list[tuple[float, int]] = []
        self._later: Callable[[int], bool] = lambda pid: any(pid == stopped for _, stopped in self._to_continue)
        self.counts: Counter[str] = Counter()
        self.kills: list[Kill] = []
        self.disturbed_at = 0.0
        self._kinds: dict[Callable[[], bool], int] = {
            self._kill_worker: 8,
            self._stop_worker: 4,
            self._end_worker: 3,
            self._cut: 3,
            self._kill_redis: 2,
            self._stop_redis: 1,
            self._kill_supervisor: 1,
            self._kill_pool: 1,
        }
        if lasting:
            self._kinds |= {self._zombie: 1, self._kill_pool_for_long: 1}

    def commit(self) -> None:
        """Commit one fault, chosen by chance."""
        fault = self._random.choices(list(self._kinds), list(self._kinds.values()))[0]
        if fault():
            self.counts[fault.__name__.strip("_")] += 1

    def tend(self, now: float) -> None:
        """Wake up the processes that have been stopped long enough."""
        for at, pid in list(self._to_continue):
            if now >= at:
                send(pid, signal.SIGCONT)
                self._to_continue.remove((at, pid))

    def over(self) -> None:
        self.tend(float("inf"))

    def _worker(self) -> int | None:
        pids = [pid for pid in self._cluster.worker_pids() if not self._later(pid)]
        return self._random.choice(pids) if pids else None

    def _note_kill(self, pids: list[int], supervised: bool) -> None:
        executions: dict[str, str] = {}
        with suppress(RedisError):
            names = {}
            workers: Any = self._connection.smembers("rq:workers")
            for key in workers:
                pid = self._connection.hget(key, "pid")
                if pid is not None and int(pid) in pids:
                    names[key] = pid
            for key in names:
                running: Any = self._connection.smembers(f"{key.decode()}:executions")
                for both in running:
                    job_id, _, execution = both.decode().rpartition(":")
                    executions[job_id] = execution
        if executions:
            self.kills.append(Kill(time.monotonic(), supervised, executions))

    def _kill_worker(self) -> bool:
        pid = self._worker()
        if pid is None:
            return False
        send(pid, signal.SIGSTOP)  # so that what is noted is what it held when it was killed
        self._note_kill([pid], supervised=True)
        send(pid, signal.SIGKILL)
        return True

    def _stop_worker(self) -> bool:
        return self._stop(self._random.uniform(*SHORT_STOP_SECONDS))

    def _zombie(self) -> bool:
        return self._stop(LONG_STOP_SECONDS)

    def _stop(self, seconds: float) -> bool:
        pid = self._worker()
        if pid is None:
            return False
        send(pid, signal.SIGSTOP)
        self._to_continue.append((time.monotonic() + seconds, pid))
        return True

    def _end_worker(self) -> bool:
        pid = self._worker()
        if pid is None:
            return False
        send(pid, signal.SIGTERM)
        return True

    def _cut(self) -> bool:
        self.disturbed_at = time.monotonic()
        with suppress(RedisError):
            self._connection.client_kill_filter(_type="normal", skipme=False)
        return True

    def _kill_redis(self) -> bool:
        pid = self._cluster.redis_pid()
        if pid is None:
            return False
        self.disturbed_at = time.monotonic()
        self._cluster.redis_down_until = self.disturbed_at + self._random.uniform(0.0, 2.0)
        send(pid, signal.SIGKILL)
        return True

    def _stop_redis(self) -> bool:
        pid = self._cluster.redis_pid()
        if pid is None:
            return False
        self.disturbed_at = time.monotonic() + 2.0
        send(pid, signal.SIGSTOP)
        self._to_continue.append((time.monotonic() + 2.0, pid))
        return True

    def _kill_supervisor(self) -> bool:
        self._random.choice(self._cluster.pools).kill(workers_too=False)
        return True

    def _kill_pool(self) -> bool:
        return self._kill_whole(1.0)

    def _kill_pool_for_long(self) -> bool:
        return self._kill_whole(25.0)

    def _kill_whole(self, seconds: float) -> bool:
        pool = self._random.choice(self._cluster.pools)
        pids = pool.worker_pids()
        for pid in pids:
            send(pid, signal.SIGSTOP)
        self._note_kill(pids, supervised=False)
        pool.down_until = time.monotonic() + seconds
        pool.kill(workers_too=True)
        return True
