#!/usr/bin/env python3
"""Compact weights: what they cost in quality, compared with float32 on the same text.

    python benchmarks/engine/weights.py --model demo --model gpt2

The text was held out from the demo model's training: the last 5% of each story of the book, `data/held_out.txt`.

perplexity  exp of the mean negative log likelihood of each token, in windows of --window tokens. The first half of a
            window is context for the second; only the first window counts as a whole. Meaningless for a random model
agreement   the share of those places at which the likeliest token is that of float32, given the same text before it
difference  the mean magnitude of the difference between the log probability of the token that follows and float32's
texts       --prompts pieces of the text are continued by --tokens tokens: how many continuations are the same, and
            after how many tokens they part on average (--tokens for those that do not part)

Sizes are those of the packed files. Speeds are measured by `step.py --weights`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HELD_OUT_TEXT,
    begin,
    heading,
    length_of_same_start,
    parse,
    parser,
    progress,
    write,
)
from fastgpt2.bench import Values, table
from fastgpt2.engine.engine import Engine
from fastgpt2.engine.loading import WEIGHTS_CHOICES
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment

# Tokens of each prompt.
PROMPT = 24
# Rows of logits at a time: 13 MB of gpt2.
ROWS = 64
QUICK = {"window": 128, "prompts": 4, "tokens": 8, "text": 2000}


def main() -> None:
    arguments = parser(__doc__, rounds=1)
    arguments.add_argument("--window", type=int, default=512, help="tokens; default: 512")
    arguments.add_argument("--prompts", type=int, default=64, help="pieces to continue; default: 64")
    arguments.add_argument("--tokens", type=int, default=60, help="new ones of each piece; default: 60")
    arguments.add_argument("--text", type=int, help="characters of the held-out text; default: all of it")
    asked = parse(arguments, QUICK)
    result = begin("weights", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return size and quality of each kind of weights of one model."""
    entry: Values = {"model": model, "weights": {}}
    reference: tuple[NDArray[np.float64], NDArray[np.int64], list[tuple[int, ...]]] | None = None
    for weights in WEIGHTS_CHOICES:
        progress(f"{model}, {weights}")
        engine = Engine.load(model, weights=weights, prefix_memory=0, drafts="off")
        ids = engine.tokenizer.encode(HELD_OUT_TEXT.read_text("utf-8")[: asked.text])
        window = min(asked.window, engine.config.n_positions)
        logprobs, best = (np.concatenate(parts) for parts in zip(*read(engine.decoder.model, ids, window), strict=True))
        pieces = [ids[at * PROMPT : (at + 1) * PROMPT] for at in range(asked.prompts)]
        texts = [result.token_ids for result in engine.generate(pieces, max_new_tokens=asked.tokens, ignore_eos=True)]
        reference = reference or (logprobs, best, texts)
        entry["weights"][weights] = {
            "mb": os.fstat(engine.decoder.model.sets[0].packed.fd).st_size / 1e6,
            "perplexity": math.exp(-float(logprobs.mean())),
            "agreement": float((best == reference[1]).mean()),
            "difference": float(np.abs(logprobs - reference[0]).mean()),
            "same_texts": sum(a == b for a, b in zip(texts, reference[2], strict=True)),
            "same_tokens": sum(length_of_same_start(a, b) for a, b in zip(texts, reference[2], strict=True))
            / len(texts),
        }
        entry |= {"places": len(best), "prompts": len(texts), "tokens": asked.tokens}
        engine.decoder.model.close()
    progress("")
    show(entry)
    return entry


def read(network: GPT2, ids: list[int], window: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Yield the log probability of each of the text's tokens, and the token that was the likeliest in its place."""
    for start in range(0, len(ids) - window, window // 2):
        slot = network.cache.allot()
        piece, skipped = ids[start : start + window + 1], window // 2 if start else 0
        for at in range(0, window, ROWS):
            part = piece[at : min(at + ROWS, window)]
            logits = network.forward([Segment(slot, part, len(part))]).astype(np.float64)
            if at + len(part) <= skipped:
                continue
            largest = logits.max(axis=1, keepdims=True)
            of_all = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
            following = piece[at + 1 : at + 1 + len(part)]
            first = max(0, skipped - at)
            yield (logits[np.arange(len(part)), following] - of_all)[first:], logits.argmax(axis=1)[first:]
        network.cache.release(slot)


def show(entry: Values) -> None:
    """Print the table of one model."""
    heading(f"{entry['model']}: {entry['places']} places, {entry['prompts']} prompts x {entry['tokens']} tokens")
    rows = [
        [
            name,
            f"{e['mb']:.1f}",
            f"{e['perplexity']:.3f}",
            f"{e['agreement']:.2%}",
            f"{e['difference']:.4f}",
            f"{e['same_texts']}/{entry['prompts']}",
            f"{e['same_tokens']:.1f}",
        ]
        for name, e in entry["weights"].items()
    ]
    headers = ["weights", "MB", "perplexity", "agreement", "difference", "same texts", "same tokens"]
    print(table(headers, rows))


if __name__ == "__main__":
    main()
