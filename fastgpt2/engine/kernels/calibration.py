"""How this machine multiplies best: panel widths, rows at once, and which BLAS. Measured once, kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import MAX_CHUNK, Kernel
from fastgpt2.engine.machine import Calibration

log = logging.getLogger("fastgpt2.engine")
Array = NDArray[np.float32]

# Widths of panels that are tried, beside PLAIN. 64 is the widest tile of OpenBLAS's small-matrix kernels.
WIDTHS = (64, 32, 16)

# The choice of a CPU whose BLAS has no small-matrix kernel: as few panels as there are cores, but none wider than that.
PLAIN = 0
PLAIN_WIDTH = 1024

# What choices are judged by: a lone sequence, a batch, a prompt.
_ROWS_TRIED = (1, 8, 32)

# More than a second-level cache holds, and little enough to be read in milliseconds.
_BYTES_TRIED = 32 << 20
_REPEATS = 4

# Times within this factor differ by chance.
_AS_GOOD = 1.1

# MKL and LLVM take memory of their own and time to load: they have to win by so much.
_WORTH_LOADING = 0.95


def plain_width(n_out: int, parts: int) -> int:
    """The width of the panels of one matrix under PLAIN, for so many processes to share them evenly."""
    n = parts * -(-n_out // (parts * PLAIN_WIDTH))
    return -(-n_out // (n * 16)) * 16


def likely_width(kernel: Kernel, n_in: int) -> int:
    """Without a clock, for models too small to matter: the widest panels that take eight rows at once."""
    for width in WIDTHS:
        most = kernel.chunking(n_in, width).most
        if most is not None and most >= MAX_CHUNK // 2:
            return width
    return PLAIN


def fastest_width(kernel: Kernel, n_in: int) -> int:
    """One of WIDTHS or PLAIN, by the clock: the least sum of times relative to the best for each number of rows."""
    started = perf_counter()
    flat = np.full(_BYTES_TRIED // 4, 0.5, np.float32)
    choices = (*WIDTHS, PLAIN)
    runs = {
        (choice, rows): _stream(kernel, flat, n_in, choice or PLAIN_WIDTH, rows)
        for choice in choices
        for rows in _ROWS_TRIED
    }
    times = _least_times(runs)
    best = {rows: min(times[choice, rows] for choice in choices) for rows in _ROWS_TRIED}
    scores = {choice: sum(times[choice, rows] / best[rows] for rows in _ROWS_TRIED) for choice in choices}
    log.debug("panels of %d rows: %s, in %.0f ms", n_in, scores, (perf_counter() - started) * 1e3)
    # The widest of those that are as good, so that two measurements give one layout.
    return next(choice for choice in choices if scores[choice] <= _AS_GOOD * min(scores.values()))


def faster(default: Kernel, other: Kernel, n_in: int, width: int, others_width: int) -> bool:
    """Whether the other one is worth loading, for panels of so many rows, each kernel with its own width of them."""
    flat = np.full(_BYTES_TRIED // 4, 0.5, np.float32)
    runs = {
        (which, rows): _stream(kernel, flat, n_in, panel_width, rows)
        for which, (kernel, panel_width) in enumerate(((default, width), (other, others_width)))
        for rows in _ROWS_TRIED
    }
    times = _least_times(runs)
    relative = [times[1, rows] / times[0, rows] for rows in _ROWS_TRIED]
    return sum(relative) / len(relative) < _WORTH_LOADING


def _stream(kernel: Kernel, flat: Array, n_in: int, width: int, rows: int) -> Callable[[], None]:
    """So many rows times all the panels that `flat` has room for."""
    n = max(1, flat.size // (n_in * width))
    panels = np.resize(flat, n * n_in * width).reshape(n, 1, n_in, width) if flat.size < n * n_in * width else None
    if panels is None:
        panels = flat[: n * n_in * width].reshape(n, 1, n_in, width)
    chunks, m = kernel.chunking(n_in, width).of(rows)
    x = np.full((1, chunks, m, n_in), 0.5, np.float32)
    out = np.empty((chunks, m, n, width), np.float32).transpose(2, 0, 1, 3)
    return lambda: kernel.product(x, panels, out)


def _least_times(runs: dict[tuple[int, int], Callable[[], None]]) -> dict[tuple[int, int], float]:
    """Seconds, the least of some rounds in turn: what disturbs only ever adds."""
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(_REPEATS):
        for key, run in runs.items():
            started = perf_counter()
            run()
            times[key] = min(times[key], perf_counter() - started)
    return times


def choose_width(kernel: Kernel, calibration: Calibration, n_in: int, timed: bool) -> int:
    """The choice for matrices of n_in rows, one of WIDTHS or PLAIN."""
    if not timed:
        return likely_width(kernel, n_in)
    return calibration.get(f"width {n_in}", lambda: fastest_width(kernel, n_in))


def width_of(choice: int, n_out: int, parts: int) -> int:
    """What a choice comes to for a matrix of n_out columns."""
    return choice or plain_width(n_out, parts)
