#!/usr/bin/env python3
"""The load that one Redis bears, the memory that a worker holds, and the needs of a thousand workers.

    python benchmarks/capacity/capacity.py --model demo --model gpt2

Redis is a real `RedisServer` with an append-only file as in the compose file (appendonly yes, everysec); the workers
are real ones, `fastgpt2 worker --threads 1`; all share this machine's cores. Of Redis, the CPU time of its main thread
counts, as INFO gives it: it does not depend on what else the machine does. Everything about Redis is measured with the
demo model, which leaves Redis the least time to rest.

redis    jobs of 1, --short and --long new tokens through two workers, with streams and without, unread and read as the
         endpoint reads: CPU, commands and bytes a job. From these follows what a job, a step, a piece of text and its
         reading take. Then as many jobs as the machine can drive: enqueued by --load clients while the workers are
         suspended, then served by as many workers; the jobs have no new tokens, so that the engine has nothing to do
idle     CPU, commands, connections and memory of Redis for 1, 8 and 32 idle workers; the leases of --leases workers,
         renewed once a second from one process; what reads the entries of all of these workers
memory   bytes of Redis by job: waiting with short and long prompts, finished with few and many new tokens
workers  for each model: tokens/s of one worker with one core, of one with all cores, of as many as there are cores;
         memory of 1 worker and of --memory-workers workers
The plan for a thousand workers is derived from all of these: see `plan.py`.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.capacity.idle import measure_idle
from benchmarks.capacity.jobs import measure_costs, measure_load
from benchmarks.capacity.page import sections
from benchmarks.capacity.sizes import measure_kept_bytes, measure_workers
from benchmarks.common import begin, heading, numbers, parse, parser, write
from fastgpt2.bench import Values, table

PARTS = ("redis", "idle", "memory", "workers")
QUICK = {
    "jobs": 64, "short": 4, "long": 16, "load": [1], "load_seconds": 0.3, "idle": [1], "settle_seconds": 1.0,
    "idle_seconds": 1.0, "leases": 100, "waiting": 100, "kept": 8, "kept_tokens": [4, 16], "worker_tokens": 4,
    "in_flight": 4, "memory_workers": 1,
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument(
        "--parts", type=parts, default=list(PARTS), help=f"what to measure; default: {','.join(PARTS)}"
    )
    arguments.add_argument(
        "--jobs", type=int, default=600, help="jobs of a run, a fourth as many of long ones; default: 600"
    )
    arguments.add_argument("--short", type=int, default=8, help="new tokens of a short job; default: 8")
    arguments.add_argument("--long", type=int, default=128, help="new tokens of a long job; default: 128")
    arguments.add_argument("--at-once", type=int, default=64, help="jobs that are read at once; default: 64")
    arguments.add_argument(
        "--load", type=numbers, default=[1, 2], help="clients, and workers for their jobs; default: 1,2"
    )
    arguments.add_argument("--load-seconds", type=float, default=1.0, help="how long clients enqueue; default: 1")
    arguments.add_argument("--idle", type=numbers, default=[1, 8, 32], help="idle workers; default: 1,8,32")
    arguments.add_argument(
        "--settle-seconds", type=float, default=6.0, help="how long they may settle before that; default: 6"
    )
    arguments.add_argument("--idle-seconds", type=float, default=10.0, help="how long to watch them; default: 10")
    arguments.add_argument(
        "--leases", type=int, default=1000, help="workers of which there are only leases; default: 1000"
    )
    arguments.add_argument("--waiting", type=int, default=1000, help="jobs that wait; default: 1000")
    arguments.add_argument("--kept", type=int, default=100, help="jobs that are finished; default: 100")
    arguments.add_argument("--kept-tokens", type=numbers, default=[20, 500], help="their new tokens; default: 20,500")
    arguments.add_argument(
        "--worker-tokens", type=int, default=32, help="new tokens of a job, for a model's speed; default: 32"
    )
    arguments.add_argument(
        "--in-flight", type=int, default=16, help="jobs at once for each worker, for a model's speed; default: 16"
    )
    arguments.add_argument("--memory-workers", type=int, default=4, help="workers, for a model's memory; default: 4")
    asked = parse(arguments, QUICK)
    if not 1 < asked.short < asked.long:
        arguments.error("--short must be 2 or more, and --long more than --short")
    result = begin("capacity", asked)
    result.update(measure(asked))
    show(result)
    write(result, asked.output)


def parts(text: str) -> list[str]:
    """Return the parts named in an option such as "redis,idle"."""
    asked = text.split(",")
    if unknown := set(asked) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return asked


def measure(asked: argparse.Namespace) -> Values:
    """Return what was measured, by part."""
    found: Values = {}
    if "redis" in asked.parts:
        found.update(redis=measure_costs(asked), load=measure_load(asked))
    if "idle" in asked.parts:
        found["idle"] = measure_idle(asked)
    if "memory" in asked.parts:
        found["memory"] = measure_kept_bytes(asked)
    whole = "workers" in asked.parts
    found["models"] = [measure_workers(model, asked) if whole else {"model": model} for model in asked.model]
    return found


def show(result: Values) -> None:
    """Print the tables of all that was measured."""
    for section in sections(result):
        heading(section.title)
        print(table(section.headers, section.rows))
        if section.note:
            print("\n" + textwrap.fill(section.note, 116))


if __name__ == "__main__":
    main()
