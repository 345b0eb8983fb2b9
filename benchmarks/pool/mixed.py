#!/usr/bin/env python3
"""Prompts of very different lengths through a pool: how much of what the engine could do is left of it.

    python benchmarks/pool/mixed.py --model gpt2

There are an embedded Redis, one worker and `fastgpt2 api`, and beside them an engine in a process of its own
(`engine/engine_process.py`), each asleep while the others are measured. Prompts are pieces of `data/held_out.txt`,
their lengths spread evenly over 24 to 496 tokens (less where the model has fewer positions) in random order. They are
the same in every round, and nothing is kept of one for another.

prompts    the engine alone reads all prompts, and gives one token each
tokens     the engine alone gives each job's tokens, as many jobs at once as pay, after prompts of one token
sum        all new tokens, divided by the time of both together: as if a token cost nothing but its share of a full
           step, and a prompt nothing but its reading
mixed      16 clients of the endpoint, each of which sends its next request when its last one has ended: tokens/s, and
           what share of the sum they are; the time of a whole request; the time between two events of a stream (mostly
           a token each), of which the longest is what prompts make others wait
long       prompts of 512 tokens with one new token each, through the pool and in the engine alone: prompt tokens/s
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HELD_OUT_TEXT,
    HERE,
    Child,
    Failed,
    begin,
    even_lengths,
    heading,
    in_turns,
    medians,
    parse,
    parser,
    pieces,
    progress,
    ratio,
    write,
)
from benchmarks.endpoint.streams import Stream, read_all
from benchmarks.tables import Draw, markdown
from fastgpt2 import settings
from fastgpt2.bench import Values, let_helpers_sleep, quantile, table
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.system.up import System

SHARE_TARGET = 0.85
ENGINE_PROCESS = HERE / "engine" / "engine_process.py"
SEED = 20
QUICK = {"requests": 6, "clients": 3, "tokens": 4, "long_requests": 2}


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument("--requests", type=int, default=96, help="of mixed lengths; default: 96")
    arguments.add_argument("--clients", type=int, default=16, help="default: 16")
    arguments.add_argument("--tokens", type=int, default=32, help="new ones of each request; default: 32")
    arguments.add_argument("--shortest", type=int, default=24, help="tokens of the shortest prompt; default: 24")
    arguments.add_argument("--longest", type=int, default=496, help="tokens of the longest prompt; default: 496")
    arguments.add_argument("--long", type=int, default=512, help="tokens of each long prompt; default: 512")
    arguments.add_argument("--long-requests", type=int, default=24, help="prompts of that length; default: 24")
    arguments.add_argument("--weights", default="float32", help="as for fastgpt2 up; default: float32")
    asked = parse(arguments, QUICK)
    if asked.requests < 2 or asked.tokens < 2 or not 1 <= asked.shortest <= asked.longest:
        arguments.error("--requests and --tokens must be 2 or more, and 1 <= --shortest <= --longest")
    result = begin("mixed", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what the pool and the engine alone do with the same prompts."""
    folder = find_model(model)
    mixed, long = make_prompts(folder, asked)
    progress(f"{model}: starting")
    values = settings.of_system(
        model=str(folder), workers="1", port="0", redis_port="0", log_level="warning", timeout="1800",
        prefix_memory="0", weights=asked.weights,
    )  # fmt: skip
    engine = [sys.executable, ENGINE_PROCESS, str(folder), "--prefix-memory", "0", "--weights", asked.weights]
    with closing(Child(engine)) as child, System(values) as system:
        port = urlsplit(system.http_url).port
        assert port is not None

        def alone(prompts: list[list[int]], tokens: int) -> float:
            seconds: float = child.ask({"prompts": prompts, "tokens": tokens})["seconds"]
            return seconds

        def through_the_pool(prompts: list[list[int]], tokens: int) -> Values:
            return figures(read_all(port, prompts, tokens, asked.clients), tokens)

        turns: dict[str, Callable[[], float | Values]] = {
            "prompts": partial(alone, mixed, 1),
            "tokens": partial(alone, [prompt[:1] for prompt in mixed], asked.tokens),
            "mixed": partial(through_the_pool, mixed, asked.tokens),
            "long_alone": partial(alone, long, 1),
            "long_pooled": partial(through_the_pool, long, 1),
        }
        through_the_pool(mixed[: asked.clients], 2)  # not measured: a first job does things that later ones do not
        alone(mixed[:2], 2)
        found = in_turns(turns, asked.rounds, let_helpers_sleep)
        entry: Values = {"model": model, "max_batch": child.hello["max_batch"], "weights": asked.weights}
    progress("")
    entry |= summed_up(found, [len(prompt) for prompt in mixed], [len(prompt) for prompt in long], asked)
    show(entry)
    return entry


