"""The pools that `bench_pool.py` compares, jobs for them, and what Redis tells of a run afterwards.

All moments are by one clock, the Redis server's: an entry of a stream is named by the millisecond in which it was
added, be it a piece of a job's text or RQ's record of its result; TIME is asked before each job is enqueued.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common import Failed, environment, last_line

from fastgpt2 import Client
from fastgpt2.bench import Values, quantile, summary
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.process import set_up_child
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import stream_key
from fastgpt2.system.redis_server import RedisServer

# A first load on a machine packs the model and measures what pays.
START_SECONDS = 600.0
STOP_SECONDS = 60.0
RESULT_SECONDS = 1800.0
# A worker tells its figures every five seconds.
ANNOUNCE_SECONDS = 30.0

SHORTEST, LONGEST = 8, 512
SEED = 20


@dataclass(frozen=True)
class Kind:
    """Some processes that serve a queue of their own.

    Args:
        stock: RQ's own worker, which forks for each job and loads the model in there.
        options: of `fastgpt2 worker`.
    """

    label: str
    workers: int = 1
    options: tuple[str, ...] = ()
    stock: bool = False


KINDS = {
    "one": Kind("fastgpt2, 1 worker"),
    "two": Kind("fastgpt2, 2 workers", workers=2),
    "single": Kind("fastgpt2, a job at a time", options=("--max-batch", "1")),
    "stock": Kind("stock rq worker", stock=True),
}


class Pools:
    """All kinds of them on one Redis, each waiting for jobs on a queue of its own. Use as a context manager.

    Args:
        folder: of the model.

    Attributes:
        clients: by the names of the kinds.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._made = dict.fromkeys(KINDS, 0)
        self.clients: dict[str, Client] = {}

    def __enter__(self) -> Self:
        with self._stack:
            self._logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fastgpt2-bench-")))
            self._url = self._stack.enter_context(RedisServer()).url
            # Any: redis-py's types have it that each answer may be one of another protocol, or none.
            self._connection: Any = connect(self._url)
            self._stack.callback(self._connection.close)
            # One kind after the other: a first load measures the machine.
            for name, kind in KINDS.items():
                self._start(name, kind)
                self.clients[name] = self._stack.enter_context(Client(self._url, name))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _start(self, name: str, kind: Kind) -> None:
        log = self._logs / f"{name}.log"
        # The same prompts are sent in every round, and are to be read in every round.
        extra = {"FASTGPT2_PREFIX_MEMORY": "0", "FASTGPT2_POOL_WORKERS": str(kind.workers)}
        processes = []
        for _ in range(kind.workers):
            with log.open("a") as file:
                process = subprocess.Popen(
                    self._command(name, kind),
                    env=environment(FASTGPT2_MODEL=self._folder, **extra),
                    stdout=file,
                    stderr=file,
                    preexec_fn=set_up_child,
                )
            self._stack.callback(stop, process)
            processes.append(process)

        def registered() -> bool:
            if any(process.poll() is not None for process in processes):
                raise Failed(f"{kind.label} ended: {last_line(log.read_text('utf-8', errors='replace'))}")
            return bool(self._connection.scard(f"rq:workers:{name}") == kind.workers)

        wait_until(registered, f"{kind.label} to be ready", START_SECONDS)

    def _command(self, name: str, kind: Kind) -> list[str]:
        if kind.stock:
            quiet = ("--quiet", "--disable-job-desc-logging")
            return [sys.executable, "-m", "rq.cli", "worker", "-u", self._url, "-S", "json", *quiet, name]
        served = ("--redis-url", self._url, "--queue", name)
        model = ("--model", self._folder, "--log-level", "warning")
        return [sys.executable, "-m", "fastgpt2", "worker", *served, *model, *kind.options]

    def described(self) -> dict[str, Values]:
        """How each kind but RQ's own computes, and how many jobs a worker of it decodes together."""
        found = {}
        for name, kind in KINDS.items():
            if not kind.stock:
                by, most = self._connection.hmget(self._worker(name), "computes_by", "max_batch")
                found[name] = {"workers": kind.workers, "computes_by": by.decode(), "max_batch": int(most)}
        return found

    def run(self, name: str, prompts: Sequence[list[int]], tokens: int, stream: bool = True) -> Values:
        """Enqueue all prompts at one go and wait for the last result.

        Returns:
            tokens_per_s: all new tokens by the time from the first job enqueued to the last result.
            ttft_ms: p50, p95 over the jobs, from a job's being enqueued to its first piece of text.
            tpot_ms: p50, p95 over all times between two successive pieces of a job, mostly a token each.
            longest_gap_ms: the longest of those.
            tokens, pieces: how many there were.
            Without a stream only the first and the number of tokens.
        """
        enqueued = []
        for prompt in prompts:
            at = self._now()
            enqueued.append((at, enqueue(self.clients[name], prompt, tokens, stream)))
        made = sum(job.result(RESULT_SECONDS).usage.completion_tokens for _, job in enqueued)
        self._made[name] += made
        ended = max(self._moments(f"rq:results:{job.id}")[-1] for _, job in enqueued)
        found: Values = {"tokens": made, "tokens_per_s": made / (ended - enqueued[0][0])}
        if not stream:
            return found
        # The stream's last entry says that the job has ended; a stock worker writes none.
        moments = [(at, self._moments(stream_key(job.id), b"text")) for at, job in enqueued]
        gaps = [1e3 * (later - earlier) for _, pieces in moments for earlier, later in pairwise(pieces)]
        first = [1e3 * (pieces[0] - at) for at, pieces in moments if pieces]
        if not first or not gaps:
            raise Failed(
                f"{KINDS[name].label}: {made} tokens gave no text to speak of; try another --model or --tokens"
            )
        found["pieces"] = sum(len(pieces) for _, pieces in moments)
        return {**found, "ttft_ms": spread(first), "tpot_ms": spread(gaps), "longest_gap_ms": max(gaps)}

    def alone(self, name: str, prompt: list[int], tokens: int, stream: bool) -> tuple[GenerationResult, float]:
        """The result of a lone job, and the seconds from before its being enqueued until it was read."""
        started = time.perf_counter()
        result = enqueue(self.clients[name], prompt, tokens, stream).result(RESULT_SECONDS)
        seconds = time.perf_counter() - started
        self._made[name] += result.usage.completion_tokens
        return result, seconds

    def announced(self, name: str) -> dict[str, float]:
        """What the one worker of a kind has counted: waits until it tells of every token that it was asked for."""
        fields = ("tokens", "steps", "step_seconds", "exchange_seconds")
        found: dict[str, float] = {}

        def told() -> bool:
            values = self._connection.hmget(self._worker(name), fields)
            found.update(zip(fields, map(float, values), strict=True))
            return found["tokens"] == self._made[name]

        wait_until(told, f"{KINDS[name].label} to tell of its {self._made[name]} tokens", ANNOUNCE_SECONDS)
        return found

    def _worker(self, name: str) -> str:
        key: bytes = min(self._connection.smembers(f"rq:workers:{name}"))
        return key.decode()

    def _now(self) -> float:
        seconds, microseconds = self._connection.time()
        return float(seconds + microseconds / 1e6)

    def _moments(self, key: str, field: bytes | None = None) -> list[float]:
        """When the entries of a stream, or those of them that have a field, were added, in seconds."""
        entries = self._connection.xrange(key)
        return [int(name.partition(b"-")[0]) / 1e3 for name, fields in entries if field is None or field in fields]


def enqueue(client: Client, prompt: list[int], tokens: int, stream: bool) -> Any:
    return client.enqueue(prompt, max_new_tokens=tokens, ignore_eos=True, stream=stream)


def mixed(config: GPT2Config, count: int, tokens: int, shortest: int = SHORTEST, longest: int = LONGEST) -> list[Any]:
    """Prompts of ids drawn at random; their lengths spread evenly over the bounds, in an order drawn at random.

    The same for every pool, and of the same mean length however many they are.
    """
    drawn = random.Random(SEED)
    longest = min(longest, config.n_positions - tokens)
    shortest = min(shortest, longest)
    lengths = [round(shortest + (longest - shortest) * (i + 0.5) / count) for i in range(count)]
    drawn.shuffle(lengths)
    return [[drawn.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


def spread(samples: Sequence[float]) -> dict[str, float]:
    return {"p50": quantile(samples, 0.5), "p95": quantile(samples, 0.95)}


def medians(runs: Sequence[Mapping[str, Any]]) -> Values:
    """The median of each number of some runs, with quartiles; what the runs hold by name stays by name."""
    return {
        key: medians([run[key] for run in runs]) if isinstance(value, dict) else summary([run[key] for run in runs])
        for key, value in runs[0].items()
    }


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
