#!/usr/bin/env python3
"""A worker that decodes many jobs at once, beside workers that take one at a time; and what the queue costs.

    python benchmarks/bench_pool.py --model gpt2

An embedded Redis and four pools, each on a queue of its own and asleep while another is measured: one fastgpt2 worker
with all cores, two that share the cores, one with --max-batch 1, and RQ's own `rq worker -S json`, which forks for
each job and loads the model in there. Prompts are lists of token ids, at random, their lengths spread evenly over 8 to
512 tokens (less where the model has fewer positions); --tokens new ones each; all jobs publish their text as it comes.

throughput  for 1, 4, 16, 64 jobs enqueued at one go, and for --jobs-alike with prompts of the shortest and of the
            longest length alone: tokens/s (all new tokens, by the time from the first enqueue to the last result), the
            time from a job's enqueue to its first text, the time between two successive pieces of it (mostly a token;
            a character of several tokens is one piece), and the longest of those. RQ's own worker gets --stock-jobs
            jobs at most: its tokens/s do not depend on how many wait, but its time to the first text does.
overhead    one job after the other, 8 tokens and 1 to 4 new ones: the time from the enqueue to the result in the
            client's hands, without the engine's own (prefill_seconds + decode_seconds of the result)
Redis       exchange_seconds / step_seconds of the worker over the most jobs, with streams and without
alone       a single job through the idle worker, with and without a stream, beside an engine in a process of its own
            (`engine_alone.py`): ms a further token, and the whole time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from common import HERE, Child, begin, heading, in_turns, numbers, parse, parser, progress, ratio, write
from pool_runs import KINDS, LONGEST, SHORTEST, Pools, medians, mixed

from fastgpt2.bench import Values, median, quantile, settle, summary, table
from fastgpt2.engine.model.config import CONFIG_FILE, GPT2Config, read_config
from fastgpt2.engine.model.hub import find_model

OVERHEAD_TARGET_MS, REDIS_TARGET = 5.0, 0.05
# Of the lone jobs' prompt.
PROMPT = 64
LONE_JOBS = 3
QUICK = {"rounds": 1, "jobs": [1, 4], "jobs_alike": 4, "stock_jobs": 2, "tokens": 8, "single_jobs": 10}


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--tokens", type=int, default=32, help="new ones of each job; default: 32")
    arguments.add_argument("--jobs", type=numbers, default=[1, 4, 16, 64], help="default: 1,4,16,64")
    arguments.add_argument("--jobs-alike", type=int, default=16, help="with prompts of one length; default: 16")
    arguments.add_argument("--stock-jobs", type=int, default=16, help="at most, for RQ's own worker; default: 16")
    arguments.add_argument("--single-jobs", type=int, default=100, help="for the overhead; default: 100")
    arguments.add_argument("--quick", action="store_true", help="few jobs, one round: to see that all of it runs")
    asked = parse(arguments)
    if asked.quick:
        vars(asked).update(QUICK)
    if asked.tokens < 2:
        arguments.error("--tokens must be 2 or more: there is no time between the tokens of one")
    result = begin("pool", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    folder = find_model(model)
    config = read_config(folder / CONFIG_FILE)
    progress(f"{model}: starting")
    with Pools(str(folder)) as pools:
        entry: Values = {"model": model, "tokens": asked.tokens, "pools": pools.described()}
        for name in KINDS:  # what only a first job does
            pools.run(name, mixed(config, 1, asked.tokens), asked.tokens)
        entry["cells"] = [cell(pools, config, asked, *bounds) for bounds in cells(asked)]
        entry["ratios"] = ratios(entry["cells"])
        entry["overhead"] = overhead(pools, config, asked)
        entry["redis"] = lost_to_redis(pools, config, asked)
        entry["alone"] = alone(pools, folder, config, asked)
    progress("")
    show(entry)
    return entry


# Throughput.


def cells(asked: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Jobs, and the shortest and the longest of their prompts."""
    alike = asked.jobs_alike
    return [*((jobs, SHORTEST, LONGEST) for jobs in asked.jobs), (alike, SHORTEST, SHORTEST), (alike, LONGEST, LONGEST)]


