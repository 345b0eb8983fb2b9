"""Weights as panels: a matrix [K, N] stored as [N / P, K, P], so that a product with a few rows reads it in place.

A plain matrix product (GEMM) first copies the weights into buffers of its own. The product of one panel and a few rows
is so small that OpenBLAS takes its small-matrix kernel for it, and that reads the weights where they lie. Which width P
is the fastest here, and how many rows go at once, is measured (`calibration.py`, `kernel.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# The width P of panels for compiled code: a line of such a panel is one cache line, one to four registers. Weights of
# all kinds have a word of 32 bits in it for each column: one float32, two bfloat16 or four int8, of as many k.
COMPILED_WIDTH = 16
LINE_BYTES = 64

# An int8 weight is a whole number of steps from zero: the column's largest magnitude is this many steps, up or down.
LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True)
class StoredType:
    """The type in which weights of one kind are stored, under the name that each library has for it.

    Attributes:
        numpy: of an array. NumPy has no bfloat16: its bits are a uint16.
    """

    safetensors: str
    numpy: np.dtype[Any]

    @property
    def per_word(self) -> int:
        """Return how many numbers a word of 32 bits holds."""
        return 4 // self.numpy.itemsize


# By the names that the option `weights` takes.
STORED_TYPES = {
    "float32": StoredType("F32", np.dtype(np.float32)),
    "bfloat16": StoredType("BF16", np.dtype(np.uint16)),
    "int8": StoredType("I8", np.dtype(np.int8)),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to store a model's matrices: how wide their panels are, and which kind of weights they hold.

    Attributes:
        name: part of a packed file's name; two layouts of one name are the same.
        width: the width of the panels of a matrix, from its numbers of rows (K) and of columns (N).
        weights: one of `STORED_TYPES`.
    """

    name: str
    width: Callable[[int, int], int]
    weights: str = "float32"


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix of K rows and N columns as panels; the columns beyond the matrix's own are zero.

    Attributes:
        array: [n, 1, K, P] of float32, or of compact weights [n, 1, lines, P * per_word] (`to_lines`). The axis of
            length 1 is where `np.matmul` broadcasts chunks of rows.
        n_in: K.
        scales: for int8, the factor by which each column is to be multiplied, [columns].
    """

    array: NDArray[Any]
    n_in: int
    scales: Array | None = None

    @property
    def per_word(self) -> int:
        return 4 // self.array.itemsize

    @property
    def width(self) -> int:  # P
        return int(self.array.shape[3]) // self.per_word

    @property
    def columns(self) -> int:  # N, rounded up to whole panels
        return int(self.array.shape[0]) * self.width

    def share(self, rank: int, size: int) -> Panels:
        """Return the panels of process `rank` of `size` processes."""
        first, last = self.share_of_columns(rank, size)
        array = self.array[first // self.width : last // self.width]
        return Panels(array, self.n_in, None if self.scales is None else self.scales[first:last])

    def share_of_columns(self, rank: int, size: int) -> tuple[int, int]:
        """Return the first column of process `rank` of `size` processes, and the one after its last."""
        n = int(self.array.shape[0])
        return n * rank // size * self.width, n * (rank + 1) // size * self.width

    def column(self, index: int) -> Array:  # [K]
        """Return one column as float32. In a token table, that is the embedding of token `index`."""
        at = index % self.width * self.per_word
        stored = self.array[index // self.width, 0, :, at : at + self.per_word].reshape(-1)[: self.n_in]
        if stored.dtype == np.float32:
            return stored
        wide = widen(stored)
        return wide if self.scales is None else wide * self.scales[index]


def panel_count(n_out: int, width: int) -> int:
    """Return how many panels `n_out` columns fill; the last one may be filled in part."""
    return -(-n_out // width)


def to_panels(columns: NDArray[Any], width: int) -> NDArray[Any]:  # [K, N] -> [panel_count(N, width), K, width]
    """Copy columns into panels. Zeros fill up the last panel."""
    n_in, n_out = columns.shape
    n = panel_count(n_out, width)
    panels = np.zeros((n, n_in, width), columns.dtype)
    whole = n_out // width
    panels[:whole] = columns[:, : whole * width].reshape(n_in, whole, width).transpose(1, 0, 2)
    if whole < n:
        panels[whole, :, : n_out - whole * width] = columns[:, whole * width :]
    return panels


def to_lines(panels: NDArray[Any]) -> NDArray[Any]:  # [n, K, P] -> [n, lines, P * per_word]
    """Put numbers of compact weights that follow each other in a column side by side, in one word of 32 bits.

    The last word of a column is filled up with zeros.
    """
    n, n_in, width = panels.shape
    per_word = 4 // panels.itemsize
    lines = -(-n_in // per_word)
    whole = np.zeros((n, lines * per_word, width), panels.dtype)
    whole[:, :n_in] = panels
    return whole.reshape(n, lines, per_word, width).swapaxes(2, 3).reshape(n, lines, width * per_word)


def compute_scales(columns: Array) -> Array:  # [K, N] -> [N]
    """Return the size of one int8 step in each column: its largest magnitude, divided by `LARGEST_INT8`.

    Scales are symmetric and there is one per output column, as LLM.int8() (Dettmers et al. 2022) has it for weights. A
    scale is not finite where its column is not, so that what is computed with it is not finite either.
    """
    return np.asarray(np.abs(columns).max(axis=0, initial=0.0) / np.float32(LARGEST_INT8))


def narrow(weights: str, columns: Array) -> NDArray[Any]:  # [K, N] -> [K, N]
    """Convert float32 numbers to the stored type of `weights`, rounding each to the nearest, and ties to even."""
    if weights == "bfloat16":
        bits = columns.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        # Rounding could carry the bits of a NaN into its sign. One bit set in the upper half keeps it a NaN.
        return np.where(np.isnan(columns), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
    if weights == "int8":
        scales = compute_scales(columns)
        # Columns of zeros stay zeros. In a column that is not finite, the scale says so.
        divisor = np.where((scales > 0) & np.isfinite(scales), scales, np.float32(1.0))
        steps = np.rint(np.nan_to_num(columns, posinf=0.0, neginf=0.0) / divisor)
        return steps.clip(-LARGEST_INT8, LARGEST_INT8).astype(np.int8)
    return columns


def widen(stored: NDArray[Any]) -> Array:
    """Convert stored numbers to float32; int8 to the whole numbers that it holds, which are still to be scaled."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored.astype(np.float32)
