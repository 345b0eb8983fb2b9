"""What a job costs Redis, for `bench_capacity.py`: in six kinds of run, and as fast as the machine can drive it."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from capacity_fleet import DEMO, Fleet, fleet
from common import HERE, Child, in_turns, progress
from pool_runs import RESULT_SECONDS, medians, mixed, wait_until
from redis_use import metered, server, without_names
from rq.suspension import resume, suspend

from fastgpt2.bench import Values, summary
from fastgpt2.engine.model.config import CONFIG_FILE, read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.system.redis_server import RedisServer

WORKERS = 2
PROMPT = 8
QUEUE = "capacity"


def demo_prompts(count: int, tokens: int, length: int = PROMPT) -> list[Any]:
    return mixed(read_config(find_model(DEMO) / CONFIG_FILE), count, tokens, length, length)


def job_costs(asked: argparse.Namespace) -> Values:
    """Runs of the demo model through two workers, and what follows from them of a job, a step and a piece of text."""
    least, short, long = 1, asked.short, asked.long
    few = max(1, asked.jobs // 4)
    first, shorter, longer = demo_prompts(asked.jobs, least), demo_prompts(asked.jobs, short), demo_prompts(few, long)
    with RedisServer() as redis, fleet(redis.url, QUEUE, WORKERS) as workers:
        facts = server(workers.connection)
        workers.burst(longer[:16], long, True)  # what only first jobs do
        turns = {
            "one": partial(workers.burst, first, least, False),
            "short": partial(workers.burst, shorter, short, False),
            "long": partial(workers.burst, longer, long, False),
            "streamed": partial(workers.burst, longer, long, True),
            "short_read": partial(workers.watched, shorter, short, False, asked.at_once),
            "streamed_read": partial(workers.watched, longer, long, True, asked.at_once),
        }
        runs = in_turns(turns, asked.rounds, lambda: time.sleep(0.5))
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
    keys = ("cpu_us", "command_us", "commands", "input_bytes", "output_bytes", "steps", "pieces")
    each = {key: summary([run[key] / run["jobs"] for run in found]) for key in keys}
    rates = {key: summary([run[key] for run in found]) for key in ("jobs_per_s", "share")}
    sizes = {"jobs": found[0]["jobs"], "new_tokens": found[0]["tokens"] // found[0]["jobs"]}
    return {**sizes, **each, **rates, "by_command": found[-1]["by_command"]}


def costs(of: Values) -> Values:
    """Microseconds of Redis for a job, a worker's step and a piece of text, and for the reading of the first and last.

    Derived: each run is so many jobs, steps and pieces, of which the workers and the streams tell how many. Two runs of
    different lengths give the job and the step, the others what they have beside. The runs of one token are no part of
    it: a worker that has nothing else in hand takes each job by itself.
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


def load(asked: argparse.Namespace) -> list[Values]:
    """Jobs of no new tokens, at which the engine has nothing to do: first so many clients enqueue while the workers are
    suspended, then so many workers see to all of it. All of a job's talk but its reading, as fast as these can."""
    found = []
    for count in asked.load:
        with RedisServer() as redis, fleet(redis.url, QUEUE, count) as workers, ExitStack() as stack:
            clients = []
            for _ in range(count):
                clients.append(Child([sys.executable, HERE / "busy_client.py", redis.url, QUEUE]))
                stack.callback(clients[-1].close)
            rounds = []
            for number in range(asked.rounds):
                progress(f"load of {count}, round {number + 1} of {asked.rounds}")
                rounds.append(pressed(workers, clients, asked.load_seconds))
        kinds = {kind: without_names([each[kind] for each in rounds]) for kind in ("enqueued", "served")}
        together = [sum(each[kind]["us_per_job"] for kind in kinds) for each in rounds]
        names = {kind: rounds[-1][kind]["by_command"] for kind in kinds}
        found.append({"processes": count, **kinds, "us_per_job": summary(together), "by_command": names})
    progress("")
    return found


def pressed(workers: Fleet, clients: list[Child], seconds: float) -> Values:
    before = workers.finished()
    suspend(workers.connection)
    time.sleep(1.2)  # until an idle worker looks
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