def cell(pools: Pools, config: GPT2Config, asked: argparse.Namespace, jobs: int, shortest: int, longest: int) -> Values:
    def turn(name: str) -> Values:
        count = min(jobs, asked.stock_jobs) if KINDS[name].stock else jobs
        return pools.run(name, mixed(config, count, asked.tokens, shortest, longest), asked.tokens)

    runs = in_turns({name: partial(turn, name) for name in KINDS}, asked.rounds, settle)
    speeds = {name: [run["tokens_per_s"] for run in found] for name, found in runs.items()}
    lengths = [len(prompt) for prompt in mixed(config, jobs, asked.tokens, shortest, longest)]
    return {
        "jobs": jobs,
        "prompt_tokens": [min(lengths), max(lengths)],
        "alike": shortest == longest,
        "stock_jobs": min(jobs, asked.stock_jobs),
        "pools": {name: medians(found) for name, found in runs.items()},
        # How many times the tokens/s, within a round.
        "ratios": {
            f"{ours}/{theirs}": ratio(speeds[theirs], speeds[ours])
            for ours, theirs in (("one", "single"), ("one", "stock"), ("two", "stock"))
        },
    }


def ratios(found: Sequence[Values]) -> dict[str, dict[str, float]]:
    """The headline: those of the cells with prompts of mixed lengths, by number of jobs."""
    return {str(each["jobs"]): each["ratios"] for each in found if not each["alike"]}


# What the queue costs.


