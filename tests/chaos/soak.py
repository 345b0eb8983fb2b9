"""The soak itself: `python -m chaos.soak --jobs 2000 --seed 1 --report FILE`, in the folder tests."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from chaos.cluster import QUEUE, Cluster, patiently
from chaos.faults import Faults, Kill
from chaos.ledger import audit
from chaos.submission import Submission
from fastgpt2.protocol.keys import EXECUTION_FIELD, leases_key

OVER = (b"finished", b"failed", b"canceled", b"stopped")


@dataclass
class Report:
    """The results of a soak. Times are in seconds."""

    seed: int
    jobs: int
    workers: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    crashes: int = 0
    submissions_repeated: int = 0
    recovery: dict[str, dict[str, float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    machine: str = ""


class Recoveries:
    """Return how long after a kill each job of the killed ran again, under another execution, or had ended."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._open: list[tuple[Kill, str, str]] = []
        self._seen = 0
        self.times: dict[str, list[float]] = {"supervisor lives": [], "pool died": [], "Redis was away too": []}

    def watch(self, faults: Faults) -> None:
        for kill in faults.kills[self._seen :]:
            self._open += [(kill, *pair) for pair in kill.executions.items()]
        self._seen = len(faults.kills)
        if not self._open:
            return
        with self._connection.pipeline(transaction=False) as pipeline:
            for _, job_id, _ in self._open:
                pipeline.hmget(f"rq:job:{job_id}", "status", EXECUTION_FIELD)
            replies = pipeline.execute()
        still = []
        for (kill, job_id, execution), (status, current) in zip(self._open, replies, strict=True):
            if (status == b"started" and current != execution.encode()) or status in OVER or status is None:
                away = faults.disturbed_at > kill.at - 3.0
                kind = "Redis was away too" if away else "supervisor lives" if kill.supervised else "pool died"
                self.times[kind].append(time.monotonic() - kill.at)
            else:
                still.append((kill, job_id, execution))
        self._open = still

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            kind: {"jobs": len(times), "p50": round(statistics.median(times), 2), "max": round(max(times), 2)}
            for kind, times in self.times.items()
            if times
        }


def run(
    folder: Path, jobs: int, workers: int, seed: int, faults: int, every: float, lasting: bool, limit: float
) -> Report:
    """Submit jobs while faults come, then account for everything.

    Args:
        jobs, workers, faults: how many.
        every: how many seconds the faults are apart, on average.
        lasting: also faults that last longer than a lease.
        limit: seconds after which what is not over counts as lost.
    """
    report = Report(seed, jobs, workers, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    cluster = Cluster(folder, workers)
    try:
        _soak(cluster, report, faults, every, lasting, limit)
    finally:
        cluster.kill()
    return report


def _soak(cluster: Cluster, report: Report, count: int, every: float, lasting: bool, limit: float) -> None:
    connection = cluster.connect()
    began = time.monotonic()
    faults = Faults(cluster, connection, report.seed, lasting)
    submission = Submission(cluster.url, connection, report.seed + 1)
    recoveries, chance = Recoveries(connection), random.Random(report.seed + 2)
    burst = max(1, report.jobs // count)

    def tend() -> None:
        now = time.monotonic()
        cluster.tend(now)
        faults.tend(now)
        submission.tend(now)
        with suppress(RedisError):
            recoveries.watch(faults)

    while len(submission.everything) < report.jobs:
        until = len(submission.everything) + burst
        while len(submission.everything) < until:
            submission.submit(tend)
            tend()
        struck_at = time.monotonic() + chance.uniform(0.0, 0.3)  # while some run
        _tend_until(struck_at, tend)
        faults.commit()
        _tend_until(struck_at + chance.uniform(0.5, 1.5) * every, tend)
    everything = submission.everything
    while time.monotonic() - began < limit:
        tend()
        with suppress(RedisError):
            if _all_over(connection, [job.id for job in everything]):
                break
        time.sleep(0.1)
    faults.over()
    cluster.tend(time.monotonic())
    submission.finish()
    report.seconds = round(time.monotonic() - began, 1)
    # Who died last with empty hands is taken off the lists by those who live: not by nobody.
    deadline = time.monotonic() + 30.0
    while not _only_the_living_are_listed(cluster, connection) and time.monotonic() < deadline:
        tend()
        time.sleep(0.1)
    cluster.stop()
    patiently(connection)
    _wait_for_upkeep(connection)
    ends, report.wrong = audit(connection, everything)
    report.ends, report.faults = dict(ends), dict(faults.counts)
    report.jobs = len(everything)
    report.crashes = sum(int(connection.hget(f"rq:job:{job.id}", "fastgpt2_crashes") or 0) for job in everything)
    report.submissions_repeated = submission.repeated
    report.recovery = recoveries.summary()


def _tend_until(moment: float, tend: Callable[[], None]) -> None:
    while time.monotonic() < moment:
        tend()
        time.sleep(0.01)


def _only_the_living_are_listed(cluster: Cluster, connection: Redis) -> bool:
    try:
        pids = {str(pid).encode() for pid in cluster.worker_pids()}
        listed: Any = connection.smembers("rq:workers")
        return bool(pids) and all(connection.hget(key, "pid") in pids for key in listed)
    except RedisError:
        return False


def _all_over(connection: Redis, ids: list[str]) -> bool:
    with connection.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.hget(f"rq:job:{job_id}", "status")
        return all(status in OVER for status in pipeline.execute())


def _wait_for_upkeep(connection: Redis) -> None:
    """Wait until nobody has a lease: all have signed off, and supervisors have taken back the jobs of the dead."""
    deadline = time.monotonic() + 10.0
    while connection.zcard(leases_key(QUEUE)) and time.monotonic() < deadline:
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--every", type=float, default=2.5, help="seconds between two faults, on average")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds after which what is not over is lost")
    parser.add_argument("--report", type=Path, help="where to write what was found, as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastgpt2-soak-") as folder:
        report = run(Path(folder), given.jobs, given.workers, given.seed, given.faults, given.every, True, given.limit)
        if report.wrong:
            for log in sorted(Path(folder).glob("pool-*.log")):
                sys.stderr.write(f"--- {log.name}\n" + "".join(log.read_text("utf-8", "replace")[-20000:]))
    text: dict[str, Any] = {"date": date.today().isoformat(), **asdict(report)}
    print(json.dumps(text, indent=2))
    if given.report is not None:
        given.report.write_text(json.dumps(text, indent=2) + "\n", "utf-8")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
