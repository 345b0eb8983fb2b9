#!/usr/bin/env python3
"""The engine by itself: decode steps, prompts and long contexts, beside the memory's bandwidth and plain numpy.

    python benchmarks/engine/step.py --model gpt2 --plain
    python benchmarks/engine/step.py --model gpt2 --model gpt2-medium --blas openblas --blas mkl
    python benchmarks/engine/step.py --model gpt2 --blas openblas --blas compiled --weights bfloat16 --weights int8
    OPENBLAS_CORETYPE=Haswell python benchmarks/engine/step.py --blas openblas    # OpenBLAS on a CPU without AVX-512

One process holds an engine for each --blas and for each kind of compact --weights (engines of one kind map the same
file). In each round it measures, in turn:

memory    the bytes a second that 1 process reads, as many processes as the engine has, and as many as there are cores
decode    the milliseconds of a step by --rows, the number of sequences decoded together, each 64 tokens long;
          GB/s are the bytes of weights that the model has for such a step, divided by its time; the share is taken of
          what as many processes read just before
prefill   the time of a prompt, up to its first new token, by --prompts (longer ones go in pieces, as in use)
context   the time of a step of --context-rows sequences by --contexts, the positions that each attends to
--plain   the products of a step by numpy's `x @ W` with BLAS threads on all cores, in a process of its own
          (`plain_numpy.py`), against our whole step
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import Child, begin, heading, in_turns, numbers, parse, parser, progress, ratio, write
from fastgpt2.bench import (
    ROWS,
    Timed,
    Values,
    decode_entry,
    decode_table,
    layout,
    layout_line,
    let_helpers_sleep,
    median,
    readers,
    step_bytes,
    summary,
    table,
    weight_bytes,
)
from fastgpt2.engine.engine import Engine
from fastgpt2.engine.machine import THREAD_VARIABLES, usable_cores
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.errors import BadRequest

PLAIN_NUMPY = Path(__file__).with_name("plain_numpy.py")
# Threads of BLAS and OpenMP look for work for a while (OpenBLAS's for tens of ms), and so disturb the next turn.
PAUSE_SECONDS = 0.1
QUICK = {"rows": [1, 2], "steps": 2, "prompts": [32], "contexts": [128]}

# Seconds by what was timed, by its size, by round.

Samples = defaultdict[str, defaultdict[int, list[list[float]]]]


def options() -> argparse.Namespace:
    """Return the command line's options."""
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--threads", type=int, help="processes of an engine; default: all cores")
    arguments.add_argument("--blas", action="append", help="for float32 weights; may be repeated; default: auto")
    arguments.add_argument("--weights", action="append", default=[], help="bfloat16 or int8 too; may be repeated")
    arguments.add_argument("--rows", type=numbers, default=list(ROWS), help="default: 1,2,4,8,16")
    arguments.add_argument("--steps", type=int, default=5, help="steps a round; default: 5")
    arguments.add_argument("--prompts", type=numbers, default=[32, 128, 256, 512], help="default: 32,128,256,512")
    arguments.add_argument(
        "--contexts", type=numbers, help="default: every 128 positions, up to as many as the model has"
    )
    arguments.add_argument("--context-rows", type=numbers, default=[1], help="default: 1")
    arguments.add_argument("--plain", action="store_true", help="measure plain numpy too")
    return parse(arguments, QUICK)


