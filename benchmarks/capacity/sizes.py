"""Memory of Redis by jobs, and speed and memory of workers, for `bench_capacity.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_fleet import RUN_SECONDS, Fleet, fleet
from capacity_jobs import PROMPT, WORKERS, demo_prompts
from common import progress
from pool_runs import enqueue, mixed, wait_until
from redis_use import memory_used

from fastgpt2 import Client
from fastgpt2.bench import Values, summary
from fastgpt2.engine.machine import usable_cores
from fastgpt2.engine.model.config import CONFIG_FILE, GPT2Config, read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.recycling import private_and_shared

QUEUE, WAITING = "capacity", "waiting"
LONG_PROMPT = 500
# What is kept of a job with so many new tokens.
NEW_TOKENS = (20, 500)
LOOK_SECONDS = 0.5


# Memory of Redis.


def kept_bytes(asked: argparse.Namespace) -> list[Values]:
    """Bytes a job: waiting ones by their prompts, finished ones by their new tokens, as long as their results are kept.

    Prompts are ids drawn at random, which RQ's compression makes little smaller; texts take less.
    """
    found = []
    with RedisServer() as redis, fleet(redis.url, QUEUE, WORKERS) as workers, Client(redis.url, WAITING) as nobody:
        workers.burst(demo_prompts(16, 20), 20, True)  # scripts, buffers, the pool's own figures
        for length in (PROMPT, LONG_PROMPT):
            progress(f"memory of waiting jobs, prompts of {length}")
            prompts = demo_prompts(asked.waiting, 1, length)
            before = memory_used(workers.connection)
            for prompt in prompts:
                enqueue(nobody, prompt, 1, False)
            each = (memory_used(workers.connection) - before) / asked.waiting
            found.append(kept("waiting", asked.waiting, length, 0, False, each))
        for tokens in NEW_TOKENS:
            for stream in (False, True):
                progress(f"memory of finished jobs, {tokens} tokens")
                before = memory_used(workers.connection)
                workers.burst(demo_prompts(asked.kept, tokens), tokens, stream)
                each = (memory_used(workers.connection) - before) / asked.kept
                found.append(kept("finished", asked.kept, PROMPT, tokens, stream, each))
    progress("")
    return found


def kept(state: str, jobs: int, prompt: int, tokens: int, stream: bool, each: float) -> Values:
    sizes = {"prompt_tokens": prompt, "new_tokens": tokens, "stream": stream}
    return {"state": state, "jobs": jobs, **sizes, "bytes_each": each}


# Workers.


def of_model(model: str, asked: argparse.Namespace) -> Values:
    folder = find_model(model)
    config = read_config(folder / CONFIG_FILE)
    cores = usable_cores()
    # One alone on one core; one on all of them; all cores busy with workers of one each, as many as there are.
    kinds = list(dict.fromkeys([(1, 1), (1, cores), (cores, 1)]))
    entry: Values = {
        "model": model,
        "new_tokens": asked.worker_tokens,
        "in_flight": asked.in_flight,
        # Keys and values, in float32.
        "kv_bytes_per_token": 2 * config.n_layer * config.n_embd * 4,
        "n_positions": config.n_positions,
        "pools": [pool(str(folder), config, count, threads, asked) for count, threads in kinds],
        "memory": [memory(str(folder), count) for count in sorted({1, asked.memory_workers})],
    }
    progress("")
    return entry


def pool(folder: str, config: GPT2Config, count: int, threads: int, asked: argparse.Namespace) -> Values:
    tokens, jobs = asked.worker_tokens, asked.in_flight * count
    lengths = {"short": mixed(config, jobs, tokens, PROMPT, PROMPT), "mixed": mixed(config, jobs, tokens)}
    speeds: dict[str, list[float]] = {name: [] for name in lengths}
    privates: list[float] = []
    with RedisServer() as redis, fleet(redis.url, QUEUE, count, folder, threads) as workers:
        for prompt in lengths["short"][:count]:  # what only a first job does
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
        # With the keys and values of the jobs in hand; of its first process, where it has helpers.
        "private_bytes_at_most": max(privates),
    }


def timed(workers: Fleet, prompts: Sequence[list[int]], tokens: int, privates: list[float]) -> float:
    """Seconds from the first enqueue to the last end. Meanwhile each worker's own memory is looked at now and then."""
    expected, look_at = workers.finished() + len(prompts), 0.0
    began = time.monotonic()
    for prompt in prompts:
        enqueue(workers.client, prompt, tokens, False)

    def done() -> bool:
        nonlocal look_at
        if time.monotonic() >= look_at:
            privates.extend(private for private, _ in sizes(workers))
            look_at = time.monotonic() + LOOK_SECONDS
        return workers.finished() >= expected

    wait_until(done, f"{len(prompts)} jobs to be finished", RUN_SECONDS)
    return time.monotonic() - began


def memory(folder: str, count: int) -> Values:
    """What idle workers, warmed up, hold each: pages of their own, and pages that others map too."""
    progress(f"memory of {count} workers")
    with RedisServer() as redis, fleet(redis.url, QUEUE, count, folder) as workers:
        found = sizes(workers)
        whole = [pss(process.pid) for process in workers.processes]
    private, shared = (summary([each[at] for each in found]) for at in (0, 1))
    return {"workers": count, "private_bytes": private, "shared_bytes": shared, "pss_bytes": sum(whole)}


def sizes(workers: Fleet) -> list[tuple[int, int]]:
    return [found for each in workers.processes if (found := private_and_shared(str(each.pid))) is not None]


def pss(pid: int) -> int:
    """Bytes of a process, a page that k processes map counted as 1/k: over all of them, what they take together."""
    lines: list[Any] = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
