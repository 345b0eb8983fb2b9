"""The loss of masters: `python -m chaos.failovers --seed 1 --durability replica --report FILE`, in the folder tests."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Self

from chaos.callers import PATIENCE_SECONDS, Acknowledged, Asker, Book, Caller, Enqueuer, Mapper, Streamer, Waiter
from chaos.cluster import QUEUE, PoolProcess
from chaos.ledger import account, leftovers
from chaos.sentinel_set import SentinelSet
from chaos.submission import ENTRIES
from fastgpt2 import Client
from fastgpt2.errors import JobNotFound, QueueUnavailable, ResultTimeout
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, job_key, leases_key, queue_key, queues_of, registry_key

POOLS = 2
KINDS = ("kill", "hang", "part", "cut")
# The replicas are held back for so long before some of the failovers: what is lost has to lie in here.
LAG_SECONDS = 0.5
# Within the first, half of the services are to be back, and within the second all.
BACK_P50_SECONDS, BACK_MOST_SECONDS = 10.0, 20.0
_PROBE_SECONDS = 5.0
_START_SECONDS = 60.0
_END_SECONDS = 180.0


@dataclass
class Failover:
    """One loss of a master. Times are on the monotonic clock.

    Attributes:
        kind: the master was killed, stopped (hang), parted from everybody by a proxy that hangs, or cut off.
        held: the replicas were held back before.
        deaf: one of the Sentinels hung meanwhile.
        began: from when on nothing reached the replicas any more.
        at: when the master was lost.
        promoted: when the sentinels named another.
        served: when a job that was enqueued after the loss had its result.
        whole: when the old one was a replica, as far as that was waited for: before the next loss.
    """

    kind: str
    held: bool
    deaf: bool
    began: float
    at: float
    promoted: float = 0.0
    served: float = 0.0
    whole: float = math.inf

    def summary(self) -> dict[str, Any]:
        after = {"promoted": round(self.promoted - self.at, 2), "back": round(self.served - self.at, 2)}
        return {"kind": self.kind, "held": self.held, "deaf": self.deaf, **after}


@dataclass
class Report:
    """The results of a run. Times are in seconds.

    Attributes:
        acknowledged: how many jobs were; of them `in_lag` while the replicas were held back.
        lost: how many of them are, `lost_in_lag` of those.
        run_again: how many of them were started more than once, as far as Redis has not lost it.
        told: how many readers were told that their job is lost.
        back: from the loss of a master until a job that was enqueued later had its result.
        in_time: whether that was soon enough.
    """

    seed: int
    durability: str
    workers: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    held: int = 0
    deaf: int = 0
    acknowledged: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    run_again: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    in_lag: int = 0
    lost: int = 0
    lost_in_lag: int = 0
    told: int = 0
    failovers: list[dict[str, Any]] = field(default_factory=list)
    back: dict[str, float] = field(default_factory=dict)
    back_after_promotion: dict[str, float] = field(default_factory=dict)
    in_time: bool = False
    wrong: list[str] = field(default_factory=list)
    machine: str = ""


class Service:
    """Pools and an endpoint. Use as a context manager: it begins when all workers are there, and stops in good order.

    Attributes:
        http_url: the endpoint's.
    """

    def __init__(self, folder: Path, url: str, durability: str, workers: int) -> None:
        self._log = folder / "api.log"
        self._own = {"FASTGPT2_REDIS_URL": url, "FASTGPT2_QUEUE": QUEUE, "FASTGPT2_DURABILITY": durability}
        self._workers = workers
        each = max(1, workers // POOLS)
        self._pools = [
            PoolProcess(url, each, folder / f"pool-{n}.log", FASTGPT2_DURABILITY=durability)
            for n in range(workers // each)
        ]
        self._api: subprocess.Popen[bytes] | None = None
        self.http_url = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._kill)
            for pool in self._pools:
                pool.start()
            with self._log.open("ab") as log:
                self._api = subprocess.Popen(
                    [sys.executable, "-m", "fastgpt2", "api", "--port", "0"],
                    env={**os.environ, **self._own},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            _wait(lambda: "endpoint on" in self._log.read_text(), "the endpoint to listen")
            _wait(lambda: len(self.pids()) == self._workers + 1, "the workers to start")
            self.http_url = self._log.read_text().partition("endpoint on ")[2].split()[0]
            stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.stop()
        self._kill()

    def pids(self) -> set[int]:
        """Return the processes of all workers and of the endpoint that run."""
        workers = {pid for pool in self._pools for pid in pool.worker_pids()}
        return workers | ({self._api.pid} if self._api is not None and self._api.poll() is None else set())

    def stop(self) -> None:
        processes = [pool.process for pool in self._pools] + [self._api]
        for process in processes:
            if process is not None:
                process.terminate()
        for process in processes:
            if process is not None:
                process.wait(90)

    def _kill(self) -> None:
        for pool in self._pools:
            pool.kill(workers_too=True)
        if self._api is not None:
            self._api.kill()
            self._api.wait()


class Run:
    """One run: callers go on, masters are lost one after the other, and then everything is accounted for.

    Args:
        kinds: of the failovers, in their order.
        callers: how many there are of each kind.
    """

    def __init__(self, folder: Path, report: Report, kinds: list[str], callers: int) -> None:
        self._folder, self._report, self._kinds, self._callers_each = folder, report, kinds, callers
        self._random, self._others = random.Random(report.seed), random.Random(report.seed + 1)
        self._book = Book()
        self._failovers: list[Failover] = []

    def run(self) -> None:
        report, began = self._report, time.monotonic()
        # As docker-compose.yml and deploy/kubernetes/ha have it where jobs are to outlast a master.
        min_replicas = 1 if report.durability == "replica" else 0
        with SentinelSet(self._folder / "redis", min_replicas) as self._set:
            service = Service(self._folder, self._set.url, report.durability, report.workers)
            with service:
                self._lose_masters(service)
            self._settle()
        report.seconds = round(time.monotonic() - began, 1)

    def _lose_masters(self, service: Service) -> None:
        over = threading.Event()
        self._probe()  # the workers serve
        before = service.pids()
        callers = self._start_callers(service, over)
        try:
            for kind in self._kinds:
                self._wait_until_whole()
                time.sleep(self._random.uniform(1.0, 2.0))  # while the callers go on
                self._lose(kind)
        finally:
            over.set()
        deadline = time.monotonic() + PATIENCE_SECONDS + 30.0
        for caller in callers:
            caller.join(max(0.0, deadline - time.monotonic()))
            if caller.is_alive():
                self._book.complain(f"{caller.name} waits for ever")
        _wait(self._nothing_is_left, "all jobs to be over", _END_SECONDS, self._book)
        if service.pids() != before:
            self._book.complain("workers or the endpoint were started again")

    def _start_callers(self, service: Service, over: threading.Event) -> list[Caller]:
        url, durability, book = self._set.url, self._report.durability, self._book
        callers: list[Caller] = []
        for seed in range(self._callers_each):
            kinds = (Waiter, Streamer, Mapper, Enqueuer)
            callers += [kind(url, durability, self._report.seed * 1000 + seed, book, over) for kind in kinds]
        callers.append(Asker(service.http_url, self._report.seed, book, over))
        for caller in callers:
            caller.start()
        return callers

    def _lose(self, kind: str) -> None:
        old = self._set.master()
        began, held = time.monotonic(), self._random.random() < 0.5
        if held:
            self._set.hold_replicas(old)
            time.sleep(LAG_SECONDS)
        sentinel = self._others.choice(self._set.sentinels) if self._others.random() < 0.3 else None
        if sentinel is not None:
            sentinel.stop()
        failover = Failover(kind, held, sentinel is not None, began, time.monotonic())
        self._failovers.append(failover)
        self._set.lose(old, kind)
        with ThreadPoolExecutor(1) as prober:
            probing = prober.submit(self._probe)
            self._set.wait_for_promotion(old)
            failover.promoted = time.monotonic()
            failover.served = probing.result()
        time.sleep(self._random.uniform(0.0, 2.0))  # the old one is away for a while, or comes at once
        if sentinel is not None:
            sentinel.resume()
        self._set.bring_back(old, kind, asks_first=self._random.random() < 0.5)

    def _wait_until_whole(self) -> None:
        if self._failovers:
            self._set.wait_until_complete(linked=False)
            self._failovers[-1].whole = time.monotonic()

    def _probe(self) -> float:
        """Enqueue until a job that was enqueued from now on has its result; return when that was."""
        entry = ENTRIES[0]
        with Client(self._set.url, QUEUE) as client:
            while True:
                try:
                    job = client.enqueue(entry["prompt"], max_new_tokens=1, priority="high")
                    job.result(timeout=_PROBE_SECONDS)
                    return time.monotonic()
                except (QueueUnavailable, ResultTimeout, JobNotFound):
                    time.sleep(0.02)

    def _nothing_is_left(self) -> bool:
        connection = self._set.connect()
        left = 0
        for name in queues_of(QUEUE):
            left += connection.llen(queue_key(name)) + connection.zcard(registry_key("started", name))
        connection.close()
        return left == 0

    def _settle(self) -> None:
        """Fill the report in."""
        report, connection = self._report, self._set.connect()
        _wait(lambda: not connection.zcard(leases_key(QUEUE)), "all workers to sign off", _START_SECONDS, self._book)
        ends: Counter[str] = Counter()
        for entry in self._book.acknowledged:
            end, complaints = account(connection, entry.job)
            ends[end] += 1
            report.run_again += int(connection.hget(job_key(entry.job.id), ATTEMPTS_FIELD) or 0) > 1
            if end == "missing":
                complaints = self._judge_loss(entry)
                report.lost_in_lag += self._is_in_lag(entry)
            self._book.wrong += [f"job {entry.job.id} ({entry.job.kind}): {complaint}" for complaint in complaints]
        self._book.wrong += leftovers(connection)
        connection.close()
        report.acknowledged, report.ends = len(self._book.acknowledged), dict(ends)
        report.counts = dict(sorted(self._book.counts.items()))
        report.lost, report.told = ends["missing"], sum(entry.told for entry in self._book.acknowledged)
        report.in_lag = sum(self._is_in_lag(entry) for entry in self._book.acknowledged)
        report.faults = dict(Counter(failover.kind for failover in self._failovers))
        report.failovers = [each.summary() for each in self._failovers]
        report.held = sum(failover.held for failover in self._failovers)
        report.deaf = sum(failover.deaf for failover in self._failovers)
        report.back = _summary([each.served - each.at for each in self._failovers])
        report.back_after_promotion = _summary([max(0.0, each.served - each.promoted) for each in self._failovers])
        report.in_time = report.back["p50"] <= BACK_P50_SECONDS and report.back["max"] <= BACK_MOST_SECONDS
        report.wrong = self._book.wrong

    def _judge_loss(self, entry: Acknowledged) -> list[str]:
        if self._report.durability == "replica":
            return ["it was acknowledged, and is lost"]
        if not any(each.began <= entry.at and entry.asked <= each.whole for each in self._failovers):
            return ["it is lost, and was enqueued while a master was well and followed"]
        if entry.waited and not entry.told and not entry.seen:
            return ["it is lost, and who waited was not told"]
        return []

    def _is_in_lag(self, entry: Acknowledged) -> bool:
        """Tell whether a job was written while the replicas were behind a master that then was lost."""
        return any(each.began <= entry.at and entry.asked <= each.at for each in self._failovers)


def _summary(times: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(times), 2), "max": round(max(times), 2)}


def _wait(condition: Any, what: str, seconds: float = _START_SECONDS, book: Book | None = None) -> None:
    """Wait; after the time, raise or complain in the book."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            if book is None:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            book.complain(f"waited {seconds:.0f} s for {what}")
            return
        time.sleep(0.05)