def main() -> None:
    asked = options()
    result = begin("engine", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what was measured of all engines of one model."""
    engines, skipped = load(model, asked)
    config = next(iter(engines.values())).config
    sizes = {engine.decoder.model.size for engine in engines.values()}
    rates: dict[int, list[float]] = {count: [] for count in sorted({1, usable_cores()} | sizes)}
    samples: dict[str, Samples] = {name: defaultdict(lambda: defaultdict(list)) for name in (*engines, "plain")}
    with ExitStack() as stack:
        rate = stack.enter_context(readers(max(rates)))
        turns: dict[str, Callable[[], None]] = {"memory": lambda: read_memory(rate, rates)}
        for blas, engine in engines.items():
            progress(f"{model}, {blas}: reading prompts")
            turns[blas] = engine_turn(engine, samples[blas], asked, partial(rate, engine.decoder.model.size))
        plain = plain_child(config) if asked.plain else None
        if plain is not None:
            stack.callback(plain.close)
            turns["plain"] = plain_turn(plain, samples["plain"], asked)
        in_turns(turns, asked.rounds, between=pause)
    result: Values = {
        "model": model,
        "config": {name: getattr(config, name) for name in ("n_layer", "n_embd", "n_inner", "n_head", "n_positions")},
        "step_mb": step_bytes(config) / 1e6,
        "bandwidth_gb_per_s": {str(count): summary(found, 1e-9) for count, found in rates.items()},
        "skipped": skipped,
        "engines": [engine_entry(blas, engine, samples[blas]) for blas, engine in engines.items()],
    }
    if plain is not None:
        result["plain"] = {**plain.hello, "decode": compared(samples, list(engines))}
    show(result)
    for engine in engines.values():
        engine.decoder.model.close()
    return result


def load(model: str, asked: argparse.Namespace) -> tuple[dict[str, Engine], dict[str, str]]:
    """Return an engine for each BLAS and each kind of weights asked for, and why some are skipped."""
    engines: dict[str, Engine] = {}
    skipped: dict[str, str] = {}
    rows = max(*asked.rows, *asked.context_rows, 1)
    kinds = [(blas, {"blas": blas}) for blas in asked.blas or ["auto"]]
    kinds += [(weights, {"weights": weights}) for weights in asked.weights]
    for name, kind in kinds:
        try:
            engines[name] = Engine.load(model, threads=asked.threads, max_batch=rows, **kind)
        except BadRequest as reason:
            skipped[name] = str(reason)
            print(f"{name} is skipped: {reason}")
    if not engines:
        sys.exit(f"{model}: no engine to measure")
    return engines, skipped


def pause() -> None:
    """Wait until the threads of what went before sleep."""
    let_helpers_sleep()
    time.sleep(PAUSE_SECONDS)


def read_memory(rate: Callable[[int], float], rates: dict[int, list[float]]) -> None:
    """Add to `rates` the bytes a second that each number of processes reads now."""
    for count, found in rates.items():
        found.append(rate(count))


def engine_turn(
    engine: Engine, samples: Samples, asked: argparse.Namespace, rate: Callable[[], float]
) -> Callable[[], None]:
    """Set the sequences up, and return a function that measures them once.

    Args:
        rate: gives the bytes a second that as many processes read as the engine has.
    """
    most = engine.config.n_positions
    contexts = [n for n in asked.contexts or range(128, most + 1, 128) if n <= most]
    prompts = [n for n in asked.prompts if n <= most]
    timed = Timed(engine, max(*asked.rows, *asked.context_rows, 1))
    # Only the sequences of `context` have to be this long: reading a long prompt takes time.
    for index in range(max(asked.context_rows) if contexts else 0):
        timed.read(index, max(contexts) - 1)

    def turn() -> None:
        timed.decode(1, asked.steps)  # not measured: the turn before has emptied the caches
        # Prompts come last: they overwrite the beginning of the first sequence. No time depends on its content.
        for rows in asked.context_rows:
            for n in contexts:
                samples[f"context {rows}"][n].append(timed.decode(rows, asked.steps, n - 1))
        for rows in asked.rows:
            let_helpers_sleep()
            samples["beside"][rows].append([rate()])
            samples["decode"][rows].append(timed.decode(rows, asked.steps))
        for n in prompts:
            samples["prefill"][n].append([timed.read(0, n)])

    return turn


def engine_entry(blas: str, engine: Engine, samples: Samples) -> Values:
    """Return the part of the result about one engine."""
    network = engine.decoder.model
    n_bytes = step_bytes(engine.config, weight_bytes(network))
    beside = {rows: [rate for (rate,) in found] for rows, found in samples["beside"].items()}
    entry: Values = {"asked": blas, **layout(network), "load_ms": engine.load_times.loaded * 1e3}
    entry["decode"] = [decode_entry(rows, found, beside[rows], n_bytes) for rows, found in samples["decode"].items()]
    entry["prefill"] = [timing("tokens", n, n, found) for n, found in samples["prefill"].items()]
    entry["context"] = {
        name.removeprefix("context "): [timing("positions", n, int(name.split()[1]), s) for n, s in found.items()]
        for name, found in samples.items()
        if name.startswith("context ")
    }
    return entry


def plain_child(config: GPT2Config) -> Child:
    """Start the process that multiplies by plain numpy, with a BLAS thread on each core."""
    shape = {name: getattr(config, name) for name in ("n_embd", "n_inner", "n_layer", "vocab_size")}
    threads = dict.fromkeys(THREAD_VARIABLES, str(usable_cores()))
    return Child([sys.executable, PLAIN_NUMPY, json.dumps(shape)], **threads)


def plain_turn(child: Child, samples: Samples, asked: argparse.Namespace) -> Callable[[], None]:
    """Return a function that measures plain numpy once."""

    def turn() -> None:
        for rows in asked.rows:
            samples["decode"][rows].append(child.ask({"rows": rows, "steps": asked.steps})["seconds"])

    return turn


def timing(name: str, n: int, tokens: int, rounds: list[list[float]]) -> Values:
    """Return milliseconds and tokens/s from the seconds of each round.

    Args:
        name: what `n` counts.
        tokens: how many each of the times is for.
    """
    ms = summary([seconds for steps in rounds for seconds in steps], 1e3)
    return {name: n, "ms": ms, "tokens_per_s": tokens / ms["median"] * 1e3}


def compared(samples: dict[str, Samples], engines: list[str]) -> list[Values]:
    """Return plain numpy's times by rows, each with the number of times that it takes as long as our whole step."""
    entries = []
    for rows, rounds in samples["plain"]["decode"].items():
        theirs = [median(steps) for steps in rounds]
        ratios = {blas: ratio([median(s) for s in samples[blas]["decode"][rows]], theirs) for blas in engines}
        entries.append({"rows": rows, "ms": summary(theirs, 1e3), "ratio": ratios})
    return entries


def show(result: Values) -> None:
    """Print the tables of one model."""
    rates = ", ".join(f"{count}: {rate['median']:.1f}" for count, rate in result["bandwidth_gb_per_s"].items())
    heading(f"{result['model']}; memory, GB/s by number of processes that read: {rates}")
    for entry in result["engines"]:
        print(f"{entry['asked']}: {layout_line(entry)}; loaded in {entry['load_ms']:.0f} ms\n")
        print(decode_table(entry["decode"]), end="\n\n")
        show_timings("prompt, tokens", "tokens", entry["prefill"])
        for rows, found in entry["context"].items():
            show_timings(f"context, {rows} rows, positions", "positions", found)
    plain = result.get("plain")
    if plain is None:
        return
    engines = [entry["asked"] for entry in result["engines"]]
    print(f"plain numpy, products only; {plain['kernel']}, {plain['threads']} threads\n")
    cells = [
        [str(e["rows"]), f"{e['ms']['median']:.2f}", *(f"{e['ratio'][blas]:.2f}" for blas in engines)]
        for e in plain["decode"]
    ]
    print(table(["rows", "ms/step", *(f"times our step ({blas})" for blas in engines)], cells))


def show_timings(title: str, name: str, entries: list[Values]) -> None:
    line = "{ms[median]:.2f}|{ms[q1]:.2f}-{ms[q3]:.2f}|{tokens_per_s:.0f}"
    cells = [[str(entry[name]), *line.format(**entry).split("|")] for entry in entries]
    print(table([title, "ms", "quartiles", "tokens/s"], cells), end="\n\n")


if __name__ == "__main__":
    main()
