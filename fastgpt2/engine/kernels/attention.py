"""Causal attention of a step over the KV cache, for one process's share of the heads: what it reads, and NumPy's form.

Every product is taken as those of the weights are: queries in chunks of rows by blocks of keys, and probabilities by
values. A probability of zero adds nothing, so a row's result does not depend on how far its neighbours reach, if the
BLAS sums in one order whatever the sizes are. For the same reason the sums of probabilities are taken a block at a
time: a block of zeros adds nothing. The compiled form is in `attention_compiled.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import RowChunks
from fastgpt2.engine.kernels.panels import Array
from fastgpt2.engine.kernels.program import Call

# Positions in a block of keys, the width of a panel in the product of queries and keys. Wider blocks are faster in a
# long sequence; in a short one they read more that is not filled yet.
BLOCK = 32

# A sequence is read at most this many positions beyond its own by NumPy's form, where a longer neighbour is attended
# with it. In memory that processes share, reading commits as writing does.
MOST_PADDING = 2 * BLOCK

# Scores held at a time, in floats: a megabyte, so that they stay in the cache between the passes over them.
SCORES = 1 << 18

# Rows of a prompt attended at a time. Their scores reach as far as the last of them sees; more rows waste more.
PROMPT_ROWS = 60

# Attending two neighbours together pads the shorter one. Up to about this many positions that is cheaper than another
# round of calls: a position costs 6 KB of reading a layer in gpt2, a round of calls 10 to 15 microseconds.
MOST_ADDED_PADDING = 40


class NewTokens(NamedTuple):
    """Tokens of one sequence that a step runs: the slot, the first one's position, its row in the step, how many."""

    slot: int
    start: int
    row: int
    length: int


class AttentionArrays(NamedTuple):
    """What attention reads and writes.

    Attributes:
        qkv: [rows, at least 3 n_embd], contiguous, what c_attn gives; NumPy's form scales the queries in place.
        out: [rows, at least n_embd], written for some heads.
        keys, values: as `KVCache` has them.
        scales: of the scores, one for each layer.
    """

    qkv: Array
    out: Array
    keys: Array
    values: Array
    scales: Sequence[float]

    @property
    def n_layer(self) -> int:
        return int(self.keys.shape[1])

    @property
    def n_head(self) -> int:
        return int(self.values.shape[2])

    @property
    def positions(self) -> int:  # of a slot, a multiple of BLOCK
        return int(self.values.shape[3])

    @property
    def dim(self) -> int:  # of a head
        return int(self.values.shape[4])

    @property
    def n_embd(self) -> int:
        return self.n_head * self.dim


