"""The cost of a job to Redis: in six kinds of run, and as fast as the machine can drive it."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rq.suspension import resume, suspend

from benchmarks.capacity.fleet import DEMO, Fleet, fleet
from benchmarks.capacity.redis_use import describe_server, medians_of_use, metered
from benchmarks.common import Child, in_turns, medians, progress, wait_until
from benchmarks.pool.pools import RESULT_SECONDS, mixed_prompts
from fastgpt2.bench import Values, summary
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.system.redis_server import RedisServer

BUSY_CLIENT = Path(__file__).with_name("busy_client.py")
WORKERS = 2
# Tokens of each prompt.
PROMPT = 8
QUEUE = "capacity"
# An idle worker looks once a second whether the queue is suspended.
SUSPEND_SECONDS = 1.2
REST_SECONDS = 0.5


def demo_prompts(count: int, tokens: int, length: int = PROMPT) -> list[list[int]]:
    """Return prompts of one length for the demo model, with room for `tokens` new ones."""
    return mixed_prompts(read_config(find_model(DEMO)), count, tokens, length, length)


def measure_costs(asked: argparse.Namespace) -> Values:
    """Return six runs of the demo model through two workers, and the costs of a job, a step and a piece of text."""
    least, short, long = 1, asked.short, asked.long
    few = max(1, asked.jobs // 4)
    first, shorter, longer = demo_prompts(asked.jobs, least), demo_prompts(asked.jobs, short), demo_prompts(few, long)
    with RedisServer() as redis, fleet(redis.url, QUEUE, WORKERS) as workers:
        facts = describe_server(workers.connection)
        workers.run_unread(longer[:16], long, True)  # not measured: first jobs do things that later ones do not
        turns = {
            "one": partial(workers.run_unread, first, least, False),
            "short": partial(workers.run_unread, shorter, short, False),
            "long": partial(workers.run_unread, longer, long, False),
            "streamed": partial(workers.run_unread, longer, long, True),
            "short_read": partial(workers.run_read, shorter, short, False, asked.at_once),
            "streamed_read": partial(workers.run_read, longer, long, True, asked.at_once),
        }
        runs = in_turns(turns, asked.rounds, lambda: time.sleep(REST_SECONDS))
    rounds = [costs({name: found[at] for name, found in runs.items()}) for at in range(asked.rounds)]
    return {
        "server": facts,
        "workers": WORKERS,
        "prompt_tokens": PROMPT,
        "at_once": asked.at_once,
        "runs": {name: per_job(found) for name, found in runs.items()},
        "costs_us": medians(rounds),
    }


def per_job(found: list[Values]) -> Values:
    """Return what each job of a kind of run took, over its rounds."""
    keys = ("cpu_us", "command_us", "commands", "input_bytes", "output_bytes", "steps", "pieces")
    each = {key: summary([run[key] / run["jobs"] for run in found]) for key in keys}
    rates = {key: summary([run[key] for run in found]) for key in ("jobs_per_s", "share")}
    sizes = {"jobs": found[0]["jobs"], "new_tokens": found[0]["tokens"] // found[0]["jobs"]}
    return {**sizes, **each, **rates, "by_command": found[-1]["by_command"]}


def costs(of: Values) -> Values:
    """Return the microseconds of Redis for a job, a worker's step, a piece of text, reading an end and reading a piece.

    They are derived: each run has a number of jobs, steps and pieces, which the workers and the streams count. Two runs
    of different lengths give the job and the step, and the other runs give what they have beside these. The runs of one
    token are not used: a worker without other jobs takes each of them by itself.
    """
    short, long = of["short"], of["long"]
    by = short["jobs"] * long["steps"] - long["jobs"] * short["steps"]
    job = (short["cpu_us"] * long["steps"] - long["cpu_us"] * short["steps"]) / by
    step = (long["cpu_us"] * short["jobs"] - short["cpu_us"] * long["jobs"]) / by

    def beside(run: Values, of_job: float) -> float:
        return float(run["cpu_us"] - of_job * run["jobs"] - step * run["steps"])

    piece = beside(of["streamed"], job) / of["streamed"]["pieces"]
    read = beside(of["short_read"], job) / short["jobs"]
    piece_read = beside(of["streamed_read"], job + read) / of["streamed_read"]["pieces"] - piece
    together = long["tokens"] / long["steps"]
    return {"job": job, "step": step, "piece": piece, "read": read, "piece_read": piece_read, "together": together}


def measure_load(asked: argparse.Namespace) -> list[Values]:
    """Return what jobs cost that clients enqueue, and workers then serve, as fast as they can; nobody reads them.

    The jobs have no new tokens, so that the engine has nothing to do. The workers are suspended while clients enqueue.
    """
    found = []
    for count in asked.load:
        with RedisServer() as redis, fleet(redis.url, QUEUE, count) as workers, ExitStack() as stack:
            clients = []
            for _ in range(count):
                clients.append(Child([sys.executable, BUSY_CLIENT, redis.url, QUEUE]))
                stack.callback(clients[-1].close)
            rounds = []
            for number in range(asked.rounds):
                progress(f"load of {count}, round {number + 1} of {asked.rounds}")
                rounds.append(run_load(workers, clients, asked.load_seconds))
        kinds = {kind: medians_of_use([each[kind] for each in rounds]) for kind in ("enqueued", "served")}
        together = [sum(each[kind]["us_per_job"] for kind in kinds) for each in rounds]
        names = {kind: rounds[-1][kind]["by_command"] for kind in kinds}
        found.append({"processes": count, **kinds, "us_per_job": summary(together), "by_command": names})
    progress("")
    return found


def run_load(workers: Fleet, clients: list[Child], seconds: float) -> Values:
    """Let all clients enqueue for some seconds, then the workers serve. Return what Redis did in each of the two."""
    before = workers.finished()
    suspend(workers.connection)
    time.sleep(SUSPEND_SECONDS)
    with metered(workers.connection) as enqueued, ThreadPoolExecutor(len(clients)) as threads:
        answers = list(threads.map(lambda client: client.ask({"seconds": seconds}), clients))
    jobs = sum(answer["jobs"] for answer in answers)
    resume(workers.connection)
    wait_until(lambda: workers.finished() > before, "the first job", RESULT_SECONDS)
    already = workers.finished() - before
    with metered(workers.connection) as served:
        workers.await_finished(before + jobs)
    for used, count in ((enqueued, jobs), (served, jobs - already)):
        used.update(jobs=count, us_per_job=used["cpu_us"] / count, jobs_per_s=count / used["seconds"])
    return {"enqueued": enqueued, "served": served}