def make_prompts(folder: Path, asked: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts of mixed lengths, and the long ones: pieces of the text from places taken at random."""
    dice, positions = random.Random(SEED), read_config(folder).n_positions
    ids = Tokenizer.from_folder(folder).encode(HELD_OUT_TEXT.read_text("utf-8"))
    longest = min(asked.longest, positions - asked.tokens)
    lengths = even_lengths(asked.requests, min(asked.shortest, longest), longest, dice)
    long = min(asked.long, positions - 1)
    return pieces(ids, lengths, dice), pieces(ids, [long] * asked.long_requests, dice)


def figures(streams: list[Stream], tokens: int) -> Values:
    """Return the figures of one run of streams; each job has `tokens` new tokens.

    Raises:
        Failed: a stream broke off.
    """
    if not all(stream.done for stream in streams):
        raise Failed("a stream of the endpoint broke off")
    whole = [1e3 * stream.seconds for stream in streams]
    gaps = [1e3 * gap for stream in streams for gap in stream.gaps] or [0.0]
    return {
        "seconds": max(stream.ended_at for stream in streams) - min(stream.began_at for stream in streams),
        "events_a_token": sum(stream.events for stream in streams) / (tokens * len(streams)),
        "request_ms": {"p50": quantile(whole, 0.5), "p95": quantile(whole, 0.95)},
        "first_ms": {f"p{p}": quantile([1e3 * stream.first for stream in streams], p / 100) for p in (50, 95)},
        "gap_ms": {"p50": quantile(gaps, 0.5), "p99": quantile(gaps, 0.99), "longest": max(gaps)},
    }


def summed_up(found: Values, lengths: list[int], long: list[int], asked: argparse.Namespace) -> Values:
    """Return medians over the rounds; shares are taken within a round."""
    new, read = asked.tokens * len(lengths), sum(lengths)
    both = [prompts + tokens for prompts, tokens in zip(found["prompts"], found["tokens"], strict=True)]
    mixed = [run["seconds"] for run in found["mixed"]]
    pooled = [run["seconds"] for run in found["long_pooled"]]
    return {
        "prompt_tokens": [min(lengths), max(lengths), read],
        "long_tokens": long[0],
        "rates": medians(
            [
                {
                    "prompt_tokens_per_s": read / prompts,
                    "tokens_per_s": new / tokens,
                    "sum_tokens_per_s": new / (prompts + tokens),
                    "mixed_tokens_per_s": new / run,
                    "long_alone_tokens_per_s": sum(long) / alone,
                    "long_pooled_tokens_per_s": sum(long) / through,
                }
                for prompts, tokens, run, alone, through in zip(
                    found["prompts"], found["tokens"], mixed, found["long_alone"], pooled, strict=True
                )
            ]
        ),
        "share": ratio(mixed, both),
        "long_share": ratio(pooled, found["long_alone"]),
        "mixed": medians(found["mixed"]),
    }


def tables(entry: Values) -> tuple[list[list[str]], list[list[str]]]:
    """Return the rows of the two tables of one model: rates, and times in milliseconds."""
    rates = {name: f"{found['median']:.1f}" for name, found in entry["rates"].items()}
    shortest, longest, _ = entry["prompt_tokens"]
    rows = [
        ["prompts alone, prompt tokens/s", rates["prompt_tokens_per_s"]],
        ["tokens alone, tokens/s", rates["tokens_per_s"]],
        ["both added up, tokens/s", rates["sum_tokens_per_s"]],
        [f"prompts of {shortest} to {longest} through the pool, tokens/s", rates["mixed_tokens_per_s"]],
        [f"their share of the sum (target: {SHARE_TARGET:.0%})", f"{entry['share']:.1%}"],
        [f"prompts of {entry['long_tokens']} alone, prompt tokens/s", rates["long_alone_tokens_per_s"]],
        ["the same through the pool", rates["long_pooled_tokens_per_s"]],
        ["share of the engine's own rate", f"{entry['long_share']:.1%}"],
    ]
    names = {"request_ms": "a whole request", "first_ms": "its first token", "gap_ms": "between two tokens"}
    times = [
        [f"{label}, {which}", f"{found['median']:.0f}"]
        for name, label in names.items()
        for which, found in entry["mixed"][name].items()
    ]
    return rows, times


def section(_name: str, entry: Values, _draw: Draw) -> list[str]:
    """Return the lines of the page of results about one model."""
    rows, times = tables(entry)
    about = f"{entry['weights']} weights, up to {entry['max_batch']} jobs at once."
    return [about, "", *markdown(["", ""], rows), "", *markdown(["of the mixed prompts", "ms"], times), ""]


def show(entry: Values) -> None:
    """Print the tables of one model."""
    rows, times = tables(entry)
    heading(f"{entry['model']}, {entry['weights']}: up to {entry['max_batch']} at once; medians of the rounds")
    print(table(["", ""], rows))
    heading("prompts of mixed lengths through the pool, ms")
    print(table(["", ""], times))


if __name__ == "__main__":
    main()
