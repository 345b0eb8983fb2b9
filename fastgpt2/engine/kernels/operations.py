"""The operations of a forward step, in NumPy: embeddings, norms, products, activations, attention.

Each method takes the arrays that an operation reads and writes, and returns a call that does it, on whatever they hold
then; a step is a list of such calls (`program.py`). `compiled.py` has the compiled form of each under the same name,
and the network does not know which of the two it calls. NumPy's form is the reference, and what runs without llvmlite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.activation import ACTIVATIONS
from fastgpt2.engine.kernels.attention import BLOCK, AttentionArrays, NewTokens, NumpyAttention
from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.layer_norm import layer_norm
from fastgpt2.engine.kernels.panels import Array, Panels
from fastgpt2.engine.kernels.program import Call, Meeting

# Rows that several functions pass over are taken in parts of this many numbers, with as many of scratch: both stay in
# the second-level cache.
IN_CACHE = 1 << 15

# Views are kept for at most this many different numbers of rows.
_MOST_PREPARED = 64

Integers = NDArray[np.int64]
Rows = NDArray[np.int64]


class LinearShare(NamedTuple):
    """One process's share of a linear layer: some panels of columns.

    Attributes:
        bias: [columns of the share], or None.
        first: the first column, in the layer.
    """

    panels: Panels
    bias: Array | None
    first: int

    def columns(self) -> slice:
        return slice(self.first, self.first + self.panels.columns)


class Attention(Protocol):
    """The attention of some heads of every layer.

    Attributes:
        exact: whether a sequence's result has the same bits whatever else is attended, and however it is cut.
    """

    exact: bool

    def prepare(self, tokens: Sequence[NewTokens]) -> None:
        """Lay out a step; the calls of the layers then attend it."""

    def call(self, layer: int) -> Call:
        """Return the call that appends the step's keys and values of a layer to the cache, and attends its queries."""


class Operations:
    """The operations on up to some number of rows, in NumPy.

    Where a method takes `rows`, that is an array of one integer: how many of the first rows of the other arrays the
    call is for, as that stands there when it is made.

    Args:
        kernel: multiplies.
        activation: the name of the inner layer's activation function.
        epsilon: of layer norms.
        most_rows: that arrays have, those included that fill up a last chunk.
    """

    def __init__(self, kernel: Kernel, activation: str, epsilon: float, most_rows: int) -> None:
        self._kernel, self._activation, self._epsilon = kernel, activation, epsilon
        self._scale = np.zeros((most_rows, 1), np.float32)
        self._scratch = np.zeros(IN_CACHE, np.float32)

    def is_exact(self, layers: Sequence[Panels]) -> bool:
        """Tell whether the products by these weights give a row the same bits whatever rows stand beside it."""
        return all(self._kernel.row_chunks(panels.n_in, panels.width).exact for panels in layers)

    def embed(
        self, table: Panels | Array, wpe: Array, ids: Integers, positions: Integers, x: Array, rows: Rows
    ) -> Call:
        """Set each row r of x, [.., n_embd], to the embedding of ids[r] and of positions[r].

        Args:
            table: [vocab_size, n_embd], or the panels of its transpose.
        """

        def embed() -> None:
            n = int(rows[0])
            if isinstance(table, Panels):
                for row in range(n):
                    x[row] = table.column(ids[row])
            else:
                np.take(table, ids[:n], axis=0, out=x[:n], mode="clip")
            x[:n] += wpe[positions[:n]]

        return embed

    def layer_norm(self, x: Array, added: Array | None, weight: Array, bias: Array, out: Array, rows: Rows) -> Call:
        """Add to the rows of x what `added` has, if it is given, and set out to their layer norm; all [.., n_embd]."""
        epsilon, columns = np.float32(self._epsilon), x.shape[1]

        def prepare(n: int) -> Call:
            parts = [(x[part], out[part], self._scale[part]) for part in _parts_in_cache(n, columns)]
            total, more = x[:n], None if added is None else added[:n, :columns]

            def add_and_normalize() -> None:
                if more is not None:
                    np.add(total, more, out=total)
                for part, normed, scale in parts:
                    layer_norm(part, weight, bias, epsilon, normed, scale)

            return add_and_normalize

        return ByRows(rows, prepare)

    def linear(
        self,
        x: Array,
        share: LinearShare,
        out: Array,
        rows: Rows,
        then: LinearShare | None = None,  # noqa: ARG002  (a BLAS asks for nothing ahead)
    ) -> Call:
        """Set the share's columns of `out` to rows of x @ weight + bias. Further rows may be read and written.

        Args:
            then: what is multiplied next, whose weights are asked for meanwhile.
        """
        panels, product, bias = share.panels, self._kernel.blas, share.bias
        row_chunks = self._kernel.row_chunks(panels.n_in, panels.width)

        def prepare(n: int) -> Call:
            chunks, m = row_chunks.split(n)
            rows_in_chunks = x[: chunks * m].reshape(chunks, m, x.shape[1])[None, :, :, : panels.n_in]
            own = out[: chunks * m, share.columns()]
            out_in_chunks, result = _split_columns(own, chunks, m, panels.width), own[:n]

            def multiply_and_add() -> None:
                product(rows_in_chunks, panels.array, out_in_chunks)
                if bias is not None:
                    np.add(result, bias, out=result)

            return multiply_and_add

        return ByRows(rows, prepare)

    def activation(self, x: Array, rows: Rows) -> Call:
        """Apply the activation function to rows of x, in place."""
        function, columns = ACTIVATIONS[self._activation], x.shape[1]
        if self._scratch.size < columns:
            self._scratch = np.zeros(columns, np.float32)

        def prepare(n: int) -> Call:
            parts = [x[part] for part in _parts_in_cache(n, columns)]
            pairs = [(part, self._scratch[: part.size].reshape(part.shape)) for part in parts]

            def activate() -> None:
                for part, scratch in pairs:
                    function(part, scratch)

            return activate

        return ByRows(rows, prepare)

    def attention(self, arrays: AttentionArrays, heads: tuple[int, int]) -> Attention:
        """Return the attention of some heads: the first one, and the one after the last."""
        return NumpyAttention(arrays, heads, self._kernel.attention_row_chunks(arrays.positions, arrays.dim, BLOCK))

    def meet(self, meeting: Meeting) -> Call:
        """Return the call that waits for the other processes."""
        return meeting.wait


class ByRows:
    """A call whose views are made once for each number of rows.

    Args:
        rows: where that number stands.
        prepare: makes the views, and returns the call for N rows.
    """

    def __init__(self, rows: Rows, prepare: Callable[[int], Call]) -> None:
        self._rows, self._prepare = rows, prepare
        self._prepared: dict[int, Call] = {}

    def __call__(self) -> None:
        n = int(self._rows[0])
        call = self._prepared.get(n)
        if call is None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            call = self._prepared[n] = self._prepare(n)
        call()


def _split_columns(out: Array, chunks: int, m: int, width: int) -> Array:  # [C * m, n * P] -> [n, C, m, P]
    row, column = out.strides
    shape, strides = (out.shape[1] // width, chunks, m, width), (width * column, m * row, row, column)
    view: Array = np.lib.stride_tricks.as_strided(out, shape, strides)
    return view


def _parts_in_cache(rows: int, columns: int) -> list[slice]:
    """Cut rows into parts that stay in the cache while several functions pass over them."""
    step = max(1, IN_CACHE // max(1, columns))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
