"""Weights as panels: a matrix [K, N] stored as [N / P, K, P], so that a product with a few rows reads them in place.

Plain GEMM copies the weights into buffers of its own before it multiplies. A product as small as one panel by a few
rows takes OpenBLAS's small-matrix kernel, which reads what lies there. The width P, and how many rows go at once, are
chosen by measurement, in `calibration.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix of K rows as panels [n, 1, K, P]; columns beyond the matrix's own are zero.

    The axis of one is where `np.matmul` broadcasts chunks of rows.
    """

    array: Array

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
        """One column, as a strided view: of a token table, the embedding of token `index`."""
        return self.array[index // self.width, 0, :, index % self.width]


def panel_count(n_out: int, width: int) -> int:
    """How many panels `n_out` columns fill."""
    return -(-n_out // width)


def to_panels(columns: Array, width: int) -> Array:  # [K, N] -> [panel_count(N, width), K, width]
    """Copy columns into panels; the last panel is filled up with zeros."""
    n_in, n_out = columns.shape
    n = panel_count(n_out, width)
    panels = np.zeros((n, n_in, width), np.float32)
    whole = n_out // width
    panels[:whole] = columns[:, : whole * width].reshape(n_in, whole, width).transpose(1, 0, 2)
    if whole < n:
        panels[whole, :, : n_out - whole * width] = columns[:, whole * width :]
    return panels
