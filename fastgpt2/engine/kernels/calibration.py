"""The measuring of how fast this machine multiplies: which panel width, and which of two kernels.

Times are taken on panels that together are larger than a second-level cache, as a model's weights are, for the numbers
of rows that matter: a lone sequence, a batch, a prompt. `choice.py` decides by what is found here.

What disturbs a run only ever adds to its time. So of several runs the least time counts, and how far the middle one
lies above it tells how busy the machine was. What is compared is run in turn, so that a disturbance meets all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from time import perf_counter, thread_time
from typing import TypeVar

import numpy as np

from fastgpt2.engine.figure import TRUSTED_SPREAD, Figure
from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.panels import Array

log = logging.getLogger("fastgpt2.engine")
Key = TypeVar("Key")

# Widths of panels that are tried, beside PLAIN. 64 is the widest tile of OpenBLAS's small-matrix kernels.
WIDTHS = (64, 32, 16)

# The choice for a CPU whose BLAS has no small-matrix kernel: as few panels as there are cores, but none wider than
# PLAIN_WIDTH. It stands among the widths, and in the cache, as 0.
PLAIN = 0
PLAIN_WIDTH = 1024

# Rows by which choices are judged: a lone sequence, a batch, a prompt.
_ROWS_TRIED = (1, 8, 32)

# More than a second-level cache holds, and little enough to be read in milliseconds.
_BYTES_TRIED = 32 << 20

# Each piece of work is run this often: more often on a busy machine, less often where that takes longer.
_LEAST_ROUNDS, _ROUNDS, _MOST_ROUNDS, _MOST_SECONDS = 3, 5, 12, 2.0

# Times within this factor differ by chance.
_AS_GOOD = 1.1

# MKL and LLVM take memory of their own and time to load: their times must be at most this share of the others'.
_WORTH_LOADING = 0.95


class Runs:
    """The times of one piece of work that was run several times."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._least_cpu = float("inf")

    def add(self, work: Callable[[], object]) -> None:
        """Run the work once more."""
        began, cpu_began = perf_counter(), thread_time()
        work()
        self.seconds.append(perf_counter() - began)
        self._least_cpu = min(self._least_cpu, thread_time() - cpu_began)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Return by which part the middle run took longer than the shortest could have taken.

        That is the processor's time, without what the thread waited for a processor: where another program has every
        second slice of time, all runs take twice as long, and none lies apart from the others.
        """
        least = min(self.least, self._least_cpu)
        return median(self.seconds) / max(least, 1e-9) - 1


def run_in_turn(works: Mapping[Key, Callable[[], object]]) -> dict[Key, Runs]:
    """Run each piece of work several times, in turn, and more often while the machine is busy."""
    began, rounds = perf_counter(), 0
    runs = {key: Runs() for key in works}
    while rounds < _MOST_ROUNDS:
        for key, work in works.items():
            runs[key].add(work)
        rounds += 1
        is_calm = rounds >= _ROUNDS and spread_of(runs.values()) <= TRUSTED_SPREAD
        if is_calm or (rounds >= _LEAST_ROUNDS and perf_counter() - began > _MOST_SECONDS):
            break
    return runs


def spread_of(runs: Iterable[Runs]) -> float:
    """Return the spread of what is found by comparing runs: the middle one of theirs."""
    return median(each.spread for each in runs)


def measure_fastest_width(kernel: Kernel, n_in: int) -> Figure:
    """Return the fastest of `WIDTHS` and `PLAIN` for panels of `n_in` rows.

    A width's score is the sum, over `_ROWS_TRIED`, of its time relative to the best time.
    """
    started = perf_counter()
    choices = (*WIDTHS, PLAIN)
    times, spread, rounds = _measure({width: (kernel, width or PLAIN_WIDTH) for width in choices}, n_in)
    best = [min(times[width][i] for width in choices) for i in range(len(_ROWS_TRIED))]
    scores = {width: sum(t / least for t, least in zip(times[width], best, strict=True)) for width in choices}
    log.debug("panels of %d rows: %s, in %.0f ms", n_in, scores, (perf_counter() - started) * 1e3)
    # The widest of those that are as good, so that two measurements give one layout.
    fastest = next(width for width in choices if scores[width] <= _AS_GOOD * min(scores.values()))
    return Figure(fastest, spread, rounds)


def is_worth_loading(n_in: int, usual: tuple[Kernel, int], other: tuple[Kernel, int]) -> Figure:
    """Return 1 if another kernel, with its panels' width, beats the usual one by enough to be worth loading, else 0."""
    times, spread, rounds = _measure({0: usual, 1: other}, n_in)
    relative = [of_other / of_usual for of_usual, of_other in zip(times[0], times[1], strict=True)]
    return Figure(sum(relative) / len(relative) < _WORTH_LOADING, spread, rounds)


def _measure(kernels: Mapping[int, tuple[Kernel, int]], n_in: int) -> tuple[dict[int, list[float]], float, int]:
    """Return the least seconds of each kernel, with its panels' width, for each of `_ROWS_TRIED`.

    The numbers beside them are the spread of all, and how often each was run.
    """
    flat = np.full(_BYTES_TRIED // 4, 0.5, np.float32)
    works = {(key, rows): _prepare(*of, flat, n_in, rows) for key, of in kernels.items() for rows in _ROWS_TRIED}
    runs = run_in_turn(works)
    times = {key: [runs[key, rows].least for rows in _ROWS_TRIED] for key in kernels}
    return times, spread_of(runs.values()), len(next(iter(runs.values())).seconds)


def _prepare(kernel: Kernel, width: int, flat: Array, n_in: int, rows: int) -> Callable[[], None]:
    """Return a function that multiplies `rows` rows by all the panels that `flat` has room for, or by one."""
    n = max(1, flat.size // (n_in * width))
    size = n * n_in * width
    panels = (flat[:size] if size <= flat.size else np.resize(flat, size)).reshape(n, 1, n_in, width)
    chunks, m = kernel.row_chunks(n_in, width).split(rows)
    x = np.full((1, chunks, m, n_in), 0.5, np.float32)
    out = np.empty((chunks, m, n, width), np.float32).transpose(2, 0, 1, 3)
    return lambda: kernel.blas(x, panels, out)
