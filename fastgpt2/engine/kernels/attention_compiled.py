"""Causal attention, compiled: the keys and values of new tokens are appended, and their queries attend to all before.

It goes through one sequence after the other. Several new tokens, as a prompt has, are attended head by head, from the
outside in:

    head
      tile           for each few rows of the sequence           queries side by side, scores in the first cache
        scores         for each block of keys, for each d          sums in registers
        softmax        for each row: largest score, exp, sum
        contexts       for each position                           sums in registers

One new token has nothing to do but to read the sequence's keys and values once. They are read in the order in which
they lie: of each block the keys of all heads, then of each head all values.

A row's sums are taken in the order of d, of blocks and of positions, whatever rows stand beside it. What a row may not
see has a probability of exactly 0. So its bits depend on its own sequence only, on every CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastgpt2.engine.kernels.attention import BLOCK, AttentionArrays, NewTokens
from fastgpt2.engine.kernels.machine_code import MachineCode, load_code
from fastgpt2.engine.kernels.panels import LINE_BYTES
from fastgpt2.engine.kernels.program import NativeCall, arguments_of

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.instruction_set import InstructionSet
    from fastgpt2.engine.kernels.ir import Code, Module, Value

# Rows of a tile, at most, and of the tile for what is left over. Each size of tile is a function of its own.
MAX_TILE_ROWS, _SOME_ROWS = 12, 4


class HeadShape(NamedTuple):
    """What the code is specialized for: the size of a head, the heads of the model, the positions of a slot."""

    dim: int
    heads: int
    positions: int

    @property
    def score_stride(self) -> int:
        """Return the floats from one row's scores to the next's: not a power of two, for the cache's sake."""
        return self.positions + 48

    @property
    def panel_bytes(self) -> int:
        """Return the bytes of a block of one head's keys, or of its values."""
        return self.dim * BLOCK * 4

    @property
    def key_block_bytes(self) -> int:
        """Return the bytes of a block of keys of all heads, and so from a block to the next."""
        return self.heads * self.panel_bytes

    @property
    def value_head_bytes(self) -> int:
        """Return the bytes of a head's values, and so from a head to the next."""
        return self.positions * self.dim * 4


def load_attention_code(shape: HeadShape) -> MachineCode:
    """Return the operation `attention`. Raises BadRequest if llvmlite is not installed, or cannot be used."""
    return load_code(f"attention {shape}", lambda module, instructions: write_attention(module, instructions, shape))


class CompiledAttention:
    """The attention of some heads of every layer, compiled.

    Args:
        heads: the first head, and the one after the last.
        code: of another instruction set than this CPU's best one.

    Raises:
        BadRequest: llvmlite is not installed, or cannot be used.
    """

    exact = True

    def __init__(self, arrays: AttentionArrays, heads: tuple[int, int], code: MachineCode | None = None) -> None:
        self._arrays, self._heads = arrays, heads
        shape = HeadShape(arrays.dim, arrays.n_head, arrays.positions)
        self._code = code or load_attention_code(shape)
        # The scores of a tile; or of one row in all heads, and its queries.
        self._scratch = np.empty(max(MAX_TILE_ROWS, shape.heads) * (shape.score_stride + shape.dim), np.float32)
        # How many sequences have new tokens, and `NewTokens` of each.
        self._tokens = np.zeros(1 + 4 * arrays.qkv.shape[0], np.int64)

    def prepare(self, tokens: Sequence[NewTokens]) -> None:
        """Lay out a step; the calls of the layers then attend it."""
        self._tokens[0] = len(tokens)
        self._tokens[1 : 1 + 4 * len(tokens)] = np.array(tokens, np.int64).ravel()

    def call(self, layer: int) -> NativeCall:
        """Return the call that appends the step's keys and values of a layer to the cache, and attends its queries."""
        a = self._arrays
        q, k, v = (a.qkv[:, i * a.n_embd :] for i in range(3))
        keys, values = a.keys[:, layer], a.values[:, layer]
        arguments = arguments_of(
            *(q, k, v, q.strides[0], a.out, a.out.strides[0]),
            *(keys, keys.strides[0], values, values.strides[0], self._tokens, *self._heads, self._scratch),
            float(a.scales[layer]),
        )
        return NativeCall([(self._code.address("attention"), arguments)], self)


# Parameters of the functions within: queries of the first row and head, bytes from row to row, keys and values of the
# head, where the head's contexts go, bytes from row to row, positions that the first row sees, scores, the scale.
_TILE = "pipppiipf"

# Of the one for a row: queries, keys and values of the first head, where contexts go, what is read after these keys and
# values, positions that are seen, heads, scratch, the scale.
_ROW = "pppppiipf"


