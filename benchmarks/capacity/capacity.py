#!/usr/bin/env python3
"""What one Redis bears, what a worker holds, and how to plan a thousand of them.

    python benchmarks/bench_capacity.py --model demo --model gpt2

A real Redis of `RedisServer`'s, with its append-only file as the compose file has it (appendonly yes, everysec), and
real workers of `fastgpt2 worker --threads 1`, on this machine, sharing its cores. Of Redis, the time of its main thread
counts, by INFO: whatever else the machine does, that is what a core of it has left. All about Redis is measured with
the demo model, which leaves it the least time to rest.

redis    jobs of 1, --short and --long new tokens through two workers, with streams and without, unread and read as the
         endpoint reads: CPU, commands and bytes a job; derived from these, what a job, a step, a piece of text and its
         reading take. And as many jobs as the machine can drive: enqueued by --load clients while the workers are
         suspended, then served by as many workers, of no new tokens, so that the engine has nothing to do
idle     CPU, commands, connections and memory of Redis for 1, 8, 32 idle workers; the project's own leases of --leases
         workers renewed once a second from one process; what else reads the entries of so many workers
memory   bytes of Redis by job: waiting with short and long prompts, finished with 20 and 500 new tokens
workers  for each model: tokens/s of one worker with one core, of one with all, of as many as there are cores; memory of
         1 and of --memory-workers
The plan that follows from all of them is derived: see `capacity_plan.py`.
"""

from __future__ import annotations

import argparse
import textwrap

from capacity_idle import idle
from capacity_jobs import job_costs, load
from capacity_page import sections
from capacity_sizes import kept_bytes, of_model
from common import begin, heading, numbers, parse, parser, write

from fastgpt2.bench import Values, table

PARTS = ("redis", "idle", "memory", "workers")
QUICK = {
    "rounds": 1, "jobs": 64, "short": 4, "long": 16, "load": [1], "load_seconds": 0.3, "idle": [1, 2],
    "idle_seconds": 3.0, "leases": 100, "waiting": 100, "kept": 16, "worker_tokens": 4, "memory_workers": 2,
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--parts", type=parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    arguments.add_argument("--jobs", type=int, default=600, help="of a run; a fourth of the long ones; default: 600")
    arguments.add_argument("--short", type=int, default=8, help="new tokens of a short job; default: 8")
    arguments.add_argument("--long", type=int, default=128, help="new tokens of a long job; default: 128")
    arguments.add_argument("--at-once", type=int, default=64, help="jobs that are read at once; default: 64")
    arguments.add_argument("--load", type=numbers, default=[1, 2], help="clients, and workers; default: 1,2")
    arguments.add_argument("--load-seconds", type=float, default=1.0, help="of enqueueing; default: 1")
    arguments.add_argument("--idle", type=numbers, default=[1, 8, 32], help="idle workers; default: 1,8,32")
    arguments.add_argument("--idle-seconds", type=float, default=10.0, help="of looking on; default: 10")
    arguments.add_argument("--leases", type=int, default=1000, help="default: 1000")
    arguments.add_argument("--waiting", type=int, default=1000, help="jobs that wait; default: 1000")
    arguments.add_argument("--kept", type=int, default=100, help="jobs that are finished; default: 100")
    arguments.add_argument("--worker-tokens", type=int, default=32, help="new ones a job of a model; default: 32")
    arguments.add_argument("--in-flight", type=int, default=16, help="jobs for each worker of a model; default: 16")
    arguments.add_argument("--memory-workers", type=int, default=4, help="default: 4")
    arguments.add_argument("--quick", action="store_true", help="little of all: to see that all of it runs")
    asked = parse(arguments)
    if asked.quick:
        vars(asked).update(QUICK)
    if not 1 < asked.short < asked.long:
        arguments.error("--short must be 2 or more, and --long longer")
    result = begin("capacity", asked)
    result.update(measure(asked))
    show(result)
    write(result, asked.output)


def parts(text: str) -> list[str]:
    asked = text.split(",")
    if unknown := set(asked) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}")
    return asked


def measure(asked: argparse.Namespace) -> Values:
    found: Values = {}
    if "redis" in asked.parts:
        found.update(redis=job_costs(asked), load=load(asked))
    if "idle" in asked.parts:
        found["idle"] = idle(asked)
    if "memory" in asked.parts:
        found["memory"] = kept_bytes(asked)
    whole = "workers" in asked.parts
    found["models"] = [of_model(model, asked) if whole else {"model": model} for model in asked.model]
    return found


def show(result: Values) -> None:
    for section in sections(result):
        heading(section.title)
        print(table(section.headers, section.rows))
        if section.note:
            print("\n" + textwrap.fill(section.note, 116))


if __name__ == "__main__":
    main()
