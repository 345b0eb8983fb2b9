"""`fastgpt2 bench`: how fast a model decodes here, beside how fast this machine reads memory.

A decode step reads nearly all weights once, so that memory is its bound. Steps are timed in rounds with passes over
memory by as many processes, so that what slows the machine for a while slows both. The scripts in `benchmarks/` share
the measuring, the statistics and the tables. Nothing heavy is imported at the head.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any

from fastgpt2 import __version__

if TYPE_CHECKING:
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.model.config import GPT2Config
    from fastgpt2.engine.network.gpt2 import GPT2

Values = dict[str, Any]

# Sequences that are decoded together, the tokens that each holds, and the tokens of a prompt.
ROWS, CONTEXT, PROMPT = (1, 2, 4, 8, 16), 64, 256

# Bytes that are read to measure the memory: more than a last-level cache holds.
READ_BYTES = 512 << 20

# Megabytes of weights that may well stay in a last-level cache.
SMALL_MB = 64

# The settings with which a model is loaded.
_LOAD_OPTIONS = ("model", "revision", "tokenizer", "generation_config", "threads", "blas", "weights")

# Rounds of a measurement; after _ENOUGH_SECONDS, the fewest that make a median do.
_ROUNDS = 7
_FEWEST_ROUNDS = 3
_ENOUGH_SECONDS = 10.0


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the q-quantile, with linear interpolation between neighbours, as numpy's."""
    at = q * (len(samples) - 1)
    below, above = (sorted(samples)[i] for i in (math.floor(at), math.ceil(at)))
    return below + (above - below) * (at % 1)


def median(samples: Sequence[float]) -> float:
    return quantile(samples, 0.5)


