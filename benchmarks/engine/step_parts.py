#!/usr/bin/env python3
"""Where the time of a decode step goes, part by part, and what a step allocates.

    python benchmarks/engine/step_parts.py --model gpt2

Time: the parts of `Decoder.step`, with sequences that really decode, timed one by one in the first of the engine's
processes (the others do equal shares of the same work). `products` are those with the weights, biases included; `layer
norm` includes the residuals. `waiting` is the wait for the other processes. `argmax` is timed separately, on the same
logits. `decoder` is what the step does besides the network and argmax: tokens, text, stop rules. `rest` is what is left
of the network: Python, and writing the step down for the other processes. A compiled step is one call without these
stopwatches, and timing the parts takes time itself; so a step without them is shown too.

Allocation: tracemalloc, to which numpy reports its arrays, gives the bytes held after some steps that were not held
before them, and the most that was in use during a step beyond what was held before it.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import begin, heading, numbers, parse, parser, write
from fastgpt2.bench import CONTEXT, Values, layout, layout_line, median, summary, table
from fastgpt2.engine.decoding.decoder import argmax
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.engine import Engine
from fastgpt2.engine.kernels.program import Program

# In the order of the table; each is also the name of a part below.
PARTS = ("products", "layer norm", "activation", "attention", "waiting", "embedding", "rest", "argmax", "decoder")
WARM_UP = 5
QUICK = {"rows": [1, 2], "steps": 2}


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument("--blas", default="auto", help="default: auto")
    arguments.add_argument(
        "--rows", type=numbers, default=[1, 8, 16], help="sequences decoded together; default: 1,8,16"
    )
    arguments.add_argument("--steps", type=int, default=20, help="steps a round; default: 20")
    asked = parse(arguments, QUICK)
    result = begin("profile", asked)
    result["models"] = []
    for model in asked.model:
        # Nothing is guessed and nothing is known before: each step reads a token of each sequence.
        plain: dict[str, Any] = {"drafts": "off", "prefix_memory": 0}
        engine = Engine.load(model, threads=asked.threads, max_batch=max(asked.rows), blas=asked.blas, **plain)
        engine.warm_up()
        entry: Values = {"model": model, **layout(engine.decoder.model)}
        entry["time"] = [profile(engine, rows, asked.rounds, asked.steps) for rows in asked.rows]
        entry["memory"] = [allocation(engine, rows, asked.steps) for rows in asked.rows]
        result["models"].append(entry)
        show(entry)
        engine.decoder.model.close()
    write(result, asked.output)


@contextmanager
def decoding(engine: Engine, rows: int) -> Iterator[Callable[[], None]]:
    """Begin `rows` sequences and read their prompts; yield a function that does a step with all of them."""
    decoder = engine.decoder
    ids = tuple(i % engine.config.vocab_size for i in range(CONTEXT))
    request = GenerationRequest(ids, max_new_tokens=engine.config.n_positions - CONTEXT, ignore_eos=True)
    sequences = [decoder.admit(decoder.prepare(request)) for _ in range(rows)]
    try:
        while not all(sequence.token_ids for sequence in sequences):
            decoder.step()
        for _ in range(WARM_UP):
            decoder.step()
        yield lambda: step(engine, rows)
    finally:
        for sequence in sequences:
            decoder.finish(sequence)


def step(engine: Engine, rows: int) -> None:
    """Do a step with all sequences; end the script if one of them has ended."""
    engine.decoder.step()
    if len(engine.decoder.running) != rows:
        raise SystemExit("a sequence has ended within the steps of a round: set fewer --steps")


def profile(engine: Engine, rows: int, rounds: int, steps: int) -> Values:
    """Time rounds of steps, undisturbed and part by part in turn."""
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    timed, undisturbed, read = [], [], []
    for _ in range(rounds):
        with decoding(engine, rows) as one_step:
            for _ in range(steps):
                started = perf_counter()
                one_step()
                undisturbed.append(perf_counter() - started)
        with decoding(engine, rows) as one_step, parts_timed(engine) as spent:
            for _ in range(steps):
                spent.clear()
                started = perf_counter()
                one_step()
                total = perf_counter() - started
                timed.append(total)
                read.append(spent.pop("bytes", 0.0) / spent["products"])
                logits = spent.pop("logits")
                network = spent.pop("network")
                started = perf_counter()
                argmax(logits)
                likeliest = perf_counter() - started
                rest, decoder = network - sum(spent.values()), total - network - likeliest
                apart = {"argmax": likeliest, "decoder": decoder, "rest": rest}
                for part in PARTS:
                    samples[part].append({**spent, **apart}.get(part, 0.0))
    total = median(timed)
    return {
        "rows": rows,
        "step_ms": summary(undisturbed, 1e3),
        "timed_step_ms": summary(timed, 1e3),
        "parts_ms": {part: summary(found, 1e3) for part, found in samples.items()},
        "products_share": median([p / t for p, t in zip(samples["products"], timed, strict=True)]),
        "products_gb_per_s": median(read) / 1e9,
        "overhead": total / median(undisturbed) - 1,
    }


class Stopwatches:
    """The operations of a shard, each of whose calls is timed; by the names that the operations have.

    Attributes:
        spent: seconds by part, bytes of the weights read, the last step's logits.
    """

    def __init__(self, operations: Any) -> None:
        self._operations = operations
        self.spent: dict[str, Any] = {}

    def watched(self, part: str, function: Callable[..., Any], nbytes: int = 0) -> Callable[..., Any]:
        def watch(*arguments: Any) -> Any:
            started = perf_counter()
            try:
                return function(*arguments)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + perf_counter() - started
                self.spent["bytes"] = self.spent.get("bytes", 0) + nbytes

        return watch

    def embed(self, *arguments: Any) -> Any:
        return self.watched("embedding", self._operations.embed(*arguments))

    def layer_norm(self, *arguments: Any) -> Any:
        return self.watched("layer norm", self._operations.layer_norm(*arguments))

    def linear(self, x: Any, share: Any, out: Any, rows: Any, then: Any) -> Any:
        call = self._operations.linear(x, share, out, rows, then)
        return self.watched("products", call, share.panels.array.nbytes)

    def activation(self, *arguments: Any) -> Any:
        return self.watched("activation", self._operations.activation(*arguments))

    def meet(self, meeting: Any) -> Any:
        return self.watched("waiting", self._operations.meet(meeting))

    def attention(self, attention: Any) -> Any:
        """Return the attention of a shard, timed."""
        return SimpleNamespace(
            exact=attention.exact,
            prepare=self.watched("attention", attention.prepare),
            call=lambda layer: self.watched("attention", attention.call(layer)),
        )


@contextmanager
def parts_timed(engine: Engine) -> Iterator[dict[str, Any]]:
    """Have each operation of a step called and timed by itself; yield what `Stopwatches.spent` says."""
    model: Any = engine.decoder.model
    shard: Any = (model._together or model._alone)[0]  # the one with the weights themselves; the other is for drafts
    before = dict(vars(shard))
    watches = Stopwatches(shard._operations)

    def forward(segments: Any) -> Any:
        started = perf_counter()
        logits = type(model).forward(model, segments)
        watches.spent.update(logits=logits, network=perf_counter() - started)
        return logits

    shard._attention, shard._operations = watches.attention(shard._attention), watches
    shard._all_rows, shard._wanted_rows = Program(shard._write_all_rows()), Program(shard._write_wanted_rows())
    if shard._meeting is not None:
        shard._last_meet = watches.meet(shard._meeting)
    model.forward = forward
    try:
        yield watches.spent
    finally:
        vars(shard).update(before)
        del model.forward


def allocation(engine: Engine, rows: int, steps: int) -> Values:
    """Return the bytes that steps hold and use, Python's and numpy's together, and numpy's share of those held."""
    import numpy as np

    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    with decoding(engine, rows) as one_step:
        tracemalloc.start()
        try:
            one_step()  # what is allocated only once
            gc.collect()
            peaks = []
            first = tracemalloc.take_snapshot().filter_traces([arrays])
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(steps):
                held, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                one_step()
                peaks.append(tracemalloc.get_traced_memory()[1] - held)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            last = tracemalloc.take_snapshot().filter_traces([arrays])
        finally:
            tracemalloc.stop()
    of_numpy = sum(trace.size for trace in last.traces) - sum(trace.size for trace in first.traces)
    return {
        "rows": rows,
        "steps": steps,
        "peak_bytes": median(peaks),
        "held_bytes_per_step": (after - before) / steps,
        "held_numpy_bytes_per_step": of_numpy / steps,
    }


