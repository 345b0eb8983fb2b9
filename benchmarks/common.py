"""What the scripts beside this one share: options, turns, child processes, results as a file.

How all of them measure: the things compared take turns within one run, in rounds, each round beginning with another of
them, so that what slows the machine for a while slows all of them; medians and quartiles of what the rounds gave;
ratios taken within a round. The machine is named in every result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fastgpt2.bench import Values, machine, machine_line, median
from fastgpt2.engine.machine import THREAD_VARIABLES, hold_to_one_thread

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PEERS = HERE / "peers"
# Options that name files of the machine.
PATHS = ("output", "workdir", "peer_python", "prompts_from")


class Failed(Exception):
    """A child process did not do what it was started for; the message says why."""


def parser(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """With what every script takes: --model (repeatable), --rounds, --output."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="ID|PATH", help="may be repeated; default: gpt2")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--note", help="what a reader should know of these models or of this run; goes into the result")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<script>.json")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. BLAS is held to one thread from here on: numpy has not been imported yet."""
    options = parser.parse_args(argv)
    options.model = options.model or ["gpt2"]
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    hold_to_one_thread()
    return options


def numbers(text: str) -> list[int]:
    """For an option that takes "1,8,16"."""
    return [int(part) for part in text.split(",")]


def begin(name: str, options: argparse.Namespace) -> Values:
    """The beginning of a result; prints what machine it is."""
    # Whose folders these are is nobody's business.
    shown = {key: Path(value).name if key in PATHS and value else value for key, value in vars(options).items()}
    shown["model"] = [Path(model).name if Path(model).exists() else model for model in options.model]
    result: Values = {"benchmark": name, "machine": machine(), "options": shown}
    print(machine_line(result["machine"]))
    return result


def write(result: Values, output: Path | None) -> None:
    path = output or RESULTS / f"{result['benchmark']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in result["models"]:
        entry["model"] = Path(entry["model"]).name if Path(entry["model"]).exists() else entry["model"]
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {path}")


def heading(text: str) -> None:
    print(f"\n{text}\n")


def in_turns(
    turns: Mapping[str, Callable[[], T]], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[T]]:
    """What each gave in each round; each round begins with another of them, and `between` goes before every turn."""
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
    """A line that the next one overwrites, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r{text:<40}", end="" if text else "\r", file=sys.stderr, flush=True)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as long theirs takes: the median of the rounds' ratios."""
    return median([b / a for a, b in zip(ours, theirs, strict=True)])


def environment(**extra: str) -> dict[str, str]:
    """For a child that brings its own threads: as the caller's, without our hold on BLAS, and with no look at a hub."""
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **extra}


def run_json(command: Sequence[str | Path], timeout: float = 1800.0) -> tuple[Values, float]:
    """Run a program to its end. Returns the JSON object in the last line that it prints, and the seconds from outside.

    Raises:
        Failed: it ended badly or printed something else.
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
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


class Child:
    """A process that answers lines of JSON with lines of JSON, one after the other, and sleeps between them."""

    def __init__(self, command: Sequence[str | Path], **extra: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(**extra)
        )
        self.hello: Values = self._answer()

    def ask(self, question: Values) -> Values:
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
        """End it by the end of its input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def peer_missing(python: str | None, module: str) -> str | None:
    """Why a peer cannot be run, None if it can."""
    if python is None:
        return "no --peer-python was given"
    if not Path(python).exists():
        return f"{python} is not there"
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    if subprocess.run([python, "-c", code], check=False).returncode:
        return f"{python} has no {module}"
    return None


def allocations(entry: Values) -> list[list[str]]:
    """A row for each number of sequences: bytes at the peak of a step, held after it, and numpy's part of those."""
    keys = ("peak_bytes", "held_bytes_per_step", "held_numpy_bytes_per_step")
    return [[str(m["rows"]), *(f"{m[key]:,.0f}" for key in keys)] for m in entry["memory"]]
