#!/usr/bin/env python3
"""A worker that decodes many jobs together, beside workers that take one job at a time; and what the queue costs.

    python benchmarks/pool/pool.py --model gpt2

There is an embedded Redis and there are four pools, each with a queue of its own, and each asleep while another is
measured: one fastgpt2 worker with all cores, two that share the cores, one with --max-batch 1, and RQ's own `rq worker
-S json`, which forks for each job and loads the model in there. Prompts are lists of random token ids, their lengths
spread evenly over 8 to 512 tokens (less where the model has fewer positions). Each job generates --tokens tokens, and
all jobs publish their text as it comes.

throughput  for 1, 4, 16 and 64 jobs enqueued at one go, and for --jobs-alike jobs with prompts of only the shortest and
            only the longest length: tokens/s (all new tokens, divided by the time from the first enqueue to the last
            result), the time from a job's enqueue to its first text, the time between two successive pieces of the text
            (mostly a token; a character of several tokens is one piece), and the longest of those times. RQ's own
            worker gets at most --stock-jobs jobs: its tokens/s do not depend on how many wait, but its time to the
            first text does.
overhead    one job after the other, with 8 tokens and 1 to 4 new ones: the time from the enqueue to the result in the
            client's hands, without the engine's own (prefill_seconds + decode_seconds of the result)
Redis       exchange_seconds / step_seconds of the worker with the most jobs, with streams and without
alone       a single job through the idle worker, with a stream and without, beside an engine in a process of its own
            (`engine/engine_process.py`): ms for each further token, and the whole time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HERE,
    Child,
    begin,
    heading,
    in_turns,
    medians,
    numbers,
    parse,
    parser,
    progress,
    ratio,
    write,
)
from benchmarks.pool.pools import KINDS, LONGEST, SHORTEST, Pools, mixed_prompts
from fastgpt2.bench import Values, let_helpers_sleep, median, quantile, summary, table
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import find_model

OVERHEAD_TARGET_MS, REDIS_TARGET = 5.0, 0.05
ENGINE_PROCESS = HERE / "engine" / "engine_process.py"
# Tokens of a lone job's prompt.
PROMPT = 64
LONE_JOBS = 3
# Rounds of lone jobs for each of the other rounds: a lone job takes little time.
LONE_ROUNDS = 3
QUICK = {"jobs": [1, 2], "jobs_alike": 1, "stock_jobs": 1, "tokens": 4, "single_jobs": 4}


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--tokens", type=int, default=32, help="new ones of each job; default: 32")
    arguments.add_argument("--jobs", type=numbers, default=[1, 4, 16, 64], help="jobs at one go; default: 1,4,16,64")
    arguments.add_argument("--jobs-alike", type=int, default=16, help="jobs with prompts of one length; default: 16")
    arguments.add_argument("--stock-jobs", type=int, default=16, help="the most jobs for RQ's own worker; default: 16")
    arguments.add_argument("--single-jobs", type=int, default=100, help="jobs for the overhead; default: 100")
    asked = parse(arguments, QUICK)
    if asked.tokens < 2:
        arguments.error("--tokens must be 2 or more: the time between two tokens is measured")
    result = begin("pool", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what was measured of all pools with one model."""
    folder = find_model(model)
    config = read_config(folder)
    progress(f"{model}: starting")
    with Pools(str(folder)) as pools:
        entry: Values = {"model": model, "tokens": asked.tokens, "pools": pools.describe()}
        for name in KINDS:  # not measured: a first job does things that later ones do not
            pools.run(name, mixed_prompts(config, 1, asked.tokens), asked.tokens)
        entry["cells"] = [measure_cell(pools, config, asked, *bounds) for bounds in cells(asked)]
        entry["ratios"] = ratios(entry["cells"])
        entry["overhead"] = measure_overhead(pools, config, asked)
        entry["redis"] = measure_redis(pools, config, asked)
        entry["alone"] = measure_alone(pools, folder, config, asked)
    progress("")
    show(entry)
    return entry


