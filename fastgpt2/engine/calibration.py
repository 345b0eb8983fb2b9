"""How this machine multiplies best: panel widths, rows at once, and which BLAS. Measured once, kept in the cache."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kv_cache import BLOCK
from fastgpt2.engine.products import NumpyProduct, Product
from fastgpt2.engine.rows import Chunking

log = logging.getLogger("fastgpt2.engine")

Array = NDArray[np.float32]

FILE = "calibration.json"
# Widths of panels that are tried, beside PLAIN. 64 is the widest tile of OpenBLAS's small-matrix kernels.
WIDTHS = (64, 32, 16)
# The choice of a CPU whose BLAS has no small-matrix kernel: as few panels as there are cores, but none wider than that.
PLAIN = 0
PLAIN_WIDTH = 1024
# The most rows in a chunk. More gain nothing: the panel is in the second-level cache after the first.
MAX_CHUNK = 16
# Fewer that agree are a chance of how a kernel for larger products deals with what is left over: AVX2's does at three.
MIN_CHUNK = 4
# What choices are judged by: a lone sequence, a batch, a prompt.
_ROWS_TRIED = (1, 8, 32)
# More than a second-level cache holds, and little enough to be read in milliseconds.
_BYTES_TRIED = 32 << 20
_REPEATS = 4
# Times within this factor differ by chance.
_AS_GOOD = 1.1
# MKL and LLVM take memory of their own and time to load: they have to win by so much.
_WORTH_LOADING = 0.95


class Calibration:
    """What was measured for one BLAS on one CPU."""

    def __init__(self, folder: Path | None, key: str) -> None:
        """
        Args:
            folder: where it is kept; None, or one that cannot be written, keeps it in this process.
            key: of the BLAS and the CPU: for another, everything is measured anew.
        """
        self._path = folder / FILE if folder is not None else None
        self._key = key
        self._known: dict[str, Any] = self._read().get(key, {})

    def known(self, name: str) -> int | None:
        """What has been measured under a name."""
        value = self._known.get(name)
        return value if isinstance(value, int) else None

    def get(self, name: str, measure: Callable[[], int]) -> int:
        """What is known under a name, or else what `measure` finds."""
        value = self.known(name)
        if value is not None:
            return value
        found = self._known[name] = measure()
        self._write()
        return found

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text("utf-8")) if self._path is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(known, dict) or not isinstance(known.get(self._key, {}), dict):
            return {}
        return known

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may measure at once; what one of them writes last is as right as the other's.
            known = self._read()
            known[self._key] = {**known.get(self._key, {}), **self._known}
            temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
            temporary.replace(self._path)
        except OSError as reason:
            log.debug("%s: not kept (%s)", self._path, reason)
            with contextlib.suppress(OSError):
                temporary.unlink()


class Kernel:
    """A product, and how many rows it takes at once."""

    def __init__(self, product: Product, calibration: Calibration | None, known: dict[str, int] | None = None) -> None:
        """
        Args:
            calibration: where to look, and to keep, how many rows go at once.
            known: the same from another process's `known()`.
        """
        self.product = product
        self._calibration = calibration or Calibration(None, "")
        self._known = dict(known or {})

    def known(self) -> dict[str, int]:
        """The largest exact chunk, by shape of panel, of all that was asked for so far."""
        return dict(self._known)

    def chunking(self, n_in: int, width: int) -> Chunking:
        """For panels of weights, n_in by width."""
        if self.product.name.startswith("compiled-"):
            return Chunking(None, 1, exact=True)
        return _chunking(self._most(self.product, n_in, width))

    def attention_chunking(self, positions: int, head_dim: int) -> Chunking:
        """For queries by blocks of keys, and probabilities by values; always by numpy's own BLAS."""
        shapes = ((head_dim, BLOCK), (positions, head_dim))
        return _chunking(min(self._most(NumpyProduct(), *shape) for shape in shapes))

    def _most(self, product: Product, n_in: int, width: int) -> int:
        name = f"{product.name} exact {n_in}x{width}"
        if name not in self._known:
            self._known[name] = self._calibration.get(name, lambda: largest_exact_chunk(product, n_in, width))
        return self._known[name]


def _chunking(most: int) -> Chunking:
    return Chunking(most, 2, exact=True) if most >= MIN_CHUNK else Chunking(None, 1, exact=False)


def largest_exact_chunk(product: Product, n_in: int, width: int) -> int:
    """The most rows, up to `MAX_CHUNK`, for which each has the bits that it has beside one other; 0 if not even two.

    That is so as long as BLAS takes the same kernel for all of them: OpenBLAS's small-matrix kernel up to 1e6
    multiplications (`sgemm_small_kernel_permit_skylakex.c`). Found by looking, as the bound is OpenBLAS's own affair.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, MAX_CHUNK + 1, n_in), np.float32)
    panel = rng.standard_normal((1, 1, n_in, width), np.float32)

    def rows(first: int, last: int) -> Array:
        out: Array = np.empty((1, 1, last - first, width), np.float32)
        product(x[:, :, first:last], panel, out)
        return out.reshape(last - first, width)

    pairs = np.stack([rows(i, i + 2)[0] for i in range(MAX_CHUNK)])
    largest = 0
    for m in range(2, MAX_CHUNK + 1):
        if not np.array_equal(rows(0, m), pairs[:m]):
            break
        largest = m
    return largest


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
