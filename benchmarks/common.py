"""The tools of the benchmark scripts: options, prompts, turns, child processes, and results as files.

All scripts measure in the same way. The things compared take turns within one run, in rounds, and each round begins
with another of them, so that whatever slows the machine down for a while slows all of them. Scripts report medians and
quartiles over the rounds, and take ratios within a round. Every result names its machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastgpt2.bench import Values, machine, machine_line, median, summary
from fastgpt2.engine.machine import THREAD_VARIABLES, hold_to_one_thread

T = TypeVar("T")

# The kinds of machines, by the name of a folder in results/: pages have a part for each.
KINDS = {"avx512": "AVX-512", "avx2": "AVX2", "arm": "ARM", "other": "other CPUs"}
# What a result tells of a CPU's instructions, by the names in /proc/cpuinfo.
INSTRUCTIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
HELD_OUT_TEXT = HERE / "data" / "held_out.txt"
# Options that name files of the machine: a result keeps only the last part of such a path.
PATHS = ("output", "workdir", "peer_python", "export_python", "prompts_from", "llama_server")


class Failed(Exception):
    """A child process did not do its work; the message says why."""


def parser(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have: --model (repeatable), --rounds, --quick, --output."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="ID|PATH", help="may be repeated; default: gpt2")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument(
        "--quick", action="store_true", help="one round and small sizes, to see that the whole script runs"
    )
    parser.add_argument(
        "--note", help="what a reader should know about these models or this run; it goes into the result"
    )
    parser.add_argument("--output", type=Path, help="where to write the result; default: a file in benchmarks/results")
    return parser


def parse(
    parser: argparse.ArgumentParser, quick: Mapping[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Return the options, and hold BLAS to one thread from here on: numpy must not have been imported yet.

    Args:
        quick: the options that --quick sets, besides --rounds 1.
    """
    options = parser.parse_args(argv)
    options.model = options.model or ["gpt2"]
    if options.quick:
        vars(options).update(quick, rounds=1)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    hold_to_one_thread()
    return options


def numbers(text: str) -> list[int]:
    """Return the numbers of an option such as "1,8,16"."""
    return [int(part) for part in text.split(",")]


def even_lengths(count: int, shortest: int, longest: int, dice: random.Random) -> list[int]:
    """Return lengths spread evenly from the shortest to the longest, in an order that `dice` draws."""
    lengths = [round(shortest + (longest - shortest) * i / max(1, count - 1)) for i in range(count)]
    dice.shuffle(lengths)
    return lengths


def pieces(ids: Sequence[int], lengths: Sequence[int], dice: random.Random) -> list[list[int]]:
    """Return pieces of a text of these lengths, from places that `dice` draws."""
    places = [dice.randrange(len(ids) - length) for length in lengths]
    return [list(ids[at : at + length]) for at, length in zip(places, lengths, strict=True)]


def begin(name: str, options: argparse.Namespace) -> Values:
    """Return the beginning of a result, and print the machine that it comes from."""
    # A result is published: it does not say whose folders these are.
    shown = {key: Path(value).name if key in PATHS and value else value for key, value in vars(options).items()}
    shown["model"] = [_without_folder(model) for model in options.model]
    result: Values = {"benchmark": name, "machine": machine() | {"instructions": instructions()}, "options": shown}
    print(machine_line(result["machine"]))
    return result


def instructions() -> list[str]:
    """Return which of INSTRUCTIONS this CPU has, as Linux tells it; [] elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    found = {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return [name for name in INSTRUCTIONS if name in found]


def kind_of(facts: Values) -> str:
    """Return the kind of a result's machine, a key of KINDS; by the kernels of its BLAS if it does not tell more."""
    blas = facts["blas"].lower()
    if {"aarch64", "arm64"} & set(facts["system"].split()):
        return "arm"
    if "avx512f" in facts.get("instructions", ()) or blas.endswith(("skylakex", "cooperlake", "sapphirerapids")):
        return "avx512"
    return "avx2" if "avx2" in facts.get("instructions", ()) or blas.endswith(("haswell", "zen")) else "other"


def write(result: Values, output: Path | None) -> None:
    """Write a result to a file, by default to the folder of `results/` for machines of this kind."""
    path = output or RESULTS / kind_of(result["machine"]) / f"{result['benchmark']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in result["models"]:
        entry["model"] = _without_folder(entry["model"])
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {path}")


def _without_folder(model: str) -> str:
    return Path(model).name if Path(model).exists() else model


def heading(text: str) -> None:
    """Print a title between two empty lines."""
    print(f"\n{text}\n")


def in_turns(
    turns: Mapping[str, Callable[[], T]], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[T]]:
    """Return what each of the turns gave in each round.

    Args:
        turns: by name; each round begins with another of them.
        between: called before every turn.
    """
    found: dict[str, list[T]] = {name: [] for name in turns}
    names = list(turns)
    for round_ in range(rounds):
        progress(f"round {round_ + 1} of {rounds}")
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            between()
            found[name].append(turns[name]())
    progress("")
    return found


def progress(text: str) -> None:
    """Show a line that the next one overwrites, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<40}", end="" if text else "\r", file=sys.stderr, flush=True)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times as long theirs takes as ours: the median of the rounds' ratios."""
    return median([b / a for a, b in zip(ours, theirs, strict=True)])


def medians(runs: Sequence[Mapping[str, Any]]) -> Values:
    """Return median and quartiles of each number over some runs; numbers in a dict within a run stay in a dict."""
    return {
        key: medians([run[key] for run in runs]) if isinstance(value, dict) else summary([run[key] for run in runs])
        for key, value in runs[0].items()
    }


def length_of_same_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for a condition, looking every 20 ms.

    Raises:
        Failed: it did not come true within `seconds`; the message names `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child that has threads of its own: without our limit on BLAS, and offline."""
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **extra}


def run_json(command: Sequence[str | Path], timeout: float = 1800.0) -> tuple[Values, float]:
    """Run a program to its end. Return the JSON object in its last line of output, and the seconds that it took.

    Raises:
        Failed: the program failed, or its last line was something else.
    """
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout, check=False)
    seconds = time.perf_counter() - started
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode == 0:
            return dict(json.loads(lines[-1])), seconds
    except (IndexError, ValueError):
        pass
    raise Failed(last_line(done.stderr) or f"ended with status {done.returncode}")


def last_line(text: str) -> str:
    """Return the last line of a log that is not empty, "" if there is none."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


class Child:
    """A process that answers lines of JSON with lines of JSON, one after the other, and sleeps between them.

    Attributes:
        hello: what it said of itself when it was ready.
    """

    def __init__(self, command: Sequence[str | Path], **extra: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(**extra)
        )
        self.hello: Values = self._answer()

    def ask(self, question: Values) -> Values:
        """Send a question and wait for its answer.

        Raises:
            Failed: the process has ended.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Values:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.process.args!r} ended with status {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Close the process's input, which ends it, and wait for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def why_peer_is_missing(python: str | None, module: str) -> str | None:
    """Return why a peer cannot be run with this interpreter, None if it can."""
    if python is None:
        return "no --peer-python was given"
    if not Path(python).exists():
        return f"{python} does not exist"
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", code], check=False).returncode:
        return f"{python} has no {module}"
    return None