def run(folder: Path, durability: str, seed: int, kinds: list[str], workers: int, callers: int) -> Report:
    """Lose a master in each of these ways, one after the other, and account for everything."""
    report = Report(seed, durability, workers, machine=f"{os.cpu_count()} cores, {platform.machine()}")
    Run(folder, report, kinds, callers).run()
    return report


def kinds_by(seed: int, count: int) -> list[str]:
    """Return each kind as often as the others, in an order by chance."""
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    random.Random(seed).shuffle(kinds)
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--failovers", type=int, default=10)
    parser.add_argument("--durability", choices=("memory", "replica"), default="replica")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--callers", type=int, default=2, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="a JSON file with one entry for each durability")
    parser.add_argument("--folder", type=Path, help="where to leave all logs; default a temporary folder")
    given = parser.parse_args()
    kinds = kinds_by(given.seed, given.failovers)
    with tempfile.TemporaryDirectory(prefix="fastgpt2-failovers-") as folder:
        report = run(given.folder or Path(folder), given.durability, given.seed, kinds, given.workers, given.callers)
        if report.wrong:
            for log in sorted((given.folder or Path(folder)).glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n" + "".join(log.read_text("utf-8", "replace")[-20000:]))
    text: dict[str, Any] = {"date": date.today().isoformat(), **asdict(report)}
    print(json.dumps(text, indent=2))
    if given.report is not None:
        whole = json.loads(given.report.read_text("utf-8")) if given.report.exists() else {}
        given.report.write_text(json.dumps({**whole, given.durability: text}, indent=2) + "\n", "utf-8")
    return 1 if report.wrong or not report.in_time else 0


if __name__ == "__main__":
    sys.exit(main())