def write_attention(module: Module, instructions: InstructionSet, shape: HeadShape) -> None:
    """Write the operation `attention`.

    Arguments: queries, keys and values of new tokens [rows, ..] of head 0, and bytes from row to row; where contexts
    go, and bytes from row to row; cached keys and values of the layer in slot 0, and bytes from slot to slot of each;
    the number of sequences with new tokens, followed by four integers for each, `NewTokens`; the first head and the
    one after the last; scratch; the scale of scores.
    """
    # The scores of a tile for one block fit into the registers for sums.
    sums = instructions.sums
    most = min(MAX_TILE_ROWS, max(1, sums * instructions.lanes // BLOCK))
    sizes = sorted({1, min(_SOME_ROWS, most), most}, reverse=True)
    tiles = {rows: _write_tile(module, sums, shape, rows) for rows in sizes}
    append, attend_row = _write_append(module, shape), _write_row(module, shape)
    code = module.operation("attention")
    q, k, v, stride, out, out_stride, keys, key_slot, values, value_slot, tokens, first, last, scratch, scale = (
        code.arguments("pppipipipipiipf")
    )
    head_bytes = 4 * shape.dim
    n = code.load_integer(tokens)
    with code.loop(0, n) as sequence:
        numbers = tokens + 8 + sequence.index * 32
        slot, start, row, count = (code.load_integer(numbers + 8 * place) for place in range(4))
        slot_keys, slot_values = keys + slot * key_slot, values + slot * value_slot
        queries, contexts = q + row * stride, out + row * out_stride
        with code.loop(first, last) as head:
            at, here = row * stride + head.index * head_bytes, head.index * shape.panel_bytes
            code.call(
                append,
                *(k + at, v + at, stride, slot_keys + here, slot_values + head.index * shape.value_head_bytes),
                *(start, count),
            )
        with code.when(count < 2):
            # The keys of the next sequence; of the last one, its own.
            next_slot = code.load_integer(numbers + code.where(sequence.following < n, code.value(32), code.value(0)))
            at, here = first * head_bytes, first * shape.panel_bytes
            code.call(
                attend_row,
                *(queries + at, slot_keys + here, slot_values + first * shape.value_head_bytes, contexts + at),
                *(keys + next_slot * key_slot + here, start + 1, last - first, scratch, scale),
            )
        with code.when(count > 1), code.loop(first, last) as head:
            here = head.index * head_bytes
            own_keys = slot_keys + head.index * shape.panel_bytes
            own_values = slot_values + head.index * shape.value_head_bytes
            done: Value | int = 0
            for rows in sizes:
                tile = tiles[rows]
                with code.loop(done, count, rows) as part:
                    i = part.index
                    code.call(
                        tile,
                        *(queries + here + i * stride, stride, own_keys, own_values),
                        *(contexts + here + i * out_stride, out_stride, start + i + 1, scratch, scale),
                    )
                done = part.index
    code.end()


def _write_append(module: Module, shape: HeadShape) -> Code:
    """Write the function that appends the keys and values of new tokens of one head to the cache."""
    code = module.function("append", "ppippii")
    k, v, stride, keys, values, start, count = code.parameters
    with code.loop(0, count) as new:
        position = start + new.index
        source = new.index * stride
        place = keys + position // BLOCK * shape.key_block_bytes + position % BLOCK * 4
        with code.loop(0, shape.dim) as d:
            code.store(code.load(k + source + d.index * 4), place + d.index * (4 * BLOCK))
        value = code.load_floats(v + source, shape.dim)
        code.store(value, values + position * (4 * shape.dim))
    code.end()
    return code


def _write_row(module: Module, shape: HeadShape) -> Code:
    """Write the function that attends one row, in some heads.

    Each piece of keys or values is asked for while the one before it is at work.
    """
    code = module.function("attend_row", _ROW)
    q, keys, values, out, following, seen, heads, scratch, scale = code.parameters
    dim, panel_bytes, stride = shape.dim, shape.panel_bytes, 4 * shape.score_stride
    blocks = (seen + (BLOCK - 1)) // BLOCK
    queries, scores = scratch, scratch + heads * (4 * dim)
    for offset, lanes in code.each(heads * dim, module.lanes):
        code.store(code.load_floats(q + offset, lanes) * scale, queries + offset)
    order = code.words_in_order(BLOCK)
    with code.loop(0, blocks) as block:
        panels, is_last = keys + block.index * shape.key_block_bytes, block.following >= blocks
        before = block.index * BLOCK
        left = code.word(seen - before)
        with code.loop(0, heads) as head:
            panel = panels + head.index * panel_bytes
            later = code.where(is_last, values + head.index * shape.value_head_bytes, panel + shape.key_block_bytes)
            with code.loop(0, dim, 1, [code.floats(0.0, BLOCK)]) as d:
                at = d.index * (4 * BLOCK)
                key = code.load_floats(panel + at, BLOCK)
                _write_prefetch(code, later + at, BLOCK)
                d.values[0] = code.fma(key, code.load(queries + (head.index * dim + d.index) * 4), d.values[0])
            code.store(code.where(order < left, d.values[0], -math.inf), scores + head.index * stride + before * 4)
    with code.loop(0, heads) as head:
        probabilities = scores + head.index * stride
        total = _write_softmax(code, probabilities, blocks)
        panels = values + head.index * shape.value_head_bytes
        with code.loop(0, blocks, 1, [code.floats(0.0, dim)]) as block:
            before = block.index * BLOCK
            panel = panels + block.index * panel_bytes
            later = code.where(block.following < blocks, panel + panel_bytes, following + head.index * panel_bytes)
            left = seen - before
            with code.loop(0, code.where(left < BLOCK, left, code.value(BLOCK)), 1, block.values) as position:
                at = position.index * (4 * dim)
                value = code.load_floats(panel + at, dim)
                _write_prefetch(code, later + at, dim)
                probability = code.load(probabilities + (before + position.index) * 4)
                position.values[0] = code.fma(value, probability, position.values[0])
            block.values = position.values
        code.store(block.values[0] / total, out + head.index * (4 * dim))
    code.end()
    return code


def _write_tile(module: Module, sums: int, shape: HeadShape, rows: int) -> Code:
    code = module.function(f"attend_{rows}", _TILE)
    q, stride, keys, values, out, out_stride, seen, scratch, scale = code.parameters
    queries = _write_scaled_queries(code, shape, rows, q, stride, scale)
    # The last row of the tile sees `rows - 1` positions more than the first.
    reach = seen + (rows - 1)
    blocks = (reach + (BLOCK - 1)) // BLOCK
    _write_scores(code, shape, rows, queries, keys, blocks, seen, scratch)
    totals = [_write_softmax(code, scratch + 4 * shape.score_stride * row, blocks) for row in range(rows)]
    columns = max(module.lanes, sums // rows * module.lanes)
    for first in range(0, shape.dim, columns):
        lanes = min(columns, shape.dim - first)
        contexts = _write_contexts(code, shape, rows, values + 4 * first, lanes, scratch, reach)
        row_out = out + 4 * first
        for context, total in zip(contexts, totals, strict=True):
            code.store(context / total, row_out)
            row_out = row_out + out_stride
    code.end()
    return code


def _write_scaled_queries(code: Code, shape: HeadShape, rows: int, q: Value, stride: Value, scale: Value) -> Value:
    """Write how queries are scaled, and laid side by side: [dim, rows]."""
    queries = code.room(4 * shape.dim * rows)
    with code.loop(0, shape.dim) as d:
        place, source = queries + d.index * (4 * rows), q + d.index * 4
        for row in range(rows):
            code.store(code.load(source) * scale, place + 4 * row)
            source = source + stride
    return queries


def _write_scores(
    code: Code, shape: HeadShape, rows: int, queries: Value, keys: Value, blocks: Value, seen: Value, scratch: Value
) -> None:
    """Write the scores of all rows for all blocks, minus infinity for what a row may not see."""
    order = code.words_in_order(BLOCK)
    with code.loop(0, blocks) as block:
        panel = keys + block.index * shape.key_block_bytes
        with code.loop(0, shape.dim, 1, [code.floats(0.0, BLOCK)] * rows) as d:
            key = code.load_floats(panel + d.index * (4 * BLOCK), BLOCK)
            place = queries + d.index * (4 * rows)
            for row in range(rows):
                d.values[row] = code.fma(key, code.load(place + 4 * row), d.values[row])
        before = block.index * BLOCK
        scores = scratch + before * 4
        left = code.word(seen - before)
        for row in range(rows):
            visible = code.where(order < left + row, d.values[row], -math.inf)
            code.store(visible, scores + 4 * shape.score_stride * row)


def _write_prefetch(code: Code, address: Value, floats: int) -> None:
    """Write how floats are asked for that are read soon."""
    for at in range(0, 4 * floats, LINE_BYTES):
        code.prefetch(address + at)


def _write_softmax(code: Code, scores: Value, blocks: Value) -> Value:
    """Write how scores become probabilities, still to be divided by their sum, which is returned."""
    wide = BLOCK
    with code.loop(0, blocks, 1, [code.floats(-math.inf, wide)]) as block:
        here = code.load_floats(scores + block.index * (4 * wide), wide)
        block.values[0] = code.maximum(here, block.values[0])
    largest = code.largest(block.values[0])
    with code.loop(0, blocks, 1, [code.floats(0.0, wide)]) as block:
        place = scores + block.index * (4 * wide)
        probabilities = code.exp(code.load_floats(place, wide) - largest)
        code.store(probabilities, place)
        block.values[0] = block.values[0] + probabilities
    return code.sum(block.values[0])


def _write_contexts(
    code: Code, shape: HeadShape, rows: int, values: Value, lanes: int, scratch: Value, reach: Value
) -> list[Value]:
    """Write the sums of some columns of the values, weighted by each row's probabilities."""
    with code.loop(0, reach, 1, [code.floats(0.0, lanes)] * rows) as position:
        value = code.load_floats(values + position.index * (4 * shape.dim), lanes)
        place = scratch + position.index * 4
        for row in range(rows):
            probability = code.load(place + 4 * shape.score_stride * row)
            position.values[row] = code.fma(value, probability, position.values[row])
    return position.values
