#!/usr/bin/env python3
"""The programs to take instead, on the same checkpoint, from the same prompts: the whole table in one command.

    python benchmarks/peers/environment.py /tmp/peers           # once: the peers' packages, apart from ours
    python benchmarks/engine/checkpoints.py english /tmp/peers/english
    python benchmarks/peers/peers.py --model /tmp/peers/english \\
        --peer-python /tmp/peers/venv/bin/python --workdir /tmp/peers/models

The peers are transformers, CTranslate2, OpenVINO GenAI and llama.cpp, with each kind of weights that they have; ours
are float32, bfloat16, int8, and float32 with drafts. Each turn is a process of its own (`run.py`) that imports, loads,
and takes the median of --repeats after a first time that does not count: --tokens tokens greedily from one prompt of 16
tokens (`ms/token`), the same from 8 and from 16 prompts at once (`tokens/s`), and one token from a prompt of 512
(`first of 512`). Reading the prompts is part of all of these times. The programs take turns, and each round begins with
another; the memory's bandwidth is measured in between. The prompts begin at places of a text that --seed draws. Each
program has --threads threads, ours as many processes. All generate exactly as many tokens as they are told to, and the
ids are compared. Checkpoints are converted once (`convert.py`), to --workdir.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HELD_OUT_TEXT,
    Failed,
    begin,
    heading,
    in_turns,
    length_of_same_start,
    numbers,
    parse,
    parser,
    pieces,
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

HERE = Path(__file__).parent
OURS = "fastgpt2"
# Ours with one thing changed, by the names in `loaders.py`.
OUR_VARIANTS = ("fastgpt2-drafts-auto", "fastgpt2-drafts-int8", "fastgpt2-bfloat16", "fastgpt2-int8")


@dataclass(frozen=True)
class Peer:
    """A program to take instead, in one of its ways.

    Attributes:
        module: what it imports.
        form: the type of what `convert.py` makes of the checkpoint, None for the checkpoint as it is.
        compact: whether its weights or its products have fewer bits than float32.
    """

    module: str
    form: str | None = None
    compact: bool = True


PEERS = {
    "transformers": Peer("transformers", compact=False),
    "ctranslate2-float32": Peer("ctranslate2", "float32", compact=False),
    "ctranslate2-int8": Peer("ctranslate2", "int8"),
    "openvino-float32": Peer("openvino_genai", "fp32", compact=False),
    "openvino-bfloat16": Peer("openvino_genai", "fp32"),
    "openvino-int8": Peer("openvino_genai", "int8"),
    "llama.cpp-f32": Peer("llama_cpp", "f32", compact=False),
    "llama.cpp-f16": Peer("llama_cpp", "f16"),
    "llama.cpp-bf16": Peer("llama_cpp", "bf16"),
    "llama.cpp-q8_0": Peer("llama_cpp", "q8_0"),
}
# Ours with the same texts as float32's, bit for bit.
EXACT = (OURS, "fastgpt2-drafts-auto", "fastgpt2-drafts-int8")
# Tokens of each prompt but the long one.
PROMPT = 16
QUICK = {"tokens": 4, "repeats": 1, "batches": [2], "prefill": 32}

# The seconds of each turn of a program, by cell: "alone", "8", "16" and "first".
Turns = Mapping[str, Sequence[float]]


def main() -> None:
    arguments = parser(__doc__, rounds=4)
    arguments.add_argument("--peer-python", help="the Python of `environment.py` that has the peers")
    arguments.add_argument(
        "--export-python", help="the one that has optimum-intel; default: beside --peer-python, where it is made"
    )
    arguments.add_argument(
        "--only",
        action="append",
        choices=(OURS, *OUR_VARIANTS, *PEERS),
        help=f"may be repeated; default: all; {OURS} is always there",
    )
    arguments.add_argument("--threads", type=int, help="threads of each program; default: all cores")
    arguments.add_argument("--tokens", type=int, default=40, help="new tokens; default: 40")
    arguments.add_argument("--repeats", type=int, default=1, help="measurements in a process; default: 1")
    arguments.add_argument("--batches", type=numbers, default=[8, 16], help="prompts at once; default: 8,16")
    arguments.add_argument(
        "--prompts-from", type=Path, default=HELD_OUT_TEXT, help="a text file; default: held-out text"
    )
    arguments.add_argument("--seed", type=int, default=0, help="of the places in it; default: 0")
    arguments.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt; default: 512")
    arguments.add_argument("--workdir", type=Path, help="a folder for converted models; default: a temporary one")
    asked = parse(arguments, QUICK)
    result = begin("peers", asked)
    with ExitStack() as stack:
        workdir = asked.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workdir.mkdir(parents=True, exist_ok=True)
        result["models"] = [measure(model, asked, workdir) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace, workdir: Path) -> Values:
    """Return what was measured of all programs with one model."""
    folder = find_model(model)
    config = read_config(folder)
    threads = asked.threads or usable_cores()
    ids = Tokenizer.from_folder(folder).encode(asked.prompts_from.read_text("utf-8"))
    job = prompts(ids, max(1, *asked.batches), min(asked.prefill, config.n_positions - 1), asked.seed)
    job |= {"tokens": asked.tokens, "repeats": asked.repeats, "batches": asked.batches, "threads": threads}
    places, skipped = converted(folder, asked, workdir)

    def turn(name: str, job: Values = job) -> Values:
        python = asked.peer_python if name in PEERS else sys.executable
        return run_json([python, HERE / "run.py", name, places[name], json.dumps(job)])[0]

    for name in list(places):
        progress(f"{name}: a first run, which does not count")
        try:
            turn(name, job | {"tokens": 2, "repeats": 0})
        except Failed as failure:
            if name == OURS:
                raise
            skipped[name] = str(failure)
            del places[name]
    rates: list[float] = []
    with readers(threads) as rate:
        turns = {name: lambda name=name: turn(name) for name in places}
        found = in_turns(turns, asked.rounds, between=lambda: rates.append(rate(threads)))
    seconds = {name: by_cell(runs) for name, runs in found.items()}
    entry: Values = {
        "model": model,
        "folder": folder.name,
        "threads": threads,
        "tokens": asked.tokens,
        "step_mb": step_bytes(config) / 1e6,
        "bandwidth_gb_per_s": summary(rates, 1e-9),
        "prefill_tokens": len(job["long"]),
        "skipped": skipped,
        "peers": {
            name: figures(runs, seconds[name], found[OURS], seconds[OURS], asked.tokens) for name, runs in found.items()
        },
        "best": best(seconds),
    }
    show(entry, asked)
    return entry


def prompts(ids: list[int], count: int, long: int, seed: int) -> Values:
    """Return prompts that begin at places of a text, the same ones for the same seed."""
    *short, longest = pieces(ids, [PROMPT] * count + [long], random.Random(seed))
    return {"prompts": short, "long": longest}


def converted(folder: Path, asked: argparse.Namespace, workdir: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return what each program reads, converting it if that was not done before; and why others cannot be run."""
    wanted = asked.only or [*OUR_VARIANTS, *PEERS]
    places = {name: folder for name in (OURS, *OUR_VARIANTS) if name == OURS or name in wanted}
    skipped: dict[str, str] = {}
    for name, peer in PEERS.items():
        if name not in wanted:
            continue
        if reason := why_peer_is_missing(asked.peer_python, peer.module):
            skipped[name] = reason
            continue
        try:
            places[name] = convert(name, peer, folder, asked, workdir)
        except Failed as failure:
            skipped[name] = f"the conversion failed: {failure}"
    return places, skipped


