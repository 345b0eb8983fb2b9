"""A kernel: a product of a few rows by panels of weights, and how many rows it may take at once.

Everything that the network computes is made of this one product. A row's result must have the same bits whatever rows
stand beside it; else a text would depend on the texts that happen to share its batch. A BLAS keeps to that for as long
as it takes one and the same code for every number of rows: OpenBLAS takes its small-matrix kernel up to 1e6
multiplications (`sgemm_small_kernel_permit_skylakex.c`). That bound is OpenBLAS's own affair and may change, so the
largest such number of rows is found by trying (`find_largest_exact_chunk`), and more rows go in chunks of that size.

Attention asks for more. Its probabilities are multiplied by as many values as the longest neighbour has, so that a
row's own are followed by zeros: these must not change a bit either. A BLAS cuts long sums into parts, and most choose
the parts by the length (`interface/level3.c` of OpenBLAS does so for all lengths above its GEMM_Q, 320 to 640). So rows
and lengths are tried together (`find_largest_exact_padded_chunk`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.figure import Figure
from fastgpt2.engine.kernels.openblas import NumpyProduct
from fastgpt2.engine.kernels.panels import Array
from fastgpt2.engine.machine import Measurements

# The most rows in a chunk. More gain nothing: the panel is in the second-level cache after the first.
MAX_CHUNK = 16

# Where fewer rows than this agree, they do by chance: it is how a kernel for larger products deals with the rows that
# are left over. AVX2's does so at three.
MIN_CHUNK = 4

# The zeros that follow the rows of a chunk where lengths are tried: few and many, odd and even.
_PADDINGS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)

# Lengths are tried up to this one by one: whatever a kernel does with those that are left over, it does there.
_ALL_LENGTHS = 9

# Longer lengths are tried at about this many, at steps that are odd, so that all remainders come up.
_LONG_LENGTHS = 12


class Product(Protocol):
    """What multiplies: a BLAS, or compiled code (`compiled.py`), which is called as an operation.

    Attributes:
        name: for logs, for the keys of measurements, and for `make_product` in another process.
        exact: a row has the same bits however many rows stand beside it, so that nothing has to be tried.
    """

    name: str
    exact: bool


@runtime_checkable
class BlasProduct(Product, Protocol):
    """Multiplies chunks of rows by panels, on the calling thread, with the GIL released."""

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        """Compute out[n, c] = x[0, c] @ panels[n, 0].

        Args:
            x: [1, C, m, K], C chunks of m rows.
            panels: [n, 1, K, P].
            out: [n, C, m, P], a strided view.

        All three must live as long as the product: it may remember their addresses.
        """


@dataclass(frozen=True, slots=True)
class RowChunks:
    """The equal chunks in which rows go through a product.

    Attributes:
        most: rows in a chunk at most; None for all rows in one chunk.
        least: a smaller chunk is filled up with rows that nobody looks at. One row alone would take BLAS's
            matrix-vector kernel, which rounds differently; two rows take the same kernel as more.
        exact: whether a row's bits do not depend on its neighbours.
    """

    most: int | None
    least: int
    exact: bool

    def split(self, rows: int) -> tuple[int, int]:
        """Return the number of chunks and the rows in each: together at least `rows`, and less than a chunk more."""
        if self.most is None or rows <= self.most:
            return 1, max(rows, self.least)
        # Kernels take rows by fours.
        chunks = -(-rows // (self.most - self.most % 4))
        return chunks, max(-(-rows // chunks), self.least)


class Kernel:
    """A product, with the number of rows that it takes at once for each shape of panel.

    Args:
        measurements: where exact chunks are looked up, and kept; None for this object only.
        exact_chunks: those of another process's kernel, so that both cut the same rows into the same chunks.
        compiled: whether everything between two products is compiled code.

    Attributes:
        exact_chunks: the rows in the largest exact chunk, by product and shape of panel, of all asked for so far.
    """

    def __init__(
        self,
        product: Product,
        measurements: Measurements | None = None,
        exact_chunks: dict[str, int] | None = None,
        compiled: bool = False,
    ) -> None:
        self.product, self.compiled = product, compiled
        self.exact_chunks = exact_chunks or {}
        self._measurements = measurements or Measurements(None, "")

    @property
    def blas(self) -> BlasProduct:
        """Return the product of a BLAS; raise TypeError if products are compiled."""
        if not isinstance(self.product, BlasProduct):
            raise TypeError(f"{self.product.name} has its calls made by CompiledOperations")
        return self.product

    def row_chunks(self, n_in: int, width: int) -> RowChunks:
        """Return the chunks for a product by panels of weights, n_in by width."""
        if self.product.exact:
            return RowChunks(None, 1, exact=True)
        return _chunks_of(self._largest_exact_chunk(self.blas, n_in, width))

    def attention_row_chunks(self, positions: int, head_dim: int, block: int) -> RowChunks:
        """Return the chunks for queries by keys and probabilities by values, always multiplied by numpy's own BLAS.

        Args:
            positions: the most that a sequence has, and probabilities in a row.
            block: the keys that queries are multiplied by at a time.
        """
        product = NumpyProduct()
        name = f"{product.name} exact {positions}x{head_dim} padded"
        padded = self._find(name, lambda: find_largest_exact_padded_chunk(product, positions, head_dim))
        return _chunks_of(min(padded, self._largest_exact_chunk(product, head_dim, block)))

    def _largest_exact_chunk(self, product: BlasProduct, n_in: int, width: int) -> int:
        name = f"{product.name} exact {n_in}x{width}"
        return self._find(name, lambda: find_largest_exact_chunk(product, n_in, width))

    def _find(self, name: str, measure: Callable[[], int]) -> int:
        if name not in self.exact_chunks:
            # Bits do not depend on what else the machine does.
            self.exact_chunks[name] = self._measurements.find_or_measure(name, lambda: Figure(measure(), spread=0.0))
        return self.exact_chunks[name]


def _chunks_of(most: int) -> RowChunks:
    return RowChunks(most, 2, exact=True) if most >= MIN_CHUNK else RowChunks(None, 1, exact=False)


def find_largest_exact_chunk(product: BlasProduct, n_in: int, width: int) -> int:
    """Return the most rows, up to `MAX_CHUNK`, that all have the bits that each has beside one other; 0 if none do."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((MAX_CHUNK + 1, n_in), np.float32)
    panel = rng.standard_normal((n_in, width), np.float32)
    pairs = np.stack([_multiply(product, x[i : i + 2], panel)[0] for i in range(MAX_CHUNK)])
    return _count_agreeing(product, x, panel, pairs, MAX_CHUNK)