def overhead(pools: Pools, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """ms a job beside the engine's own time."""
    (prompt,) = mixed(config, 1, 4, SHORTEST, SHORTEST)
    found = []
    for i in range(asked.single_jobs):
        settle()
        result, seconds = pools.alone("one", prompt, 1 + i % 4, stream=False)
        found.append(1e3 * (seconds - result.timings.prefill_seconds - result.timings.decode_seconds))
    return {"jobs": asked.single_jobs, "ms": {**summary(found), "p95": quantile(found, 0.95)}}


def lost_to_redis(pools: Pools, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """Shares of the time of the steps, while jobs wait and while they end."""
    prompts = mixed(config, max(asked.jobs), asked.tokens)

    def turn(stream: bool) -> Values:
        before = pools.announced("one")
        pools.run("one", prompts, asked.tokens, stream)
        after = pools.announced("one")
        spent = {field: after[field] - before[field] for field in before}
        return {
            "share": spent["exchange_seconds"] / spent["step_seconds"],
            "exchange_ms": 1e3 * spent["exchange_seconds"] / spent["steps"],
            "step_ms": 1e3 * spent["step_seconds"] / spent["steps"],
        }

    found = in_turns({"streamed": partial(turn, True), "not_streamed": partial(turn, False)}, asked.rounds)
    return {"jobs": len(prompts), **{name: medians(runs) for name, runs in found.items()}}


def alone(pools: Pools, folder: Path, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """A lone job, and the same prompt given to an engine alone: ms a further token, ms for all of it."""
    (prompt,) = mixed(config, 1, asked.tokens, PROMPT, PROMPT)

    def figures(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
        decode, whole = zip(*samples, strict=True)
        return {"token_ms": 1e3 * median(decode) / (asked.tokens - 1), "whole_ms": 1e3 * median(whole)}

    def of_engine() -> dict[str, float]:
        said = [child.ask({"prompt": prompt, "tokens": asked.tokens}) for _ in range(LONE_JOBS)]
        return figures([(each["decode_seconds"], each["seconds"]) for each in said])

    def of_job(stream: bool) -> dict[str, float]:
        ended = [pools.alone("one", prompt, asked.tokens, stream) for _ in range(LONE_JOBS)]
        return figures([(result.timings.decode_seconds, seconds) for result, seconds in ended])

    with closing(Child([sys.executable, HERE / "engine_alone.py", str(folder)])) as child:
        turns: dict[str, Callable[[], dict[str, float]]]
        turns = {"engine": of_engine, "streamed": partial(of_job, True), "not_streamed": partial(of_job, False)}
        for warm_up in turns.values():
            warm_up()
        found = in_turns(turns, 3 * asked.rounds, settle)
    entry: Values = {name: medians(runs) for name, runs in found.items()}
    for name in ("streamed", "not_streamed"):
        for key in ("token_ms", "whole_ms"):
            theirs, ours = ([run[key] for run in found[of]] for of in ("engine", name))
            entry[name][f"{key[:-3]}_ratio"] = ratio(theirs, ours)
    return entry


# What is printed.


def show(entry: Values) -> None:
    heading(f"{entry['model']}: {entry['tokens']} new tokens a job, ms, medians of the rounds")
    headers = ["jobs", "prompts", "", "tokens/s", "first text p50", "p95", "a token p50", "p95", "longest gap"]
    print(table(headers, [row for found in entry["cells"] for row in rows(found)]))
    if any(found["stock_jobs"] < found["jobs"] for found in entry["cells"]):
        print("\nof RQ's own worker, where it got fewer jobs, the first text is of those few")
    print("\ntimes the tokens/s, prompts of mixed lengths:")
    pairs = ("one/single", "one/stock", "two/stock")
    print(table(["jobs", *map(in_words, pairs)], [[n, *numbers_of(r, pairs)] for n, r in entry["ratios"].items()]))
    ms = entry["overhead"]["ms"]
    print(
        f"\nthe queue's part of a job: {ms['median']:.2f} ms, 95 of 100 below {ms['p95']:.2f} ms "
        f"(target: {OVERHEAD_TARGET_MS:g} ms); {entry['overhead']['jobs']} jobs"
    )
    print(f"steps lost to Redis, {entry['redis']['jobs']} jobs (target: {REDIS_TARGET:.0%}):")
    for name, label in (("streamed", "streamed"), ("not_streamed", "not streamed")):
        found = {key: value["median"] for key, value in entry["redis"][name].items()}
        print("  {}: {share:.1%}; {exchange_ms:.2f} ms beside a step of {step_ms:.2f} ms".format(label, **found))
    engine = entry["alone"]["engine"]
    print(f"alone, the engine without a queue: {engine['token_ms']['median']:.2f} ms a token")
    for name, label in (("streamed", "streamed"), ("not_streamed", "not streamed")):
        found = entry["alone"][name]
        print(
            f"  a lone job, {label}: {found['token_ms']['median']:.2f} ms, {found['token_ratio']:.3f} times as long; "
            f"all of it {found['whole_ratio']:.3f} times"
        )


def rows(found: Values) -> list[list[str]]:
    shortest, longest = found["prompt_tokens"]
    prompts = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
    lines = []
    for name, kind in KINDS.items():
        values = found["pools"][name]
        jobs = str(found["jobs"])
        if kind.stock and found["stock_jobs"] < found["jobs"]:
            jobs = f"{found['stock_jobs']} of {jobs}"
        times = [values[of][p]["median"] for of in ("ttft_ms", "tpot_ms") for p in ("p50", "p95")]
        cells = [f"{ms:.1f}" for ms in (*times, values["longest_gap_ms"]["median"])]
        lines.append([jobs, prompts, kind.label, f"{values['tokens_per_s']['median']:.1f}", *cells])
    return lines


def in_words(pair: str) -> str:
    return " / ".join(KINDS[name].label.removeprefix("fastgpt2, ") for name in pair.split("/"))


def numbers_of(found: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{found[key]:.2f}" for key in keys]


if __name__ == "__main__":
    main()