def convert(name: str, peer: Peer, folder: Path, asked: argparse.Namespace, workdir: Path) -> Path:
    """Return a checkpoint in the form that a peer reads.

    Raises:
        Failed: the converter said no.
    """
    if peer.form is None:
        return folder
    program = name.partition("-")[0]
    out = workdir / f"{folder.resolve().name}.{program}-{peer.form}"
    if not out.exists():
        progress(f"converting {folder.name} for {name}")
        beside = Path(asked.peer_python).absolute().parents[2] / "export" / "bin" / "python"
        python = (asked.export_python or beside) if program == "openvino" else asked.peer_python
        if not Path(python).exists():
            raise Failed(f"{python} does not exist; --export-python names the one that has optimum-intel")
        run_json([python, HERE / "convert.py", program, folder, out, peer.form])
    return out


def by_cell(runs: Sequence[Values]) -> Turns:
    """Return the seconds of a program's turns by cell."""
    batches = runs[0]["batches"]
    return {
        "alone": [median(run["alone"]) for run in runs],
        **{batch: [median(run["batches"][batch]) for run in runs] for batch in batches},
        "first": [median(run["prefill"]) for run in runs],
    }


def figures(runs: Sequence[Values], mine: Turns, our_runs: Sequence[Values], ours: Turns, tokens: int) -> Values:
    """Return the figures of one program beside ours of the same rounds.

    Args:
        runs: what its turns said; mine: their seconds. The same of ours, for ratios and ids.
        tokens: new tokens of each sequence.
    """
    ratios = {cell: ratio(ours[cell], seconds) for cell, seconds in mine.items()}
    batches = {
        batch: {
            "tokens_per_s": summary([int(batch) * tokens / s for s in seconds]),
            "ratio": ratios[batch],
        }
        for batch, seconds in mine.items()
        if batch.isdigit()
    }
    pairs = [
        pair for key, wanted in our_runs[-1]["ids"].items() for pair in zip(wanted, runs[-1]["ids"][key], strict=True)
    ]
    return {
        "version": runs[-1]["version"],
        "drafts": {name: sum(run["drafts"][name] for run in runs) for name in runs[0]["drafts"]},
        **{f"{part}_ms": summary([run[part] for run in runs], 1e3) for part in ("import", "load", "first_token")},
        "ms_per_token": summary([s / tokens for s in mine["alone"]], 1e3),
        "ratio": ratios["alone"],
        "batches": batches,
        "prefill": {"ms": summary(mine["first"], 1e3), "ratio": ratios["first"]},
        "same_ids": {
            "sequences": len(pairs),
            "equal": sum(a == b for a, b in pairs),
            "tokens": sum(len(a) for a, _ in pairs),
            "up_to": sum(length_of_same_start(a, b) for a, b in pairs),
        },
    }