def find_largest_exact_padded_chunk(product: BlasProduct, positions: int, width: int) -> int:
    """Return the same for rows of every length up to `positions`, followed by zeros; 0 if zeros change any row's bits.

    A row's bits are those that it has beside one other and without zeros.
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((positions, width), np.float32)
    probabilities = rng.random((MAX_CHUNK + 1, positions), np.float32)
    largest = MAX_CHUNK
    for length in _lengths_to_try(positions):
        own = [max(1, length - padding) for padding in _PADDINGS]
        x = probabilities.copy()
        for row, n in zip(x, own, strict=False):
            row[n:] = 0.0
        pairs = np.stack([_multiply(product, x[i : i + 2, :n], values[:n])[0] for i, n in enumerate(own)])
        padded = np.stack([_multiply(product, x[i : i + 2, :length], values[:length])[0] for i in range(len(own))])
        if not np.array_equal(padded, pairs):
            return 0
        largest = _count_agreeing(product, x[:, :length], values[:length], pairs, largest)
        if largest < MIN_CHUNK:
            return 0
    return largest


def _lengths_to_try(positions: int) -> list[int]:
    """Return lengths up to `positions`, the longest first: where anything depends on lengths, it shows there."""
    step = max(16, positions // _LONG_LENGTHS) | 1
    lengths = [*range(1, _ALL_LENGTHS), *range(_ALL_LENGTHS, positions, step), positions]
    return sorted({length for length in lengths if length <= positions}, reverse=True)


def _count_agreeing(product: BlasProduct, x: Array, panel: Array, expected: Array, most: int) -> int:
    """Return the most of the first rows that, multiplied together, all have the bits expected; 0 if two have not."""
    largest = 0
    for m in range(2, most + 1):
        if not np.array_equal(_multiply(product, x[:m], panel), expected[:m]):
            break
        largest = m
    return largest


def _multiply(product: BlasProduct, x: Array, panel: Array) -> Array:
    """Return x @ panel, of one chunk of rows and one panel."""
    out: Array = np.empty((len(x), panel.shape[1]), np.float32)
    product(x[None, None], panel[None, None], out[None, None])
    return out
