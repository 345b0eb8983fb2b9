#!/usr/bin/env python3
"""Drafts: the same text in fewer steps, on texts that repeat themselves and on texts that do not.

    python benchmarks/engine/checkpoints.py english ck/english       # likewise repeating, unrepeating
    python benchmarks/engine/drafts.py --model ck/repeating --model ck/english --model ck/unrepeating

There is an engine for each of --drafts and one without, all on the same mapped weights. They take turns within a round:
each continues as many prompts at once as --batches says, by --tokens tokens. The prompts are pieces of the held-out
text in `data/`, others in each round. `ms/token` is the time of the whole run, prompts included, divided by the tokens
of one sequence. The ratio is the time of `off` in the same round divided by it: above 1 where drafts gain. The table
also shows the guesses that were verified and that came true, the tokens a step, and whether all tokens were the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import HELD_OUT_TEXT, begin, heading, in_turns, numbers, parse, parser, ratio, write
from fastgpt2.bench import Values, layout, layout_line, let_helpers_sleep, summary, table
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.engine import Engine

# Tokens of each prompt.
PROMPT = 32
OFF = "off"
QUICK = {"batches": [2], "tokens": 8}


class Run(NamedTuple):
    """The work of one engine on one batch of prompts."""

    seconds: float
    ids: list[tuple[int, ...]]
    steps: int
    drafted: int
    accepted: int


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument(
        "--drafts",
        type=lambda text: text.split(","),
        default=["auto", "int8"],
        help="default: auto,int8; a number guesses that many tokens",
    )
    arguments.add_argument("--batches", type=numbers, default=[1, 4, 8], help="prompts at once; default: 1,4,8")
    arguments.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt; default: 64")
    arguments.add_argument("--blas", default="auto", help="default: auto")
    asked = parse(arguments, QUICK)
    result = begin("drafts", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what all engines of one model did, by the number of prompts at once."""
    engines = {how: load(model, how, asked) for how in (OFF, *asked.drafts)}
    plain = engines[OFF]
    heading(f"{model}: {layout_line(layout(plain.decoder.model))}")
    entry: Values = {"model": model, **layout(plain.decoder.model), "tokens": asked.tokens, "batches": {}}
    ids = plain.tokenizer.encode(HELD_OUT_TEXT.read_text("utf-8"))
    for batch in asked.batches:
        for engine in engines.values():
            engine.decoder.model.cache.use_slots(batch)
        pieces = [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(batch * (asked.rounds + 1))]

        def turn(engine: Engine, pieces: list[list[int]] = pieces, batch: int = batch) -> Callable[[], Run]:
            rounds = iter(range(0, len(pieces), batch))
            return lambda: run(engine, pieces[(at := next(rounds)) : at + batch], asked.tokens)

        turns = {how: turn(engine) for how, engine in engines.items()}
        for one in turns.values():
            one()  # not measured: the engine learns what steps cost and how often guesses come true
        found = in_turns(turns, asked.rounds, between=let_helpers_sleep)
        entry["batches"][str(batch)] = {how: summed_up(runs, found[OFF], asked.tokens) for how, runs in found.items()}
        show(batch, entry["batches"][str(batch)])
    for engine in engines.values():
        engine.decoder.model.close()
    return entry


def load(model: str, how: str, asked: argparse.Namespace) -> Engine:
    """Load a model with one way of drafting, warmed up."""
    drafts = int(how) if how.isdecimal() else how
    engine = Engine.load(model, threads=asked.threads, blas=asked.blas, drafts=drafts, prefix_memory=0)
    engine.warm_up()
    return engine


def run(engine: Engine, prompts: list[list[int]], tokens: int) -> Run:
    """Continue all prompts at once."""
    decoder = engine.decoder
    prepared = [
        decoder.prepare(GenerationRequest(tuple(ids), max_new_tokens=tokens, ignore_eos=True)) for ids in prompts
    ]
    started, steps = perf_counter(), 0
    sequences: list[Sequence] = [decoder.admit(prompt) for prompt in prepared]
    while decoder.running:
        decoder.step()
        steps += 1
    seconds = perf_counter() - started
    drafted, accepted = (sum(getattr(s, name) for s in sequences) for name in ("drafted", "accepted"))
    return Run(seconds, [tuple(s.token_ids) for s in sequences], steps, drafted, accepted)


def summed_up(runs: list[Run], plain: list[Run], tokens: int) -> Values:
    """Return the figures of one engine's runs, compared with the runs without drafts in the same rounds."""
    return {
        "ms_per_token": summary([run.seconds / tokens for run in runs], 1e3),
        "ratio": ratio([run.seconds for run in runs], [run.seconds for run in plain]),
        "drafted": sum(run.drafted for run in runs),
        "accepted": sum(run.accepted for run in runs),
        "tokens_per_step": tokens * len(runs) / sum(run.steps for run in runs),
        "same": sum(a == b for ours, theirs in zip(runs, plain, strict=True) for a, b in zip(ours.ids, theirs.ids)),  # noqa: B905
        "sequences": sum(len(run.ids) for run in runs),
    }


def show(batch: int, found: Values) -> None:
    """Print the table of one number of prompts at once."""
    rows = []
    for how, e in found.items():
        taken = f"{e['accepted'] / e['drafted']:.0%}" if e["drafted"] else "-"
        ms = e["ms_per_token"]
        cells = [how, f"{ms['median']:.2f}", f"{ms['q1']:.2f}-{ms['q3']:.2f}", f"{e['ratio']:.2f}", str(e["drafted"])]
        rows.append([*cells, taken, f"{e['tokens_per_step']:.2f}", f"{e['same']}/{e['sequences']}"])
    headers = [f"sequences: {batch}", "ms/token", "quartiles", "off / it", "drafted", "taken", "tokens/step", "same"]
    print(table(headers, rows), end="\n\n")


if __name__ == "__main__":
    main()
