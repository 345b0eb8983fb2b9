"""The measuring of how fast this machine multiplies: which panel width, and which of two kernels.

Times are taken on panels that together are larger than a second-level cache, as a model's weights are, for the numbers
of rows that matter: a lone sequence, a batch, a prompt. `choice.py` decides by what is found here, once a machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import Kernel

log = logging.getLogger("fastgpt2.engine")
Array = NDArray[np.float32]

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
_ROUNDS = 4

# Times within this factor differ by chance.
_AS_GOOD = 1.1

# MKL and LLVM take memory of their own and time to load: their times must be at most this share of the others'.
_WORTH_LOADING = 0.95


def measure_fastest_width(kernel: Kernel, n_in: int) -> int:
    """Return the fastest of `WIDTHS` and `PLAIN` for panels of `n_in` rows.

    A width's score is the sum, over `_ROWS_TRIED`, of its time relative to the best time.
    """
    started = perf_counter()
    flat = _numbers()
    choices = (*WIDTHS, PLAIN)
    times = _least_times(
        {
            (choice, rows): _prepare(kernel, flat, n_in, PLAIN_WIDTH if choice == PLAIN else choice, rows)
            for choice in choices
            for rows in _ROWS_TRIED
        }
    )
    best = {rows: min(times[choice, rows] for choice in choices) for rows in _ROWS_TRIED}
    scores = {choice: sum(times[choice, rows] / best[rows] for rows in _ROWS_TRIED) for choice in choices}
    log.debug("panels of %d rows: %s, in %.0f ms", n_in, scores, (perf_counter() - started) * 1e3)
    # The widest of those that are as good, so that two measurements give one layout.
    return next(choice for choice in choices if scores[choice] <= _AS_GOOD * min(scores.values()))


def is_worth_loading(n_in: int, usual: tuple[Kernel, int], other: tuple[Kernel, int]) -> bool:
    """Tell whether another kernel is so much faster than the usual one that it should be loaded.

    Args:
        n_in: rows of the panels.
        usual, other: each kernel, with the width of the panels that it multiplies.
    """
    flat = _numbers()
    times = _least_times(
        {
            (which, rows): _prepare(kernel, flat, n_in, width, rows)
            for which, (kernel, width) in enumerate((usual, other))
            for rows in _ROWS_TRIED
        }
    )
    relative = [times[1, rows] / times[0, rows] for rows in _ROWS_TRIED]
    return sum(relative) / len(relative) < _WORTH_LOADING


def _numbers() -> Array:
    """Return the weights that all runs read."""
    return np.full(_BYTES_TRIED // 4, 0.5, np.float32)


def _prepare(kernel: Kernel, flat: Array, n_in: int, width: int, rows: int) -> Callable[[], None]:
    """Return a function that multiplies `rows` rows by all the panels that `flat` has room for, or by one."""
    n = max(1, flat.size // (n_in * width))
    size = n * n_in * width
    panels = (flat[:size] if size <= flat.size else np.resize(flat, size)).reshape(n, 1, n_in, width)
    chunks, m = kernel.row_chunks(n_in, width).split(rows)
    x = np.full((1, chunks, m, n_in), 0.5, np.float32)
    out = np.empty((chunks, m, n, width), np.float32).transpose(2, 0, 1, 3)
    return lambda: kernel.product(x, panels, out)


def _least_times(runs: dict[tuple[int, int], Callable[[], None]]) -> dict[tuple[int, int], float]:
    """Return each run's seconds: the least of several rounds in turn, since what disturbs a run only ever adds."""
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(_ROUNDS):
        for key, run in runs.items():
            started = perf_counter()
            run()
            times[key] = min(times[key], perf_counter() - started)
    return times
