"""Weights as panels: a matrix [K, N] stored as [N / P, K, P], so that a product with a few rows reads them in place.

Plain GEMM copies the weights into buffers of its own before it multiplies. A product as small as one panel by a few
rows takes OpenBLAS's small-matrix kernel, which reads what lies there. The width P, and how many rows go at once, are
chosen by measurement, in `calibration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

# How weights may be stored: the dtype by safetensors' name and numpy's, which has none for bfloat16.
STORED: dict[str, tuple[str, type[np.generic]]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", np.uint16),
    "int8": ("I8", np.int8),
}

# int8 weights are a column's largest magnitude in so many steps, as many down as up.
LARGEST_INT8 = 127


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix of K rows as panels [n, 1, K, P]; columns beyond the matrix's own are zero.

    The axis of one is where `np.matmul` broadcasts chunks of rows.

    Attributes:
        array: float32, or the bits of bfloat16 as uint16, or int8.
        scales: of int8, what each column is to be multiplied with, [columns].
    """

    array: NDArray[Any]
    scales: Array | None = None

    @property
    def n_in(self) -> int:
        """K."""
        return int(self.array.shape[2])

    @property
    def width(self) -> int:
        """P."""
        return int(self.array.shape[3])

    @property
    def columns(self) -> int:
        """N, rounded up to whole panels."""
        return int(self.array.shape[0]) * self.width

    def share(self, rank: int, size: int) -> tuple[int, int]:
        """The first panel of one process among `size`, and the one after its last."""
        n = int(self.array.shape[0])
        return n * rank // size, n * (rank + 1) // size

    def column(self, index: int) -> Array:  # [K]
        """One column as float32: of a token table, the embedding of token `index`."""
        stored = self.array[index // self.width, 0, :, index % self.width]
        if stored.dtype == np.float32:
            return stored
        wide = widened(stored)
        return wide if self.scales is None else wide * self.scales[index]


def panel_count(n_out: int, width: int) -> int:
    """How many panels `n_out` columns fill."""
    return -(-n_out // width)


def to_panels(columns: NDArray[Any], width: int) -> NDArray[Any]:  # [K, N] -> [panel_count(N, width), K, width]
    """Copy columns into panels; the last panel is filled up with zeros."""
    n_in, n_out = columns.shape
    n = panel_count(n_out, width)
    panels = np.zeros((n, n_in, width), columns.dtype)
    whole = n_out // width
    panels[:whole] = columns[:, : whole * width].reshape(n_in, whole, width).transpose(1, 0, 2)
    if whole < n:
        panels[whole, :, : n_out - whole * width] = columns[:, whole * width :]
    return panels


def scales_of(columns: Array) -> Array:  # [K, N] -> [N]
    """What int8 weights are multiplied with: the largest magnitude of each column in `LARGEST_INT8` steps.

    Symmetric, a scale an output column, as LLM.int8() (Dettmers et al. 2022) has it for weights. Not finite where the
    column is not, so that what is computed from it is not either.
    """
    scales: Array = np.abs(columns).max(axis=0, initial=0.0) / np.float32(LARGEST_INT8)
    return scales


def stored_as(weights: str, columns: Array) -> NDArray[Any]:  # [K, N] -> [K, N]
    """float32 numbers as they are stored, each rounded to the nearest, of two as near to the even one."""
    if weights == "bfloat16":
        bits = columns.view(np.uint32)
        # A NaN's bits must not be carried over into its sign; of all its bits one in the upper half is enough.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        return np.where(np.isnan(columns), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
    if weights == "int8":
        scales = scales_of(columns)
        # Zeros stay zeros; what is not finite is told by the scale.
        divisor = np.where((scales > 0) & np.isfinite(scales), scales, np.float32(1.0))
        return np.rint(np.nan_to_num(columns, posinf=0.0, neginf=0.0) / divisor).clip(-127, 127).astype(np.int8)
    return columns


def widened(stored: NDArray[Any]) -> Array:
    """Stored numbers as float32; of int8 before they are scaled."""
    if stored.dtype == np.uint16:
        wide: Array = (stored.astype(np.uint32) << 16).view(np.float32)
        return wide
    return stored.astype(np.float32)
