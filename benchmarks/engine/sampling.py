#!/usr/bin/env python3
"""How tokens are chosen: what a step costs in which all sequences draw, or have penalties, against greedy steps.

    python benchmarks/engine/sampling.py --model gpt2
    python benchmarks/engine/sampling.py --kinds temperature,top_p --batch 1

One engine decodes --batch sequences side by side, without drafts. Each kind of request takes its turn within a round:
all sequences ask for the same, their prompts are read, and then --steps steps are timed, each of which gives every
sequence a token. The prompts are pieces of the held-out text in `data/`. A round counts by the median of its steps. The
ratio is that time divided by the one of greedy steps in the same round: 1.05 is 5% slower.

The goal is a ratio of at most 1.05 for `top_p + penalty` in a batch of 16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import HELD_OUT_TEXT, begin, heading, in_turns, parse, parser, ratio, write
from fastgpt2.bench import Values, layout, layout_line, let_helpers_sleep, median, summary, table
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.engine import Engine

GREEDY = "greedy"
GOAL = "top_p + penalty"

# As many ids as a request may well name.
IDS = range(100, 200)

# What the sequences ask for, by the name of the kind.
KINDS: dict[str, dict[str, Any]] = {
    GREEDY: {},
    GOAL: {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.2},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "typical_p": {"temperature": 0.8, "typical_p": 0.95},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "logit_bias": {"logit_bias": dict.fromkeys(IDS, -5.0)},
    "bad_words": {"bad_words": [*([one] for one in IDS), *([one, one] for one in IDS)]},
    "suppress_tokens": {"suppress_tokens": list(IDS)},
    "logprobs": {"logprobs": 5},
}
KINDS["all of them"] = {name: value for fields in KINDS.values() for name, value in fields.items()}

QUICK = {"batch": 2, "steps": 2, "context": 8}


def main() -> None:
    arguments = parser(__doc__, rounds=15)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument("--batch", type=int, default=16, help="sequences; default: 16")
    arguments.add_argument("--steps", type=int, default=20, help="steps a turn; default: 20")
    arguments.add_argument("--context", type=int, default=64, help="tokens of each prompt; default: 64")
    arguments.add_argument(
        "--kinds",
        type=lambda text: [GREEDY, *(kind for kind in text.split(",") if kind != GREEDY)],
        default=list(KINDS),
        help=f"some of: {', '.join(KINDS)}; default: all",
    )
    asked = parse(arguments, QUICK)
    if unknown := [kind for kind in asked.kinds if kind not in KINDS]:
        arguments.error(f"unknown kinds: {', '.join(unknown)}")
    result = begin("sampling", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return the times of steps of one model, by kind."""
    engine = Engine.load(model, threads=asked.threads, max_batch=asked.batch, prefix_memory=0, drafts="off")
    engine.warm_up()
    heading(f"{model}, {asked.batch} sequences: {layout_line(layout(engine.decoder.model))}")
    ids = engine.tokenizer.encode(HELD_OUT_TEXT.read_text("utf-8"))[: asked.batch * asked.context]
    prompts = [tuple(ids[at : at + asked.context]) for at in range(0, len(ids), asked.context)]
    turns: dict[str, Callable[[], float]] = {
        kind: partial(time_steps, engine, prompts, asked.steps, KINDS[kind]) for kind in asked.kinds
    }
    for turn in turns.values():
        turn()  # not measured: memory is committed
    found = in_turns(turns, asked.rounds, between=let_helpers_sleep)
    entry: Values = {
        "model": model,
        **layout(engine.decoder.model),
        "batch": asked.batch,
        "context": asked.context,
        "ms": {kind: summary(seconds, 1e3) for kind, seconds in found.items()},
        "ratios": {kind: ratio(found[GREEDY], seconds) for kind, seconds in found.items()},
    }
    print(table(["kind", "ms/step", "quartiles", "times greedy"], [cells(entry, kind) for kind in entry["ms"]]))
    engine.decoder.model.close()
    return entry


def time_steps(engine: Engine, prompts: list[tuple[int, ...]], steps: int, fields: dict[str, Any]) -> float:
    """Return the median seconds of steps that give each of the sequences a token, when their prompts are read."""
    decoder = engine.decoder
    most = engine.config.n_positions - max(map(len, prompts))
    sequences = [
        decoder.admit(decoder.prepare(GenerationRequest(ids, most, ignore_eos=True, seed=seed, **fields)))
        for seed, ids in enumerate(prompts)
    ]
    while any(sequence.status == "prefill" for sequence in sequences):
        decoder.step()
    seconds = []
    for _ in range(steps):
        started = perf_counter()
        decoder.step()
        seconds.append(perf_counter() - started)
    for sequence in sequences:
        decoder.finish(sequence)
    return median(seconds)


def cells(entry: Values, kind: str) -> list[str]:
    """Return the cells of a kind's row."""
    ms = entry["ms"][kind]
    return [kind, f"{ms['median']:.2f}", f"{ms['q1']:.2f}-{ms['q3']:.2f}", f"{entry['ratios'][kind]:.3f}"]


if __name__ == "__main__":
    main()