# Throughput.


def cells(asked: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return for each cell the number of jobs, and the tokens of the shortest and the longest prompt."""
    alike = asked.jobs_alike
    return [*((jobs, SHORTEST, LONGEST) for jobs in asked.jobs), (alike, SHORTEST, SHORTEST), (alike, LONGEST, LONGEST)]


def measure_cell(
    pools: Pools, config: GPT2Config, asked: argparse.Namespace, jobs: int, shortest: int, longest: int
) -> Values:
    """Return what each pool does with `jobs` jobs, and the ratios of the pools' tokens/s."""

    def turn(name: str) -> Values:
        count = min(jobs, asked.stock_jobs) if KINDS[name].stock else jobs
        return pools.run(name, mixed_prompts(config, count, asked.tokens, shortest, longest), asked.tokens)

    runs = in_turns({name: partial(turn, name) for name in KINDS}, asked.rounds, let_helpers_sleep)
    speeds = {name: [run["tokens_per_s"] for run in found] for name, found in runs.items()}
    lengths = [len(prompt) for prompt in mixed_prompts(config, jobs, asked.tokens, shortest, longest)]
    return {
        "jobs": jobs,
        "prompt_tokens": [min(lengths), max(lengths)],
        "alike": shortest == longest,
        "stock_jobs": min(jobs, asked.stock_jobs),
        "pools": {name: medians(found) for name, found in runs.items()},
        # How many times as many tokens/s, within a round.
        "ratios": {
            f"{ours}/{theirs}": ratio(speeds[theirs], speeds[ours])
            for ours, theirs in (("one", "single"), ("one", "stock"), ("two", "stock"))
        },
    }


def ratios(found: Sequence[Values]) -> dict[str, dict[str, float]]:
    """Return the ratios of the cells with prompts of mixed lengths, by number of jobs: the headline."""
    return {str(each["jobs"]): each["ratios"] for each in found if not each["alike"]}


# What the queue costs.


def measure_overhead(pools: Pools, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """Return the milliseconds that a job takes beside the engine's own time."""
    (prompt,) = mixed_prompts(config, 1, 4, SHORTEST, SHORTEST)
    found = []
    for i in range(asked.single_jobs):
        let_helpers_sleep()
        result, seconds = pools.run_alone("one", prompt, 1 + i % 4, stream=False)
        found.append(1e3 * (seconds - result.timings.prefill_seconds - result.timings.decode_seconds))
    return {"jobs": asked.single_jobs, "ms": {**summary(found), "p95": quantile(found, 0.95)}}


def measure_redis(pools: Pools, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """Return the worker's time with Redis as a share of the time of its steps, and each of them a step."""
    prompts = mixed_prompts(config, max(asked.jobs), asked.tokens)

    def turn(stream: bool) -> Values:
        before = pools.read_counters("one")
        pools.run("one", prompts, asked.tokens, stream)
        after = pools.read_counters("one")
        spent = {field: after[field] - before[field] for field in before}
        return {
            "share": spent["exchange_seconds"] / spent["step_seconds"],
            "exchange_ms": 1e3 * spent["exchange_seconds"] / spent["steps"],
            "step_ms": 1e3 * spent["step_seconds"] / spent["steps"],
        }

    found = in_turns({"streamed": partial(turn, True), "not_streamed": partial(turn, False)}, asked.rounds)
    return {"jobs": len(prompts), **{name: medians(runs) for name, runs in found.items()}}


def measure_alone(pools: Pools, folder: Path, config: GPT2Config, asked: argparse.Namespace) -> Values:
    """Return ms for each further token and ms in all, of a lone job and of the same prompt given to an engine alone."""
    (prompt,) = mixed_prompts(config, 1, asked.tokens, PROMPT, PROMPT)

    def figures(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
        decode, whole = zip(*samples, strict=True)
        return {"token_ms": 1e3 * median(decode) / (asked.tokens - 1), "whole_ms": 1e3 * median(whole)}

    def of_engine() -> dict[str, float]:
        answers = [child.ask({"prompt": prompt, "tokens": asked.tokens}) for _ in range(LONE_JOBS)]
        return figures([(answer["decode_seconds"], answer["seconds"]) for answer in answers])

    def of_job(stream: bool) -> dict[str, float]:
        ended = [pools.run_alone("one", prompt, asked.tokens, stream) for _ in range(LONE_JOBS)]
        return figures([(result.timings.decode_seconds, seconds) for result, seconds in ended])

    with closing(Child([sys.executable, ENGINE_PROCESS, str(folder), "--prefix-memory", "0"])) as child:
        turns: dict[str, Callable[[], dict[str, float]]]
        turns = {"engine": of_engine, "streamed": partial(of_job, True), "not_streamed": partial(of_job, False)}
        for warm_up in turns.values():
            warm_up()
        found = in_turns(turns, LONE_ROUNDS * asked.rounds, let_helpers_sleep)
    entry: Values = {name: medians(runs) for name, runs in found.items()}
    for name in ("streamed", "not_streamed"):
        for key in ("token_ms", "whole_ms"):
            theirs, ours = ([run[key] for run in found[of]] for of in ("engine", name))
            entry[name][f"{key[:-3]}_ratio"] = ratio(theirs, ours)
    return entry


# What is printed.


def show(entry: Values) -> None:
    """Print the tables of one model."""
    heading(f"{entry['model']}: {entry['tokens']} new tokens a job, ms, medians of the rounds")
    headers = ["jobs", "prompts", "", "tokens/s", "first text p50", "p95", "a token p50", "p95", "longest gap"]
    print(table(headers, [row for found in entry["cells"] for row in rows(found)]))
    if any(found["stock_jobs"] < found["jobs"] for found in entry["cells"]):
        print("\nwhere RQ's own worker got fewer jobs, its times to the first text are those of these fewer jobs")
    print("\nhow many times as many tokens/s, prompts of mixed lengths:")
    pairs = ("one/single", "one/stock", "two/stock")
    print(table(["jobs", *map(pair_label, pairs)], [[n, *two_digits(r, pairs)] for n, r in entry["ratios"].items()]))
    ms = entry["overhead"]["ms"]
    print(
        f"\nwhat the queue adds to a job: {ms['median']:.2f} ms, 95 of 100 below {ms['p95']:.2f} ms "
        f"(target: {OVERHEAD_TARGET_MS:g} ms); {entry['overhead']['jobs']} jobs"
    )
    print(f"time with Redis beside the time of steps, {entry['redis']['jobs']} jobs (target: {REDIS_TARGET:.0%}):")
    for name, label in (("streamed", "streamed"), ("not_streamed", "not streamed")):
        found = {key: value["median"] for key, value in entry["redis"][name].items()}
        print("  {}: {share:.1%}; {exchange_ms:.2f} ms beside a step of {step_ms:.2f} ms".format(label, **found))
    engine = entry["alone"]["engine"]
    print(f"an engine alone, without a queue: {engine['token_ms']['median']:.2f} ms a token")
    for name, label in (("streamed", "streamed"), ("not_streamed", "not streamed")):
        found = entry["alone"][name]
        print(
            f"  a lone job, {label}: {found['token_ms']['median']:.2f} ms a token, {found['token_ratio']:.3f} times as "
            f"long; {found['whole_ratio']:.3f} times for the whole job"
        )


def rows(found: Values) -> list[list[str]]:
    """Return a cell's rows of the table, one a pool."""
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


def pair_label(pair: str) -> str:
    """Return the label of a ratio such as "one/stock"."""
    return " / ".join(KINDS[name].label.removeprefix("fastgpt2, ") for name in pair.split("/"))


def two_digits(found: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Return the numbers of some keys as text."""
    return [f"{found[key]:.2f}" for key in keys]


if __name__ == "__main__":
    main()
