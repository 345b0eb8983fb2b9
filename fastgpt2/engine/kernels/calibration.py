"""The measuring of how fast this machine multiplies: which panel width, and which of two kernels.

Times are taken on panels that together are larger than a second-level cache, as a model's weights are, for the numbers
of rows that matter: a lone sequence, a batch, a prompt. `choice.py` decides by what is found here, once a machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter

import numpy as np

from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.panels import Array

log = logging.getLogger("fastgpt2.engine")

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
    times = _least_times(n_in, {width: (kernel, width or PLAIN_WIDTH) for width in (*WIDTHS, PLAIN)})
    best = [min(of_rows) for of_rows in zip(*times.values(), strict=True)]
    scores = {
        width: sum(seconds / least for seconds, least in zip(of_width, best, strict=True))
        for width, of_width in times.items()
    }
    log.debug("panels of %d rows: %s, in %.0f ms", n_in, scores, (perf_counter() - started) * 1e3)
    # The widest of those that are as good, so that two measurements give one layout.
    return next(width for width, score in scores.items() if score <= _AS_GOOD * min(scores.values()))


def is_worth_loading(n_in: int, usual: tuple[Kernel, int], other: tuple[Kernel, int]) -> bool:
    """Tell whether another kernel, with its panels' width, beats the usual one by enough to be worth loading."""
    times = _least_times(n_in, {0: usual, 1: other})
    relative = [of_other / of_usual for of_usual, of_other in zip(times[0], times[1], strict=True)]
    return sum(relative) / len(relative) < _WORTH_LOADING


def _least_times(n_in: int, kernels: dict[int, tuple[Kernel, int]]) -> dict[int, list[float]]:
    """Return the seconds of each kernel, with its panels' width, for each of `_ROWS_TRIED`.

    They are the least of several rounds in turn, since what disturbs a run only ever adds.
    """
    flat = np.full(_BYTES_TRIED // 4, 0.5, np.float32)
    runs = {key: [_prepare(*of, flat, n_in, rows) for rows in _ROWS_TRIED] for key, of in kernels.items()}
    times = {key: [float("inf")] * len(_ROWS_TRIED) for key in kernels}
    for _ in range(_ROUNDS):
        for key, of_kernel in runs.items():
            for i, run in enumerate(of_kernel):
                started = perf_counter()
                run()
                times[key][i] = min(times[key][i], perf_counter() - started)
    return times


def _prepare(kernel: Kernel, width: int, flat: Array, n_in: int, rows: int) -> Callable[[], None]:
    """Return a function that multiplies `rows` rows by all the panels that `flat` has room for, or by one."""
    n = max(1, flat.size // (n_in * width))
    size = n * n_in * width
    panels = (flat[:size] if size <= flat.size else np.resize(flat, size)).reshape(n, 1, n_in, width)
    chunks, m = kernel.row_chunks(n_in, width).split(rows)
    x = np.full((1, chunks, m, n_in), 0.5, np.float32)
    out = np.empty((chunks, m, n, width), np.float32).transpose(2, 0, 1, 3)
    return lambda: kernel.product(x, panels, out)