class NumpyAttention:
    """The attention of some heads of every layer, in NumPy.

    Args:
        heads: the first head, and the one after the last.
    """

    def __init__(self, arrays: AttentionArrays, heads: tuple[int, int], row_chunks: RowChunks) -> None:
        self._arrays, self._row_chunks = arrays, row_chunks
        self._first, self._last = heads
        self._keys, self._values = arrays.keys, arrays.values
        qkv, out, n_embd = arrays.qkv, arrays.out, arrays.n_embd
        n, dim, rows = self._last - self._first, arrays.dim, qkv.shape[0]
        own = slice(self._first * dim, self._last * dim)
        q, k, v = (qkv[:, i * n_embd : (i + 1) * n_embd][:, own] for i in range(3))
        self._q, self._qkv = q, qkv
        # In bytes, from a row to the next, and from a head to the next.
        self._strides = q.strides[0], dim * q.itemsize
        self._k, self._v, self._out = (x.reshape(rows, n, dim) for x in (k, v, out[:, own]))
        self._scratch = Scratch(n * row_chunks.least, self._values.shape[3], dim)
        self.exact = row_chunks.exact
        order = np.arange(2 * PROMPT_ROWS)
        self._future = order[None, :] > order[:, None]  # [i, j]: j comes after i
        self._count = 0
        self._writes: list[tuple[Array, Array]] = []
        self._groups: list[Group] = []

    def prepare(self, tokens: Sequence[NewTokens]) -> None:
        """Lay out a step; the calls of the layers then attend it."""
        self._count, self._writes = sum(new.length for new in tokens), []
        self._groups = list(self._lay_out(tokens)) if self._last > self._first else []

    def call(self, layer: int) -> Call:
        """Return the call that appends the step's keys and values of a layer to the cache, and attends its queries."""
        return partial(self._run, layer)

    def _run(self, layer: int) -> None:
        queries = self._q[: self._count]
        queries *= np.float32(self._arrays.scales[layer])
        for new, cached in self._writes:
            cached[layer] = new
        for group in self._groups:
            group.run(layer)

    def _lay_out(self, tokens: Sequence[NewTokens]) -> Iterator[Group]:
        decoding: list[tuple[int, int, int]] = []  # slot, length and row of neighbours with one new token each
        for slot, start, row, n in tokens:
            self._plan_writes(slot, start, row, n)
            if decoding and (n > 1 or not self._may_join(decoding, slot, start + 1)):
                yield self._decode_group(decoding)
                decoding = []
            if n == 1:
                decoding.append((slot, start + 1, row))
            else:
                for at in range(0, n, PROMPT_ROWS):
                    yield from self._prompt_groups(slot, start + at, row + at, min(PROMPT_ROWS, n - at))
        if decoding:
            yield self._decode_group(decoding)

    def _plan_writes(self, slot: int, start: int, row: int, n: int) -> None:
        """Note where the keys and values of n new tokens go: keys a block at a time, values at once."""
        heads = slice(self._first, self._last)
        values = self._values[slot, :, heads, start : start + n].transpose(0, 2, 1, 3)  # [n_layer, n, heads, dim]
        self._writes.append((self._v[row : row + n], values))
        at = 0
        while at < n:
            block, offset = divmod(start + at, BLOCK)
            count = min(BLOCK - offset, n - at)
            # [n_layer, heads, dim, count] -> [n_layer, count, heads, dim]
            keys = self._keys[slot, :, block, heads, :, offset : offset + count].transpose(0, 3, 1, 2)
            self._writes.append((self._k[row + at : row + at + count], keys))
            at += count

    def _may_join(self, decoding: list[tuple[int, int, int]], slot: int, length: int) -> bool:
        """Tell whether a sequence is better attended together with those before it."""
        if slot != decoding[-1][0] + 1:
            return False
        lengths = [before for _, before, _ in decoding]
        together = [*lengths, length]
        rows = len(together) * (self._last - self._first) * self._row_chunks.least
        fits = rows * -(-max(together) // BLOCK) * BLOCK <= SCORES
        if max(together) - min(together) > MOST_PADDING or not fits:
            return False
        return _padding(together) - _padding(lengths) <= MOST_ADDED_PADDING

    def _decode_group(self, members: list[tuple[int, int, int]]) -> Group:
        """Group sequences in neighbouring slots and rows that have one new token each."""
        (slot, _, row), n = members[0], len(members)
        lengths = np.array([length for _, length, _ in members])
        longest = int(lengths.max())
        blocks, least = -(-longest // BLOCK), self._row_chunks.least
        width = blocks * BLOCK
        hidden = (np.arange(width) >= lengths[:, None])[:, None] if int(lengths.min()) < width else None
        slots, heads, count = slice(slot, slot + n), slice(self._first, self._last), self._last - self._first
        row_stride, head_stride = self._strides
        # A row is filled up to `least` with those after it, whatever they hold.
        queries = self._queries(row, 0, (n, 1, count, least), (row_stride, 0, head_stride, row_stride))
        scores, contexts, sums, block_sums, largest = self._scratch.views(n, count, least, blocks)
        live = scores[:, :, 0]
        return Group(
            queries,
            self._keys[slots, :, :blocks, heads].swapaxes(0, 1),
            self._values[slots, :, heads, :longest].transpose(1, 0, 2, 3, 4),
            scores,
            contexts=contexts,
            sums=sums[:, :, 0],
            block_sums=block_sums[:, :, 0],
            largest=largest[:, :, 0],
            by_block=scores.reshape(n, count, least, blocks, BLOCK).transpose(0, 3, 1, 2, 4),
            live=live,
            blind=live,
            hidden=hidden,
            result=contexts[:, :, 0],
            divisor=sums[:, :, 0],
            out=self._out[row : row + n],
        )

    def _prompt_groups(self, slot: int, start: int, row: int, n: int) -> Iterator[Group]:
        """Group a piece of a prompt by heads: n rows that see all before them, and of themselves what is not later."""
        chunks, m = self._row_chunks.split(n)
        length, dim = start + n, self._arrays.dim
        blocks, rows = -(-length // BLOCK), chunks * m
        width = blocks * BLOCK
        at_once = max(1, SCORES // (rows * width))
        row_stride, head_stride = self._strides
        hidden = self._future[:rows, : width - start]
        for first in range(self._first, self._last, at_once):
            heads = slice(first, min(first + at_once, self._last))
            count, skipped = heads.stop - first, first - self._first
            queries = self._queries(row, skipped, (1, count, chunks, m), (0, head_stride, m * row_stride, row_stride))
            scores, contexts, sums, block_sums, largest = self._scratch.views(count, chunks, m, blocks)
            live = scores.reshape(count, rows, width)
            sums = sums.reshape(count, rows, 1)
            yield Group(
                queries,
                self._keys[slot, :, :blocks, heads, None],
                self._values[slot, :, heads, None, :length],
                scores,
                contexts=contexts,
                sums=sums,
                block_sums=block_sums.reshape(count, rows, BLOCK),
                largest=largest.reshape(count, rows, 1),
                by_block=scores.reshape(count, chunks, m, blocks, BLOCK).transpose(3, 0, 1, 2, 4),
                live=live,
                blind=live[:, :, start:],
                hidden=hidden,
                result=contexts.reshape(count, rows, dim)[:, :n],
                divisor=sums[:, :n],
                out=self._out[row : row + n, skipped : skipped + count].transpose(1, 0, 2),
            )

    def _queries(self, row: int, skipped: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
        """Return queries from `row` on, of the heads after the first `skipped`; rows may appear more than once."""
        row_stride, head_stride = self._strides
        offset = row * row_stride + (self._first + skipped) * head_stride
        # As `as_strided` does, in a tenth of the time.
        return np.ndarray((*shape, self._arrays.dim), np.float32, self._qkv, offset, (*strides, self._q.itemsize))


def _padding(lengths: list[int]) -> int:
    """Return how many positions too many are read of sequences that are attended together."""
    return len(lengths) * max(lengths) - sum(lengths)


class Scratch:
    """Memory for the scores of one group at a time, and for what is made of them."""

    def __init__(self, rows: int, positions: int, dim: int) -> None:
        self._dim = dim
        # Rows at a time: as many of the shortest as there is room for, or one row of every head.
        most = max(SCORES // BLOCK, rows, 2 * PROMPT_ROWS)
        self._scores = np.zeros(max(SCORES, rows * positions, 2 * PROMPT_ROWS * positions), np.float32)
        self._contexts = np.zeros(most * dim, np.float32)
        self._block_sums = np.zeros(most * BLOCK, np.float32)
        self._sums = np.zeros(most, np.float32)
        self._largest = np.zeros(most, np.float32)

    def views(self, a: int, b: int, m: int, blocks: int) -> tuple[Array, Array, Array, Array, Array]:
        """Return arrays [a, b, m, n]; n: blocks * BLOCK scores, dim contexts, 1 sum, BLOCK block sums, 1 largest."""
        rows = a * b * m
        return (
            self._scores[: rows * blocks * BLOCK].reshape(a, b, m, blocks * BLOCK),
            self._contexts[: rows * self._dim].reshape(a, b, m, self._dim),
            self._sums[:rows].reshape(a, b, m, 1),
            self._block_sums[: rows * BLOCK].reshape(a, b, m, BLOCK),
            self._largest[:rows].reshape(a, b, m, 1),
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are attended by the same calls: a and b are sequences and heads, or heads and chunks of a prompt.

    Attributes:
        queries, keys: by layer; their product are the scores `by_block`, in the order in which blocks lie.
        values: [n_layer, a, b or 1, length, dim].
        scores: [a, b, m, blocks * BLOCK]; later the probabilities, before they are divided by their sums.
        by_block: a view of the scores, [.., m, BLOCK] for each block.
        contexts: [a, b, m, dim], the product of scores and values.
        live: the scores of those rows that somebody reads.
        sums, block_sums, largest: for each live row the sum of its probabilities, that sum over blocks for each
            position in a block, and its largest score.
        blind: those scores of which `hidden` tells which may not be seen.
        result, divisor, out: the numbers that are divided, the divisor, and where the result goes.
    """

    queries: Array
    keys: Array
    values: Array
    scores: Array
    by_block: Array
    contexts: Array
    sums: Array
    block_sums: Array
    largest: Array
    live: Array
    blind: Array
    hidden: NDArray[np.bool_] | None
    result: Array
    divisor: Array
    out: Array

    def run(self, layer: int) -> None:
        """Attend the rows in one layer: softmax(queries keys^T) values."""
        live = self.live
        np.matmul(self.queries, self.keys[layer], out=self.by_block)
        if self.hidden is not None:
            np.copyto(self.blind, -np.inf, where=self.hidden)
        np.maximum.reduce(live, axis=-1, keepdims=True, out=self.largest)
        np.subtract(live, self.largest, out=live)
        np.exp(live, out=live)
        np.matmul(self.scores[..., : self.values.shape[-2]], self.values[layer], out=self.contexts)
        np.add.reduce(live.reshape(*live.shape[:2], -1, BLOCK), axis=2, out=self.block_sums)
        np.add.reduce(self.block_sums, axis=2, keepdims=True, out=self.sums)
        np.divide(self.result, self.divisor, out=self.out)
