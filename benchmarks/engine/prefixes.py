#!/usr/bin/env python3
"""Prompts that begin alike: the time to the first token with and without what is kept of their beginning.

    python benchmarks/engine/prefixes.py --model gpt2

One engine reads, in turns within a round, prompts with random tokens:

without   a prompt of --header tokens and --own others; nothing is kept (`--prefix-memory 0`)
with      the same prompt, when the header is known from another prompt
new       a prompt of as many tokens that nobody has sent before; the engine reads it and keeps it

The time is from the admission to the first token. --tokens tokens are generated, and those of `without` and `with` are
compared. The copies are timed by themselves too, because they are small beside the noise of the rest: `copied in` is
what a prompt takes from what is known; `kept` is what a new prompt leaves, once while the memory for it is still new
and once when other prompts have to make way.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import begin, heading, in_turns, parse, parser, ratio, write
from fastgpt2.bench import Values, layout, layout_line, let_helpers_sleep, summary, table
from fastgpt2.engine.engine import Engine
from fastgpt2.engine.kernels.attention import BLOCK
from fastgpt2.engine.network.prefixes import Prefixes, block_bytes

SEED = 20
# There is room to keep this many prompts.
KEPT = 8
QUICK = {"header": 64, "tokens": 4}


def main() -> None:
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument("--header", type=int, default=512, help="tokens that prompts share; default: 512")
    arguments.add_argument("--own", type=int, default=16, help="tokens of its own that each prompt has; default: 16")
    arguments.add_argument("--tokens", type=int, default=8, help="new tokens; default: 8")
    asked = parse(arguments, QUICK)
    result = begin("prefixes", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return the times to the first token, and of the copies, of one model."""
    engine = Engine.load(model, threads=asked.threads, prefix_memory=0, drafts="off")
    engine.warm_up()
    header = min(asked.header, engine.config.n_positions - asked.own - asked.tokens)
    runs = Runs(engine, header, asked.own, asked.tokens)
    turns = {"without": runs.without, "with": runs.known, "new": runs.new}
    for turn in turns.values():
        turn()
    found = in_turns(turns, asked.rounds, between=let_helpers_sleep)
    seconds = {name: [each for each, _ in of] for name, of in found.items()}
    equal = [ours == theirs for (_, ours), (_, theirs) in zip(found["with"], found["without"], strict=True)]
    copies = runs.copies(asked.rounds)
    entry: Values = {
        "model": model,
        **layout(engine.decoder.model),
        "header": header,
        "own": asked.own,
        "tokens": asked.tokens,
        "block_mb": block_bytes(engine.config) / 1e6,
        "ms": {name: summary(each, 1e3) for name, each in seconds.items()},
        "ratio": ratio(seconds["with"], seconds["without"]),
        "new_ratio": ratio(seconds["without"], seconds["new"]),
        "same_ids": {"equal": sum(equal), "prompts": len(equal)},
        "copies_ms": {name: summary(each, 1e3) for name, each in copies.items()},
    }
    entry["kept_share"] = entry["copies_ms"]["kept"]["median"] / entry["ms"]["without"]["median"]
    show(entry)
    engine.decoder.model.close()
    return entry


class Runs:
    """Prompts of one length; some of them begin with one header, which is known."""

    def __init__(self, engine: Engine, header: int, own: int, tokens: int) -> None:
        self._engine, self._tokens, self._dice = engine, tokens, random.Random(SEED)
        self._header, self._own = self._ids(header), own
        self._length = header + own
        self._prefixes = self._room()
        self._asked = {"without": 0, "with": 0}
        self._run([*self._header, *self._ids(1)], self._prefixes)

    def _ids(self, count: int) -> list[int]:
        return [self._dice.randrange(self._engine.config.vocab_size) for _ in range(count)]

    def _room(self) -> Prefixes:
        blocks = KEPT * (self._length // BLOCK)
        return Prefixes(self._engine.config, (blocks + 1) * block_bytes(self._engine.config))

    def _next(self, turn: str) -> list[int]:
        """Return the header and tokens of the prompt's own, too few to be kept: the same for both turns of a round."""
        self._asked[turn] += 1
        dice = random.Random(self._asked[turn])
        return [*self._header, *(dice.randrange(self._engine.config.vocab_size) for _ in range(self._own))]

    def _run(self, ids: list[int], prefixes: Prefixes | None) -> tuple[float, tuple[int, ...]]:
        """Return the seconds to the first token, and the tokens."""
        self._engine.decoder.prefixes = prefixes
        result = self._engine.generate(ids, max_new_tokens=self._tokens, ignore_eos=True)
        return result.timings.prefill_seconds, result.token_ids

    def without(self) -> tuple[float, tuple[int, ...]]:
        """Read a prompt while nothing is kept."""
        return self._run(self._next("without"), None)

    def known(self) -> tuple[float, tuple[int, ...]]:
        """Read a prompt whose header is known."""
        return self._run(self._next("with"), self._prefixes)

    def new(self) -> tuple[float, tuple[int, ...]]:
        """Read and keep a prompt that is new."""
        return self._run(self._ids(self._length), self._prefixes)

    def copies(self, rounds: int) -> dict[str, list[float]]:
        """Return the seconds of each kind of copy, into and out of a slot that has been in use before."""
        cache = self._engine.decoder.model.cache
        prefixes, slot, length = self._room(), cache.allot(self._length), self._length
        found: dict[str, list[float]] = {"kept, memory new": [], "kept": [], "copied in": []}
        for number in range(KEPT + rounds):
            ids = self._ids(length)
            cache.lengths[slot] = length
            started = perf_counter()
            prefixes.keep(cache, slot, ids)
            kept = perf_counter()
            prefixes.copy_to(cache, slot, ids[: len(self._header)])
            found["copied in"].append(perf_counter() - kept)
            found["kept, memory new" if number < KEPT else "kept"].append(kept - started)
        cache.release(slot)
        return found


def show(entry: Values) -> None:
    """Print the table of one model."""
    heading(f"{entry['model']}: {entry['header']} tokens shared, {entry['own']} own; {layout_line(entry)}")
    rows = [[name, *(f"{of[key]:.1f}" for key in ("median", "q1", "q3"))] for name, of in entry["ms"].items()]
    rows += [[name, *(f"{of[key]:.1f}" for key in ("median", "q1", "q3"))] for name, of in entry["copies_ms"].items()]
    print(table(["ms", "median", "q1", "q3"], rows))
    same = entry["same_ids"]
    print(f"\nwithout / with: {entry['ratio']:.1f} (goal 10); the same tokens: {same['equal']} of {same['prompts']}")
    print(f"to keep a new prompt: {entry['kept_share']:.1%} of the time to read it")


if __name__ == "__main__":
    main()
