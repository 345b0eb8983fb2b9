#!/usr/bin/env python3
"""Whole processes: from the shell's command to the text, ours beside transformers'.

    python benchmarks/engine/cold_start.py --model gpt2 --peer-python peers/bin/python

Each turn starts a new process: `fastgpt2 generate` or `peers/transformers_generate.py`, both greedy, 20 tokens, end of
text ignored. A first run of each is not measured: after it the files are in the page cache and our weights are packed.
`whole process` is measured from the outside; everything else is what the process says of itself, from its own first
line:

imports           what the process imports (ours in a process of its own, as `generate` imports while it loads)
ready             imports, model and tokenizer, and for ours the prompt's tokens
first token       the step that reads the prompt (for transformers with the pipeline's own work before it)
a further token   the median of the others in a run
in the process    all of that
`python` alone    a process that does nothing: what neither can do without
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HERE,
    Failed,
    begin,
    environment,
    heading,
    in_turns,
    parse,
    parser,
    ratio,
    run_json,
    why_peer_is_missing,
    write,
)
from fastgpt2.bench import Values, median, summary, table
from fastgpt2.engine.model.hub import find_model

IMPORTS = "import fastgpt2.cli, fastgpt2.engine.decoding.decoder, fastgpt2.engine.kernels.choice, tokenizers"
LABELS = {
    "whole_process": "whole process",
    "imports": "imports",
    "ready": "ready",
    "first_token": "first token",
    "token": "a further token",
    "total": "in the process",
}
TRANSFORMERS_GENERATE = HERE / "peers" / "transformers_generate.py"
QUICK = {"tokens": 4}


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--prompt", default="My name is", help="default: My name is")
    arguments.add_argument("--tokens", type=int, default=20, help="new tokens; default: 20")
    arguments.add_argument("--threads", type=int, help="processes of our engine; default: all cores")
    arguments.add_argument("--peer-python", help="the Python of an environment with torch and transformers")
    asked = parse(arguments, QUICK)
    result = begin("cold_start", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return the times of whole processes with one model."""
    folder = str(find_model(model))
    skipped = why_peer_is_missing(asked.peer_python, "transformers")
    turns = {"fastgpt2": lambda: run_ours(folder, asked), "python": run_nothing}
    if skipped is None:
        turns["transformers"] = lambda: run_transformers(folder, asked)
    for turn in turns.values():
        turn()
    found = in_turns(turns, asked.rounds)
    seconds = {name: [float(run["whole_process"]) for run in runs] for name, runs in found.items()}
    entry: Values = {"model": model, "tokens": asked.tokens, "skipped": {"transformers": skipped} if skipped else {}}
    for name, runs in found.items():
        entry[name] = {key: summary([run[key] for run in runs], 1e3) for key in LABELS if key in runs[0]}
    entry["fastgpt2"]["text"] = found["fastgpt2"][-1]["text"]
    if skipped is None:
        last = found["transformers"][-1]
        entry["transformers"] |= {"version": last["version"], "threads": last["threads"]}
        entry["ratio"] = ratio(seconds["fastgpt2"], seconds["transformers"])
        entry["same_text"] = last["text"].strip() == entry["fastgpt2"]["text"].strip()
    show(entry)
    return entry


def run_ours(folder: str, asked: argparse.Namespace) -> Values:
    """Run `fastgpt2 generate` once. Return the seconds of its parts and its text."""
    options = ["--model", folder, "--max-new-tokens", str(asked.tokens), "--ignore-eos", "--timings"]
    options += ["--threads", str(asked.threads)] if asked.threads else []
    script = Path(sys.executable).with_name("fastgpt2")
    installed = [str(script)] if script.exists() else [sys.executable, "-m", "fastgpt2"]
    command = [*installed, "generate", *options, asked.prompt]
    started = perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    seconds = perf_counter() - started
    if done.returncode:
        raise Failed(done.stderr)
    times: dict[str, list[float]] = {}
    for name, ms in re.findall(r"^(.+?) ([\d.]+) ms$", done.stderr, re.MULTILINE):
        times.setdefault(name, []).append(float(ms) / 1e3)
    steps = times["loop in"]
    code = f"from time import perf_counter; t = perf_counter(); {IMPORTS}; print(perf_counter() - t)"
    imports = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    return {
        "whole_process": seconds,
        "imports": float(imports.stdout),
        "ready": times["loaded and encoded"][0],
        "first_token": steps[0],
        "token": median(steps[1:] or steps),
        "total": times["total"][0],
        "text": done.stdout,
    }


def run_nothing() -> Values:
    """Run a Python that does nothing."""
    started = perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=environment(), check=True)
    return {"whole_process": perf_counter() - started}


def run_transformers(folder: str, asked: argparse.Namespace) -> Values:
    """Run transformers' pipeline once. Return the seconds of its parts and its text."""
    answer, seconds = run_json([asked.peer_python, TRANSFORMERS_GENERATE, folder, asked.prompt, str(asked.tokens)])
    steps = answer["steps"]
    return {
        **answer,
        "whole_process": seconds,
        "ready": answer["loaded"],
        "first_token": steps[0],
        "token": median(steps[1:] or steps),
    }


def show(entry: Values) -> None:
    """Print the table of one model."""
    heading(f"{entry['model']}: ms, medians and quartiles")
    names = [name for name in ("fastgpt2", "transformers", "python") if name in entry]
    rows = []
    for key, label in LABELS.items():
        stats = [entry[name].get(key) for name in names]
        rows.append([label, *(f"{s['median']:.1f} ({s['q1']:.1f}-{s['q3']:.1f})" if s else "" for s in stats)])
    print(table(["", *("`python` alone" if name == "python" else name for name in names)], rows))
    for name, reason in entry["skipped"].items():
        print(f"\n{name} was skipped: {reason}")
    if "ratio" in entry:
        print(f"\n{entry['transformers']['version']}: {entry['ratio']:.1f} times as long as ours, whole process")
        print("the same text" if entry["same_text"] else "another text")


if __name__ == "__main__":
    main()
