"""How many rows the kernel takes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunking:
    """Rows go in equal chunks.

    Attributes:
        most: rows in a chunk; None for all at once.
        least: a smaller chunk is filled up with rows that nobody looks at. One row alone would take BLAS's
            matrix-vector kernel, which rounds differently; two take the same as many.
        exact: whether a row's bits do not depend on its neighbours.
    """

    most: int | None
    least: int
    exact: bool

    def of(self, rows: int) -> tuple[int, int]:
        """Number of chunks, and rows in each; together at least `rows`, and fewer than a chunk more."""
        if self.most is None or rows <= self.most:
            return 1, max(rows, self.least)
        # Kernels take rows by fours.
        chunks = -(-rows // (self.most - self.most % 4))
        return chunks, max(-(-rows // chunks), self.least)