def best(seconds: Mapping[str, Turns]) -> Values:
    """Return, for float32 and for fewer bits, which of ours and which peer is fastest in each cell, and how far apart.

    The ratio is the peer's time divided by ours, within rounds: above 1 ours is ahead.
    """
    found: Values = {}
    for kind in ("float32", "compact"):
        ours: list[str] = []
        theirs: list[str] = []
        for name in seconds:
            if is_compact(name) == (kind == "compact"):
                (theirs if name in PEERS else ours).append(name)
        if not ours or not theirs:
            continue
        found[kind] = {}
        for cell in seconds[OURS]:
            mine, peer = fastest(ours, cell, seconds), fastest(theirs, cell, seconds)
            apart = ratio(seconds[mine][cell], seconds[peer][cell])
            found[kind][cell] = {"ours": mine, "peer": peer, "ratio": apart}
    return found


def is_compact(name: str) -> bool:
    """Return whether a program of the table computes with fewer bits than float32."""
    return PEERS[name].compact if name in PEERS else name not in EXACT


def fastest(names: Sequence[str], cell: str, seconds: Mapping[str, Turns]) -> str:
    """Return which of some programs has the least median in a cell."""
    return min(names, key=lambda name: median(seconds[name][cell]))


def show(entry: Values, asked: argparse.Namespace) -> None:
    """Print the tables of one model."""
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
    print("\nin brackets: the same divided by ours in float32, the median of the rounds' ratios\n")
    for kind, cells in entry["best"].items():
        for cell, e in cells.items():
            print(f"{kind}, {cell}: {e['ours']} is {e['ratio']:.2f} times as fast as the fastest peer, {e['peer']}")
    for name, reason in entry["skipped"].items():
        print(f"{name} was skipped: {reason}")
    for name, e in entry["peers"].items():
        drafted = e["drafts"].get("drafted")
        taken = f"; {e['drafts']['accepted'] / drafted:.0%} of {drafted} guesses came true" if drafted else ""
        print(f"{name}: {e['version']}{taken}")


if __name__ == "__main__":
    main()
