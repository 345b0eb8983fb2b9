"""Memory of Redis by jobs, and speed and memory of workers."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.capacity.fleet import RUN_SECONDS, Fleet, fleet
from benchmarks.capacity.jobs import PROMPT, WORKERS, demo_prompts
from benchmarks.capacity.redis_use import memory_used
from benchmarks.common import progress, wait_until
from benchmarks.pool.pools import enqueue, mixed_prompts
from fastgpt2 import Client
from fastgpt2.bench import Values, summary
from fastgpt2.engine.machine import usable_cores
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.recycling import private_and_shared

QUEUE, WAITING = "capacity", "waiting"
LONG_PROMPT = 500
# Between two readings of the workers' memory.
READ_SECONDS = 0.5


# Memory of Redis.


def measure_kept_bytes(asked: argparse.Namespace) -> list[Values]:
    """Return the bytes of a job: of waiting jobs by their prompts, of finished ones, while kept, by their new tokens.

    Prompts are random ids, which RQ's compression makes little smaller; texts take less.
    """
    found = []
    with RedisServer() as redis, fleet(redis.url, QUEUE, WORKERS) as workers, Client(redis.url, WAITING) as nobody:
        workers.run_unread(demo_prompts(16, 20), 20, True)  # first: scripts, buffers, the pool's own figures
        for length in (PROMPT, LONG_PROMPT):
            progress(f"memory of waiting jobs, prompts of {length}")
            prompts = demo_prompts(asked.waiting, 1, length)
            before = memory_used(workers.connection)
            for prompt in prompts:
                enqueue(nobody, prompt, 1, False)
            each = (memory_used(workers.connection) - before) / asked.waiting
            found.append(kept_entry("waiting", asked.waiting, length, 0, False, each))
        for tokens in asked.kept_tokens:
            for stream in (False, True):
                progress(f"memory of finished jobs, {tokens} tokens")
                before = memory_used(workers.connection)
                workers.run_unread(demo_prompts(asked.kept, tokens), tokens, stream)
                each = (memory_used(workers.connection) - before) / asked.kept
                found.append(kept_entry("finished", asked.kept, PROMPT, tokens, stream, each))
    progress("")
    return found


def kept_entry(state: str, jobs: int, prompt: int, tokens: int, stream: bool, each: float) -> Values:
    """Return the part of the result about one kind of job."""
    sizes = {"prompt_tokens": prompt, "new_tokens": tokens, "stream": stream}
    return {"state": state, "jobs": jobs, **sizes, "bytes_each": each}


# Workers.


def measure_workers(model: str, asked: argparse.Namespace) -> Values:
    """Return speed and memory of workers of one model."""
    folder = find_model(model)
    config = read_config(folder)
    cores = usable_cores()
    # One worker on one core; one on all cores; as many workers on one core each as there are cores.
    kinds = list(dict.fromkeys([(1, 1), (1, cores), (cores, 1)]))
    entry: Values = {
        "model": model,
        "new_tokens": asked.worker_tokens,
        "in_flight": asked.in_flight,
        # Keys and values, in float32.
        "kv_bytes_per_token": 2 * config.n_layer * config.n_embd * 4,
        "n_positions": config.n_positions,
        "pools": [measure_speed(str(folder), config, count, threads, asked) for count, threads in kinds],
        "memory": [measure_memory(str(folder), count) for count in sorted({1, asked.memory_workers})],
    }
    progress("")
    return entry


def measure_speed(folder: str, config: GPT2Config, count: int, threads: int, asked: argparse.Namespace) -> Values:
    """Return the tokens/s of `count` workers with `threads` cores each, and the memory that one holds meanwhile."""
    tokens, jobs = asked.worker_tokens, asked.in_flight * count
    lengths = {
        "short": mixed_prompts(config, jobs, tokens, PROMPT, PROMPT),
        "mixed": mixed_prompts(config, jobs, tokens),
    }
    speeds: dict[str, list[float]] = {name: [] for name in lengths}
    privates: list[float] = []
    with RedisServer() as redis, fleet(redis.url, QUEUE, count, folder, threads) as workers:
        for prompt in lengths["short"][:count]:  # not measured: a first job does things that later ones do not
            workers.client.enqueue(prompt, max_new_tokens=2, ignore_eos=True).result(RUN_SECONDS)
        for number in range(asked.rounds):
            for name, prompts in lengths.items():
                progress(f"{count} workers of {threads}, {name} prompts, round {number + 1} of {asked.rounds}")
                seconds = timed(workers, prompts, tokens, privates)
                speeds[name].append(jobs * tokens / seconds)
    return {
        "workers": count,
        "threads": threads,
        "jobs": jobs,
        "prompt_tokens": {name: statistics.mean(map(len, prompts)) for name, prompts in lengths.items()},
        "tokens_per_s": {name: summary(found) for name, found in speeds.items()},
        # With the keys and values of the running jobs; of the first process only, where a worker has helpers.
        "private_bytes_at_most": max(privates),
    }


def timed(workers: Fleet, prompts: Sequence[list[int]], tokens: int, privates: list[float]) -> float:
    """Return the seconds from the first enqueue to the last end.

    Args:
        privates: gets the bytes of each worker's own memory, read now and then meanwhile.
    """
    expected, read_at = workers.finished() + len(prompts), 0.0
    began = time.monotonic()
    for prompt in prompts:
        enqueue(workers.client, prompt, tokens, False)

    def done() -> bool:
        nonlocal read_at
        if time.monotonic() >= read_at:
            privates.extend(private for private, _ in sizes(workers))
            read_at = time.monotonic() + READ_SECONDS
        return workers.finished() >= expected

    wait_until(done, f"{len(prompts)} jobs to be finished", RUN_SECONDS)
    return time.monotonic() - began


def measure_memory(folder: str, count: int) -> Values:
    """Return what idle workers hold: each its own pages and those that others map too, and all of them together."""
    progress(f"memory of {count} workers")
    with RedisServer() as redis, fleet(redis.url, QUEUE, count, folder) as workers:
        found = sizes(workers)
        whole = [pss(process.pid) for process in workers.processes]
    private, shared = (summary([each[at] for each in found]) for at in (0, 1))
    return {"workers": count, "private_bytes": private, "shared_bytes": shared, "pss_bytes": sum(whole)}


def sizes(workers: Fleet) -> list[tuple[int, int]]:
    """Return the bytes of each worker's own pages, and of those that others map too."""
    return [found for each in workers.processes if (found := private_and_shared(str(each.pid))) is not None]


def pss(pid: int) -> int:
    """Return the bytes of a process, a page that k processes map counted as 1/k: the sum is what all take together."""
    lines: list[Any] = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
