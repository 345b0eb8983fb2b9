#!/usr/bin/env python3
"""The programs to take instead: transformers and CTranslate2, on the same checkpoint, from the same prompt ids.

    python -m venv peers && peers/bin/pip install torch transformers ctranslate2
    python benchmarks/peers/peers.py --model gpt2 --peer-python peers/bin/python

Each turn is a process of its own (`run.py`) that imports, loads, generates a first token that does not count, and then
takes the median of --repeats: --tokens tokens greedily from one prompt of 16 tokens (`ms/token`), the same from 8 and
16 different prompts at once (`tokens/s`), and one token from a prompt of 512 (`first of 512`, the time to a first
token). Reading the prompts is part of all of these times. The peers take turns, and each round begins with another; the
memory's bandwidth is measured in between. --variant adds ours with compact weights or with drafts, which are off
otherwise. The prompts are random ids, or --prompts-from a text by the checkpoint's tokenizer: how many guesses come
true depends on the text. Every peer has --threads threads, ours as many processes. All peers generate exactly as many
tokens as they are told to, and the ids are compared. CTranslate2's models are converted once, to --workdir.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    Failed,
    begin,
    heading,
    in_turns,
    length_of_same_start,
    numbers,
    parse,
    parser,
    progress,
    ratio,
    run_json,
    why_peer_is_missing,
    write,
)
from fastgpt2.bench import Values, median, readers, step_bytes, summary, table
from fastgpt2.engine.machine import usable_cores
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.engine.text.tokenizer import Tokenizer

RUN = Path(__file__).with_name("run.py")
OURS = "fastgpt2"
# Ours with one thing changed, by the names in `run.py`.
OUR_VARIANTS = ("fastgpt2-drafts-auto", "fastgpt2-drafts-int8", "fastgpt2-bfloat16", "fastgpt2-int8")
PEER_MODULES = {"transformers": "transformers", "ctranslate2-float32": "ctranslate2", "ctranslate2-int8": "ctranslate2"}
# Tokens of each prompt but the long one.
PROMPT = 16
QUICK = {"tokens": 4, "repeats": 1, "batches": [2], "prefill": 32}


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--peer-python", help="the Python of one with torch, transformers, ctranslate2")
    arguments.add_argument("--peer", action="append", choices=PEER_MODULES, help="may be repeated; default: all")
    arguments.add_argument(
        "--variant", action="append", choices=OUR_VARIANTS, default=[], help="ours in this way too; may be repeated"
    )
    arguments.add_argument("--threads", type=int, help="threads of each peer; default: all cores")
    arguments.add_argument("--tokens", type=int, default=40, help="new tokens; default: 40")
    arguments.add_argument("--repeats", type=int, default=3, help="measurements in a process; default: 3")
    arguments.add_argument("--batches", type=numbers, default=[8, 16], help="prompts at once; default: 8,16")
    arguments.add_argument("--prompts-from", type=Path, help="a text file; default: random token ids")
    arguments.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt; default: 512")
    arguments.add_argument("--workdir", type=Path, help="a folder for converted models; default: a temporary one")
    asked = parse(arguments, QUICK)
    result = begin("peers", asked)
    with ExitStack() as stack:
        workdir = asked.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result["models"] = [measure(model, asked, workdir) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace, workdir: Path) -> Values:
    """Return what was measured of all peers with one model."""
    folder = find_model(model)
    config = read_config(folder)
    threads = asked.threads or usable_cores()
    job = {
        **prompts(
            ids_of(folder, asked.prompts_from) or config.vocab_size,
            max(1, *asked.batches),
            min(asked.prefill, config.n_positions - 1),
        ),
        "tokens": asked.tokens,
        "repeats": asked.repeats,
        "batches": asked.batches,
        "threads": threads,
    }
    skipped: dict[str, str] = {}
    commands: dict[str, list[str | Path]] = {
        ours: [sys.executable, RUN, ours, folder, json.dumps(job)] for ours in (OURS, *asked.variant)
    }
    for peer in asked.peer or PEER_MODULES:
        reason = why_peer_is_missing(asked.peer_python, PEER_MODULES[peer])
        place = folder
        if reason is None and peer.startswith("ctranslate2"):
            try:
                place = converted(asked.peer_python, folder, peer.partition("-")[2], workdir)
            except Failed as failure:
                reason = f"the conversion failed: {failure}"
        if reason is None:
            commands[peer] = [asked.peer_python, RUN, peer, place, json.dumps(job)]
        else:
            skipped[peer] = reason

    def turn(name: str) -> Callable[[], Values]:
        return lambda: run_json(commands[name])[0]

    rates: list[float] = []
    progress(f"{model}: a first run, which does not count")
    for name in commands:
        turn(name)()
    with readers(threads) as rate:
        found = in_turns(
            {name: turn(name) for name in commands}, asked.rounds, between=lambda: rates.append(rate(threads))
        )
    entry: Values = {
        "model": model,
        "folder": folder.name,
        "threads": threads,
        "step_mb": step_bytes(config) / 1e6,
        "bandwidth_gb_per_s": summary(rates, 1e-9),
        "prefill_tokens": len(job["long"]),
        "skipped": skipped,
        "peers": {name: summed_up(runs, found[OURS], asked) for name, runs in found.items()},
    }
    show(entry, asked)
    return entry


def ids_of(folder: Path, text: Path | None) -> list[int]:
    """Return the token ids of a text, [] if there is none."""
    return Tokenizer.from_folder(folder).encode(text.read_text("utf-8")) if text is not None else []


def prompts(source: int | list[int], count: int, long: int) -> Values:
    """Return prompts that are the same in every run.

    Args:
        source: the ids to cut them from, or how many ids there are to draw from.
        long: tokens of the long prompt.
    """
    rng = random.Random(0)
    if isinstance(source, list):
        return {
            "prompts": [source[at : at + PROMPT] for at in range(long, long + count * PROMPT, PROMPT)],
            "long": source[:long],
        }
    return {
        "prompts": [[rng.randrange(source) for _ in range(PROMPT)] for _ in range(count)],
        "long": [rng.randrange(source) for _ in range(long)],
    }


def converted(python: str, folder: Path, kind: str, workdir: Path) -> Path:
    """Return the folder with CTranslate2's form of a checkpoint; make it if it is not there."""
    out = workdir / f"{folder.resolve().name}.ct2-{kind}"
    if not (out / "model.bin").exists():
        progress(f"converting {folder.name} to CTranslate2, {kind}")
        run_json([python, RUN, "convert", folder, out, kind])
    return out


