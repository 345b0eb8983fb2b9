#!/usr/bin/env python3
"""Drafts: the same text by fewer steps, on texts that repeat themselves and on those that do not.

    python benchmarks/dressed.py english ck/english       # and so repeating, unrepeating
    python benchmarks/bench_drafts.py --model ck/repeating --model ck/english --model ck/unrepeating

An engine for each of --drafts, all on the same mapped weights, takes turns within a round: --batches prompts of the
held-out text beside this script (another piece each), --tokens new ones each. `ms/token` is the time of the whole run,
prompts included, divided by the tokens of one sequence; the ratio is that of `off` in the same round to it, so above 1
where drafts gain. Beside it, guesses verified and come true, tokens a step, and whether all tokens were the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from common import HERE, begin, heading, in_turns, numbers, parse, parser, ratio, write

from fastgpt2.bench import Values, layout, layout_line, settle, summary, table
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.engine import Engine

PROMPT = 32
OFF = "off"


class Run(NamedTuple):
    """Of one batch."""

    seconds: float
    ids: list[tuple[int, ...]]
    steps: int
    drafted: int
    accepted: int


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument("--drafts", type=lambda text: text.split(","), default=["auto", "int8"], help="auto,int8,4")
    arguments.add_argument("--batches", type=numbers, default=[1, 4, 8], help="default: 1,4,8")
    arguments.add_argument("--tokens", type=int, default=64, help="default: 64")
    arguments.add_argument("--blas", default="auto", help="default: auto")
    asked = parse(arguments)
    result = begin("drafts", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    engines = {how: load(model, how, asked) for how in (OFF, *asked.drafts)}
    plain = engines[OFF]
    heading(f"{model}: {layout_line(layout(plain.decoder.model))}")
    entry: Values = {"model": model, **layout(plain.decoder.model), "tokens": asked.tokens, "batches": {}}
    ids = plain.tokenizer.encode((HERE / "held_out.txt").read_text("utf-8"))
    for batch in asked.batches:
        for engine in engines.values():
            engine.decoder.model.use_slots(batch)
        pieces = [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(batch * (asked.rounds + 1))]

        def turn(engine: Engine, pieces: list[list[int]] = pieces, batch: int = batch) -> Callable[[], Run]:
            rounds = iter(range(0, len(pieces), batch))
            return lambda: run(engine, pieces[(at := next(rounds)) : at + batch], asked.tokens)

        turns = {how: turn(engine) for how, engine in engines.items()}
        for one in turns.values():
            one()  # unmeasured: what steps cost and how often guesses come true is not known yet
        found = in_turns(turns, asked.rounds, between=settle)
        entry["batches"][str(batch)] = {how: summed_up(runs, found[OFF], asked.tokens) for how, runs in found.items()}
        show(batch, entry["batches"][str(batch)])
    for engine in engines.values():
        engine.decoder.model.close()
    return entry


def load(model: str, how: str, asked: argparse.Namespace) -> Engine:
    drafts = int(how) if how.isdecimal() else how
    engine = Engine.load(model, threads=asked.threads, blas=asked.blas, drafts=drafts, prefix_memory=0)
    engine.warm_up()
    return engine


def run(engine: Engine, prompts: list[list[int]], tokens: int) -> Run:
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
