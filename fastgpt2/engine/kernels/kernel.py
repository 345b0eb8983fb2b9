"""The one product that everything is made of: a few rows by panels of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.openblas import NumpyProduct
from fastgpt2.engine.machine import Calibration

Array = NDArray[np.float32]


class Product(Protocol):
    """Multiplies chunks of rows by panels, on the calling thread, with the GIL released."""

    name: str

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        """out[n, c] = x[0, c] @ panels[n, 0]; x [1, C, m, K], panels [n, 1, K, P], out [n, C, m, P], a strided view.

        Panels of int8 are multiplied as the whole numbers that they hold.

        The three arrays must be long-lived: a product may remember their addresses.
        """


class Calls:
    """What a foreign function is called with, worked out once for each three arrays.

    They are the same for as long as a batch keeps its size; beyond so many, it begins anew.
    """

    def __init__(self, arguments: Callable[[Array, NDArray[Any], Array], tuple[Any, ...]], most: int = 4096) -> None:
        self._arguments, self._most = arguments, most
        # The arrays are kept beside the arguments, so that no other array can come to have their ids.
        self._known: dict[tuple[int, int, int], tuple[Any, ...]] = {}

    def arguments(self, x: Array, panels: NDArray[Any], out: Array) -> tuple[Any, ...]:
        key = (id(x), id(panels), id(out))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= self._most:
                self._known.clear()
            known = self._known[key] = (self._arguments(x, panels, out), x, panels, out)
        found: tuple[Any, ...] = known[0]
        return found


# NOTE engine.rows: How many rows the kernel takes at once.


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


# The most rows in a chunk. More gain nothing: the panel is in the second-level cache after the first.
MAX_CHUNK = 16

# Fewer that agree are a chance of how a kernel for larger products deals with what is left over: AVX2's does at three.
MIN_CHUNK = 4


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

    def attention_chunking(self, positions: int, head_dim: int, block: int) -> Chunking:
        """For queries by blocks of keys, and probabilities by values; always by numpy's own BLAS."""
        shapes = ((head_dim, block), (positions, head_dim))
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