def summed_up(runs: list[Values], ours: list[Values], asked: argparse.Namespace) -> Values:
    """Return the figures of one peer's runs.

    Args:
        ours: our runs in the same rounds, for ratios and ids.
    """
    alone, of_ours = ([median(run["alone"]) for run in which] for which in (runs, ours))
    entry: Values = {
        "version": runs[-1]["version"],
        "drafts": {name: sum(run["drafts"][name] for run in runs) for name in runs[0]["drafts"]},
        **{f"{part}_ms": summary([run[part] for run in runs], 1e3) for part in ("import", "load", "first_token")},
        "ms_per_token": summary([seconds / asked.tokens for seconds in alone], 1e3),
        "ratio": ratio(of_ours, alone),
        "batches": {},
    }
    for batch in map(str, asked.batches):
        seconds, of_ours = ([median(run["batches"][batch]) for run in which] for which in (runs, ours))
        entry["batches"][batch] = {
            "tokens_per_s": summary([int(batch) * asked.tokens / s for s in seconds]),
            "ratio": ratio(of_ours, seconds),
        }
    seconds, of_ours = ([median(run["prefill"]) for run in which] for which in (runs, ours))
    entry["prefill"] = {"ms": summary(seconds, 1e3), "ratio": ratio(of_ours, seconds)}
    mine, theirs = (which[-1]["ids"] for which in (ours, runs))
    sequences = [pair for key in mine for pair in zip(mine[key], theirs[key], strict=True)]
    entry["same_ids"] = {"sequences": len(sequences), "equal": sum(a == b for a, b in sequences)}
    entry["same_ids"] |= {
        "tokens": sum(len(a) for a, _ in sequences),
        "up_to": sum(length_of_same_start(a, b) for a, b in sequences),
    }
    return entry


def show(entry: Values, asked: argparse.Namespace) -> None:
    """Print the table of one model."""
    bandwidth = entry["bandwidth_gb_per_s"]["median"]
    heading(f"{entry['model']}, {entry['threads']} threads; memory, read by as many processes: {bandwidth:.1f} GB/s")
    rows = []
    for name, e in entry["peers"].items():
        batches = [e["batches"][str(batch)] for batch in asked.batches]
        rows.append(
            [
                name,
                f"{e['ms_per_token']['median']:.2f} ({e['ratio']:.2f})",
                *(f"{batch['tokens_per_s']['median']:.0f} ({1 / batch['ratio']:.2f})" for batch in batches),
                f"{e['prefill']['ms']['median']:.0f} ms ({e['prefill']['ratio']:.2f})",
                *(f"{e[f'{part}_ms']['median']:.0f}" for part in ("import", "load")),
                f"{e['same_ids']['equal']}/{e['same_ids']['sequences']}",
            ]
        )
    headers = ["", "ms/token", *(f"tokens/s, {batch} at once" for batch in asked.batches)]
    headers += [f"first of {entry['prefill_tokens']}", "import ms", "load ms", "sequences as ours"]
    print(table(headers, rows))
    print("\nin brackets: the same divided by ours, the median of the rounds' ratios")
    for name, reason in entry["skipped"].items():
        print(f"{name} was skipped: {reason}")
    for name, e in entry["peers"].items():
        drafted = e["drafts"].get("drafted")
        taken = f"; {e['drafts']['accepted'] / drafted:.0%} of {drafted} guesses came true" if drafted else ""
        print(f"{name}: {e['version']}{taken}")


if __name__ == "__main__":
    main()