def show(entry: Values) -> None:
    """Print the tables of one model."""
    heading(f"{entry['model']}: {layout_line(entry)}")
    times = entry["time"]
    cells = [
        [part, *(f"{t['parts_ms'][part]['median']:.3f}  {share(t, part):5.1%}" for t in times)]
        for part in PARTS
        if any(t["parts_ms"][part]["median"] > 0 for t in times)
    ]
    cells += [
        ["a step, timed so", *(f"{t['timed_step_ms']['median']:.3f} {t['overhead']:+6.1%}" for t in times)],
        ["a step, undisturbed", *(f"{t['step_ms']['median']:.3f}       " for t in times)],
        ["all but products", *(f"{1 - t['products_share']:.1%}" for t in times)],
        ["GB/s in products, this process", *(f"{t['products_gb_per_s']:.1f}       " for t in times)],
    ]
    print(table(["ms", *(f"{t['rows']} rows" for t in times)], cells))
    print()
    rows = allocation_rows(entry)
    print(table(["allocated, bytes: rows", "peak in a step", "held a step", "of it numpy's"], rows))


def allocation_rows(entry: Values) -> list[list[str]]:
    """Return a row for each number of sequences: bytes at the peak of a step, held after it, and numpy's of those."""
    keys = ("peak_bytes", "held_bytes_per_step", "held_numpy_bytes_per_step")
    return [[str(m["rows"]), *(f"{m[key]:,.0f}" for key in keys)] for m in entry["memory"]]


def share(entry: Values, part: str) -> float:
    """Return a part's share of the step that was timed part by part."""
    return float(entry["parts_ms"][part]["median"] / entry["timed_step_ms"]["median"])


if __name__ == "__main__":
    main()