def summary(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, quartiles and number of samples, the first three times `scale`."""
    q1, middle, q3 = (quantile(samples, q) * scale for q in (0.25, 0.5, 0.75))
    return {"median": middle, "q1": q1, "q3": q3, "n": len(samples)}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with its columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    cells = [[f"{c:{side}{w}}" for c, side, w in zip(line, sides, widths, strict=True)] for line in (headers, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def machine() -> Values:
    """Return the facts without which a measurement is worth little. Imports numpy: hold BLAS to one thread before."""
    import numpy

    from fastgpt2.engine.kernels.openblas import identify_blas
    from fastgpt2.engine.machine import cpu_name, usable_cores

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    hardware = {"cpu": cpu_name(), "cores": usable_cores(), "memory_gb": round(memory / 1e9, 1), "system": system}
    software = {"python": platform.python_version(), "numpy": numpy.__version__, "blas": identify_blas()}
    return {**hardware, **software, "fastgpt2": __version__, "date": time.strftime("%Y-%m-%d %H:%M %Z")}


def machine_line(facts: Values) -> str:
    line = "{cpu}, {cores} cores, {memory_gb} GB, {system}; Python {python}, numpy {numpy}, {blas}; {date}"
    return line.format(**facts)


@contextmanager
def readers(count: int) -> Iterator[Callable[[int], float]]:
    """Start processes that read one mapping at the same time, to find what the machine's memory gives.

    They are as the engine's: processes, not threads, and a file's shared pages. While they are not asked, they sleep.

    Yields:
        A function that returns the bytes a second that a number of them read together, in the median of three passes.
    """
    from fastgpt2.engine.machine import anonymous_file

    ones = b"\0\0\x80\x3f" * (1 << 20)
    with os.fdopen(anonymous_file("fastgpt2-bench"), "wb", buffering=0) as file, ExitStack() as stack:
        file.writelines([ones] * (READ_BYTES // len(ones)))
        fd = file.fileno()
        command = [sys.executable, "-c", f"from fastgpt2.bench import read_when_asked; read_when_asked({fd})"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        start = partial(Popen, command, stdin=PIPE, stdout=PIPE, text=True, pass_fds=(fd,), env=environment)
        # A process ends with its input, which the stack closes.
        processes: list[Any] = [stack.enter_context(start()) for _ in range(count)]
        for process in processes:
            process.stdout.readline()
        yield lambda asked: median([_time_pass(processes[:asked]) for _ in range(3)])


def _time_pass(processes: Sequence[Any]) -> float:
    """Have the processes read the mapping once, each its share, and return the bytes a second of all together."""
    numbers = READ_BYTES // 4
    for rank, process in enumerate(processes):
        first, stop = numbers * rank // len(processes), numbers * (rank + 1) // len(processes)
        print(first, stop, file=process.stdin, flush=True)
    # One clock for all processes: from when the first began to when the last was done.
    starts, stops = zip(*(map(float, process.stdout.readline().split()) for process in processes), strict=True)
    return float(READ_BYTES / (max(stops) - min(starts)))


def read_when_asked(fd: int) -> None:
    """Add up the squares of the numbers first to stop, for each line of the input; print when that began and ended."""
    from fastgpt2.engine.machine import hold_to_one_thread

    hold_to_one_thread()
    import numpy as np

    numbers = np.frombuffer(mmap.mmap(fd, READ_BYTES, prot=mmap.PROT_READ), np.float32)
    ask = f"0 {numbers.size}"  # the first time unasked, so that every page is mapped
    while ask:
        first, stop = map(int, ask.split())
        part = numbers[first:stop]
        start = time.perf_counter()
        np.dot(part, part)
        print(start, time.perf_counter(), flush=True)
        ask = sys.stdin.readline()


class Timed:
    """Steps of up to `rows` sequences of `context` tokens, timed from outside: `forward` and the likeliest token."""

    def __init__(self, engine: Engine, rows: int, context: int = CONTEXT) -> None:
        self.model, self._room = engine.decoder.model, engine.config.n_positions - 1
        # Nothing is reserved: on a small machine, `rows` sequences of all positions would not be let in.
        self._slots = [self.model.cache.allot(0) for _ in range(rows)]
        self.model.wait_until_ready()
        for index in range(rows):
            self.read(index, min(context, self._room))

    def decode(self, rows: int, steps: int = 5, context: int = CONTEXT) -> list[float]:
        """Return the seconds of each of `steps` steps of `rows` sequences, a new token each, after one not counted."""
        from fastgpt2.engine.decoding.decoder import argmax
        from fastgpt2.engine.network.step import Segment

        seconds = []
        for i in range(steps + 1):
            segments = [Segment(slot, [i % self.model.config.vocab_size]) for slot in self._slots[:rows]]
            for slot in self._slots[:rows]:
                self.model.cache.lengths[slot] = min(context, self._room)
            started = time.perf_counter()
            argmax(self.model.forward(segments))
            seconds.append(time.perf_counter() - started)
        return seconds[1:]

    def read(self, index: int, tokens: int) -> float:
        """Return the seconds of a prompt of `tokens` tokens up to its first new one; sequence `index` holds it then."""
        from fastgpt2.engine.decoding.decoder import argmax
        from fastgpt2.engine.network.step import Segment

        started, slot = time.perf_counter(), self._slots[index]
        self.model.cache.lengths[slot] = 0
        for at in range(0, tokens, self.model.max_rows):
            stop = min(at + self.model.max_rows, tokens)
            ids = [i % self.model.config.vocab_size for i in range(at, stop)]  # any will do
            argmax(self.model.forward([Segment(slot, ids, int(stop == tokens))]))
        return time.perf_counter() - started


def let_helpers_sleep() -> None:
    """Wait until the engine's helpers sleep: after a step they look for the next one, and keep a core busy."""
    from fastgpt2.engine.network.helpers import SPIN_SECONDS

    time.sleep(3 * SPIN_SECONDS)


def step_bytes(config: GPT2Config, weight_bytes: int = 4) -> int:
    """Return the bytes of weights that a decode step reads in any layout: all but the embeddings, read by row."""
    from fastgpt2.engine.model.weights import expected_shapes

    read = (shape for name, shape in expected_shapes(config).items() if name not in ("wte.weight", "wpe.weight"))
    # Biases and norms are float32.
    return sum((weight_bytes if len(shape) > 1 else 4) * math.prod(shape) for shape in read)


def weight_bytes(model: GPT2) -> int:
    return int(model.sets[0].weights.lm_head.array.itemsize)


def layout(model: GPT2) -> Values:
    """Return how a network is laid out and multiplied here; panels as inputs x columns."""
    block = model.sets[0].weights.blocks[0]
    return {
        "blas": model.sets[0].kernel.product.name,
        "panels": ", ".join(f"{x.weight.n_in}x{x.weight.width}" for x in (block.c_fc, block.mlp_c_proj)),
        "processes": model.size,
        "exact": model.exact,
        "step_mb": step_bytes(model.config, weight_bytes(model)) / 1e6,
    }


def layout_line(facts: Values) -> str:
    line = "{step_mb:.1f} MB of weights a step; {blas}, panels {panels}, processes {processes}, batch-invariant {exact}"
    return line.format(**facts)


def decode_entry(rows: int, rounds: Sequence[Sequence[float]], rates: Sequence[float], n_bytes: int) -> Values:
    """Return the figures of steps with `rows` rows, which read `n_bytes` each.

    Args:
        rounds: the seconds of each step of each round.
        rates: the bytes a second that as many processes read just before each round.
    """
    ms = summary([seconds for steps in rounds for seconds in steps], 1e3)
    shares = [n_bytes / median(steps) / rate for steps, rate in zip(rounds, rates, strict=True)]
    return {
        "rows": rows,
        "ms": ms,
        "tokens_per_s": rows / ms["median"] * 1e3,
        "gb_per_s": n_bytes / ms["median"] / 1e6,
        "share": summary(shares),
    }


def decode_table(entries: Sequence[Values]) -> str:
    line = "{rows}|{ms[median]:.2f}|{ms[q1]:.2f}-{ms[q3]:.2f}|{tokens_per_s:.0f}|{gb_per_s:.1f}|{share[median]:.0%}"
    headers = ["rows", "ms/step", "quartiles", "tokens/s", "GB/s", "of the bandwidth"]
    return table(headers, [line.format(**entry).split("|") for entry in entries])


def measure(engine: Engine) -> Values:
    """Measure memory, steps and a prompt in rounds, so that what slows the machine for a while slows all of them."""
    model, facts, timed = engine.decoder.model, machine(), Timed(engine, max(ROWS))
    n_bytes, prompt = step_bytes(engine.config, weight_bytes(model)), min(PROMPT, engine.config.n_positions)
    bandwidth: dict[int, list[float]] = {count: [] for count in sorted({1, model.size, facts["cores"]})}
    steps: dict[int, list[list[float]]] = {rows: [] for rows in ROWS}
    rates: dict[int, list[float]] = {rows: [] for rows in ROWS}
    prefill: list[float] = []
    enough = time.monotonic() + _ENOUGH_SECONDS
    with readers(max(bandwidth)) as read_rate:
        while len(prefill) < (_ROUNDS if time.monotonic() < enough else _FEWEST_ROUNDS):
            for count, found in bandwidth.items():
                found.append(read_rate(count))
            for rows in ROWS:
                rates[rows].append(read_rate(model.size))
                steps[rows].append(timed.decode(rows))
                let_helpers_sleep()
            prefill.append(timed.read(0, prompt))
            let_helpers_sleep()
    return {
        "model": engine.model,
        "machine": facts,
        "layout": layout(model),
        "bandwidth_gb_per_s": {str(count): summary(found, 1e-9) for count, found in bandwidth.items()},
        "decode": [decode_entry(rows, steps[rows], rates[rows], n_bytes) for rows in ROWS],
        "prefill": {"tokens": prompt, "ms": summary(prefill, 1e3), "tokens_per_s": prompt / median(prefill)},
    }


def report(result: Values) -> str:
    rates = [f"{count}: {rate['median']:.1f}" for count, rate in result["bandwidth_gb_per_s"].items()]
    prompt = "a prompt of {tokens} tokens: {ms[median]:.0f} ms, {tokens_per_s:.0f} tokens/s".format(**result["prefill"])
    lines = [
        machine_line(result["machine"]),
        f"{result['model']}: {layout_line(result['layout'])}",
        f"memory, GB/s by number of processes that read: {', '.join(rates)}",
        "",
        decode_table(result["decode"]),
        "",
        f"{prompt}; rows: sequences of {CONTEXT} tokens decoded together; medians of rounds in turn",
    ]
    if result["layout"]["step_mb"] < SMALL_MB:
        lines.append("so small a model may stay in the processor's caches: memory is no bound then")
    return "\n".join(lines)


def run(values: Values) -> int:
    """Run the command: load the model, measure, print a table or JSON."""
    from fastgpt2.engine.engine import Engine

    options = {name: values[name] for name in _LOAD_OPTIONS}
    result = measure(Engine.load(max_batch=max(ROWS), **options))
    print(json.dumps(result, indent=2) if values["json"] else report(result))
    return 0
