"""The pools that `pool.py` compares, jobs for them, and what Redis says about a run afterwards.

All moments are by one clock, that of the Redis server. An entry of a stream is named by the millisecond in which it was
added, be it a piece of a job's text or RQ's record of its result; and the server's TIME is read before each job is
enqueued.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from benchmarks.common import Failed, environment, last_line, wait_until
from fastgpt2 import Client
from fastgpt2.bench import Values, quantile
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.process import set_up_child
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import results_key, stream_key, workers_key
from fastgpt2.system.redis_server import RedisServer

# A first load on a machine packs the model and measures which layout is fastest there.
START_SECONDS = 600.0
STOP_SECONDS = 60.0
RESULT_SECONDS = 1800.0
# A worker writes its figures to Redis every five seconds.
ANNOUNCE_SECONDS = 30.0

# Tokens of the shortest and the longest prompt.
SHORTEST, LONGEST = 8, 512
SEED = 20


@dataclass(frozen=True)
class Kind:
    """Workers that serve a queue of their own.

    Attributes:
        stock: RQ's own worker, which forks for each job and loads the model in there.
        options: options of `fastgpt2 worker`.
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


@contextmanager
def running_workers(
    command: Sequence[str], count: int, label: str, connection: Any, queue: str, **extra: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start `count` workers, wait until all are registered on their queue, and stop them afterwards.

    Args:
        label: what an error calls them.
        extra: variables for their environment.

    Raises:
        Failed: a worker ended, or they were not ready in time.
    """
    # The same prompts are sent in every round, and are to be read in every round.
    variables = {"FASTGPT2_PREFIX_MEMORY": "0", "FASTGPT2_POOL_WORKERS": str(count), **extra}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            for _ in range(count):
                started = subprocess.Popen(
                    command, env=environment(**variables), stdout=log, stderr=log, preexec_fn=set_up_child
                )
                processes.append(started)

            def registered() -> bool:
                if any(process.poll() is not None for process in processes):
                    log.seek(0)
                    raise Failed(f"{label} ended: {last_line(log.read())}")
                return bool(connection.scard(workers_key(queue)) == count)

            wait_until(registered, f"{label} to be ready", START_SECONDS)
            yield processes
        finally:
            for process in processes:
                process.terminate()  # all of them first: each takes a while
            for process in processes:
                _await_end(process)


def _await_end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Pools:
    """All kinds of pools on one Redis, each with a queue of its own. Use as a context manager.

    Args:
        folder: the model's folder.

    Attributes:
        clients: by the names of the kinds.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._generated = dict.fromkeys(KINDS, 0)
        self.clients: dict[str, Client] = {}

    def __enter__(self) -> Self:
        with self._stack:
            self._url = self._stack.enter_context(RedisServer()).url
            # Any: redis-py's types say that each answer may be one of another protocol, or None.
            self._connection: Any = connect(self._url)
            self._stack.callback(self._connection.close)
            # One kind after the other: a first load measures the machine.
            for name, kind in KINDS.items():
                workers = running_workers(
                    self._command(name, kind), kind.workers, kind.label, self._connection, name,
                    FASTGPT2_MODEL=self._folder,
                )  # fmt: skip
                self._stack.enter_context(workers)
                self.clients[name] = self._stack.enter_context(Client(self._url, name))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _command(self, name: str, kind: Kind) -> list[str]:
        if kind.stock:
            quiet = ("--quiet", "--disable-job-desc-logging")
            return [sys.executable, "-m", "rq.cli", "worker", "-u", self._url, "-S", "json", *quiet, name]
        served = ("--redis-url", self._url, "--queue", name)
        model = ("--model", self._folder, "--log-level", "warning")
        return [sys.executable, "-m", "fastgpt2", "worker", *served, *model, *kind.options]

    def describe(self) -> dict[str, Values]:
        """Return how each kind but RQ's own computes, and how many jobs a worker decodes together."""
        found = {}
        for name, kind in KINDS.items():
            if not kind.stock:
                by, most = self._connection.hmget(self._worker(name), "computes_by", "max_batch")
                found[name] = {"workers": kind.workers, "computes_by": by.decode(), "max_batch": int(most)}
        return found

    def run(self, name: str, prompts: Sequence[list[int]], tokens: int, stream: bool = True) -> Values:
        """Enqueue all prompts at one go and wait for the last result.

        Returns:
            tokens_per_s: all new tokens, divided by the time from the first job enqueued to the last result.
            ttft_ms: p50 and p95 over the jobs, from a job's being enqueued to its first piece of text.
            tpot_ms: p50 and p95 over all times between two successive pieces of a job; a piece is mostly a token.
            longest_gap_ms: the longest of those times.
            tokens, pieces: how many there were.
            Without a stream only tokens_per_s and tokens.
        """
        enqueued = []
        for prompt in prompts:
            at = self._now()
            enqueued.append((at, enqueue(self.clients[name], prompt, tokens, stream)))
        generated = sum(job.result(RESULT_SECONDS).usage.completion_tokens for _, job in enqueued)
        self._generated[name] += generated
        ended = max(self._moments(results_key(job.id))[-1] for _, job in enqueued)
        found: Values = {"tokens": generated, "tokens_per_s": generated / (ended - enqueued[0][0])}
        if not stream:
            return found
        # The stream's last entry says that the job has ended; RQ's own worker writes none.
        moments = [(at, self._moments(stream_key(job.id), b"text")) for at, job in enqueued]
        gaps = [1e3 * (later - earlier) for _, pieces in moments for earlier, later in pairwise(pieces)]
        first = [1e3 * (pieces[0] - at) for at, pieces in moments if pieces]
        if not first or not gaps:
            raise Failed(
                f"{KINDS[name].label}: {generated} tokens gave fewer than two pieces of text; "
                "try another --model or more --tokens"
            )
        found["pieces"] = sum(len(pieces) for _, pieces in moments)
        return {**found, "ttft_ms": spread(first), "tpot_ms": spread(gaps), "longest_gap_ms": max(gaps)}

    def run_alone(self, name: str, prompt: list[int], tokens: int, stream: bool) -> tuple[GenerationResult, float]:
        """Return the result of a lone job, and the seconds from just before it was enqueued until it was read."""
        started = time.perf_counter()
        result = enqueue(self.clients[name], prompt, tokens, stream).result(RESULT_SECONDS)
        seconds = time.perf_counter() - started
        self._generated[name] += result.usage.completion_tokens
        return result, seconds

    def read_counters(self, name: str) -> dict[str, float]:
        """Return the counters of a kind's only worker, once they include every token that it has generated."""
        fields = ("tokens", "steps", "step_seconds", "exchange_seconds")
        found: dict[str, float] = {}

        def complete() -> bool:
            values = self._connection.hmget(self._worker(name), fields)
            found.update(zip(fields, map(float, values), strict=True))
            return found["tokens"] == self._generated[name]

        what = f"{KINDS[name].label} to count its {self._generated[name]} tokens"
        wait_until(complete, what, ANNOUNCE_SECONDS)
        return found

    def _worker(self, name: str) -> str:
        key: bytes = min(self._connection.smembers(workers_key(name)))
        return key.decode()

    def _now(self) -> float:
        seconds, microseconds = self._connection.time()
        return float(seconds + microseconds / 1e6)

    def _moments(self, key: str, field: bytes | None = None) -> list[float]:
        """Return when the entries of a stream, or those of them that have a field, were added, in seconds."""
        entries = self._connection.xrange(key)
        return [int(name.partition(b"-")[0]) / 1e3 for name, fields in entries if field is None or field in fields]


def enqueue(client: Client, prompt: list[int], tokens: int, stream: bool) -> Any:
    """Enqueue a prompt that is continued by exactly `tokens` tokens. Return the job."""
    return client.enqueue(prompt, max_new_tokens=tokens, ignore_eos=True, stream=stream)


def mixed_prompts(
    config: GPT2Config, count: int, tokens: int, shortest: int = SHORTEST, longest: int = LONGEST
) -> list[list[int]]:
    """Return prompts of random ids; their lengths are spread evenly between the bounds, in random order.

    They are the same for every pool, and of the same mean length however many there are.

    Args:
        tokens: new ones that the model must have room for after a prompt.
    """
    dice = random.Random(SEED)
    longest = min(longest, config.n_positions - tokens)
    shortest = min(shortest, longest)
    lengths = [round(shortest + (longest - shortest) * (i + 0.5) / count) for i in range(count)]
    dice.shuffle(lengths)
    return [[dice.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return median and 95th percentile."""
    return {"p50": quantile(samples, 0.5), "p95": quantile(samples, 0.95)}
