"""The product of rows by panels of weights, compiled: what nearly all of a step's time goes to.

A panel is 16 columns of a weight, stored as lines of 64 bytes, one behind the other: a line holds the columns' numbers
for one k (float32), for two (bfloat16) or for four (int8). In each case a column has one word of 32 bits in it, so that
all three are multiplied by one loop nest, from the outside in:

    multiply   for each few panels                        read from memory once
    part         for each few rows                        tile: sums in registers
    tile           for each line of the panels            64 bytes a panel
                     for each row: one word of the row, repeated in every lane, times the line

The rows are packed before, so that the words which a line needs lie side by side, and in the type that the CPU
multiplies: `Widened` turns weights into float32; `BFloat16Dots` and `Int8Dots` turn rows into what the weights are.

The sum of a row is taken in the order of k, whatever stands beside the row. So its bits do not depend on its
neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fastgpt2.engine.kernels.instruction_set import InstructionSet
from fastgpt2.engine.kernels.ir import (
    BFLOAT,
    BYTE,
    FLOAT,
    ROUNDING,
    ROUNDING_BITS,
    WORD,
    Code,
    Loop,
    Module,
    Value,
    vector,
)
from fastgpt2.engine.kernels.panels import COMPILED_WIDTH, LINE_BYTES, STORED_TYPES

# Rows and panels of a tile, at most. Each size of tile is a function of its own. Few rows leave the multipliers time,
# and more panels are more streams from memory. From `_MANY_ROWS` rows on, two panels keep the multipliers busy, and
# leave room in the second cache for the two that are asked for meanwhile.
MAX_TILE_ROWS, MAX_TILE_PANELS = 12, 8
_MANY_ROWS, _PANELS_OF_MANY_ROWS = 6, 2

# Numbers of a row that share a scale when they are rounded to int8: 8 lines of weights. One number that is far larger
# than the others makes the rounding of these coarse, and of no others. With one number in 224 forty times as large, and
# its weights as much smaller, perplexity rose by 2.6% with groups of 64, by 0.6% with groups of 32.
SCALED_TOGETHER = 32
_GROUP_LINES = SCALED_TOGETHER // 4
# Of a packed row: the words of a group, what is to be added for it, and its scale.
_GROUP_BYTES = 4 * (_GROUP_LINES + 2)


class Form(ABC):
    """How rows and weights of one kind meet in one instruction set.

    Attributes:
        per_word: the numbers of k in a line, and of a column in a word.
        sums: registers that may hold sums of a tile.
    """

    def __init__(self, weights: str, instructions: InstructionSet) -> None:
        self.weights, self.lanes = weights, instructions.lanes
        self.vectors = COMPILED_WIDTH // self.lanes  # registers that a line takes
        self.per_word = STORED_TYPES[weights].per_word
        self.sums = instructions.sums

    @property
    def most_rows(self) -> int:
        """Return the rows of the largest tile of one panel."""
        return min(MAX_TILE_ROWS, self.sums // self.vectors)

    def panels(self, rows: int) -> int:
        """Return the panels of a tile of `rows` rows: sums enough to keep the multipliers busy, and several streams."""
        most = MAX_TILE_PANELS if rows < _MANY_ROWS else _PANELS_OF_MANY_ROWS
        return max(1, min(most, self.sums // (rows * self.vectors)))

    def lines(self, k: Value) -> Value:
        return (k + (self.per_word - 1)) // self.per_word

    @abstractmethod
    def packed_bytes(self, k: Value) -> Value:
        """Return the bytes that a packed row takes: not more than its float32 and 512."""

    @abstractmethod
    def pack(self, code: Code, x: Value, k: Value, out: Value, rows: Value) -> None:
        """Write how one row is packed: its words go `rows` words apart."""

    @abstractmethod
    def sum_lines(
        self, code: Code, x: Value, panels: Sequence[Value], lines: Value, ahead: Value, rows: int
    ) -> list[Value]:
        """Write how a tile goes through all lines; return the sums, by row, panel and vector.

        Args:
            ahead: the panels that are multiplied next, which are asked for meanwhile.
        """

    def begin_sums(self, code: Code, rows: int, panels: int) -> list[Value]:
        return [code.floats(0.0, self.lanes)] * (rows * panels * self.vectors)

    def prefetch(self, code: Code, ahead: Value, at: Value, lines: Value, rows: int, panels: int) -> None:
        """Ask for a line of each of the panels that the next tile will read.

        Measured on cores with AVX-512: one row gains 6 to 10% by it, eight rows and more 5 to 18%. Two to five rows by
        float32 weights lose 8%: their many streams take all that memory gives as they are.
        """
        if self.weights == "float32" and rows > 1 and panels > _PANELS_OF_MANY_ROWS:
            return
        for _ in range(panels):
            code.prefetch(ahead + at)
            ahead = ahead + lines * LINE_BYTES

    def load_lines(self, code: Code, panels: Sequence[Value], at: Value) -> list[Value]:
        """Load the words of a line of each panel, as vectors of integers."""
        words = vector(WORD, self.lanes)
        return [code.load(panel + at + 4 * self.lanes * i, words) for panel in panels for i in range(self.vectors)]


class Widened(Form):
    """Weights become float32 as they are read, and rows are float32: for any CPU, and for float32 weights."""

    def __init__(self, weights: str, instructions: InstructionSet) -> None:
        super().__init__(weights, instructions)
        if self.per_word > 1:
            # LLVM keeps a line as it was read until its last number is widened. Without room for that, sums would go
            # to the stack and back at each line.
            self.sums -= 2 * (self.vectors - 1)

    def packed_bytes(self, k: Value) -> Value:
        return self.lines(k) * (4 * self.per_word)

    def pack(self, code: Code, x: Value, k: Value, out: Value, rows: Value) -> None:
        step = rows * 4
        with code.loop(0, k, 16) as many:
            numbers = code.load_floats(x + many.index * 4, 16)
            for i in range(16):
                code.store(code.part(numbers, i, 1), out + (many.index + i) * step)
        with code.loop(many.index, k) as one:
            code.store(code.load(x + one.index * 4), out + one.index * step)
        # Beyond k the weights are zeros, and zero times what happens to lie there may be no number.
        whole = (k + (self.per_word - 1)) // self.per_word * self.per_word
        with code.loop(one.index, whole) as none:
            code.store(code.constant(0.0, FLOAT), out + none.index * step)

    def sum_lines(
        self, code: Code, x: Value, panels: Sequence[Value], lines: Value, ahead: Value, rows: int
    ) -> list[Value]:
        columns = len(panels) * self.vectors
        with code.loop(0, lines, 1, self.begin_sums(code, rows, len(panels))) as line:
            at = line.index * LINE_BYTES
            self.prefetch(code, ahead, at, lines, rows, len(panels))
            places = [panel + at + 4 * self.lanes * i for panel in panels for i in range(self.vectors)]
            packed = x + line.index * (4 * rows * self.per_word)
            numbers = [packed + 4 * i for i in range(self.per_word * rows)]
            # Whichever of the two are fewer stay in registers while the others pass by.
            if rows <= columns:
                ready = [self._repeat(code, place) for place in numbers]
                for column, place in enumerate(places):
                    for j in range(self.per_word):
                        weight = self._load_widened(code, place, j)
                        for row in range(rows):
                            self._add(code, line, row * columns + column, ready[j * rows + row], weight)
            else:
                for j in range(self.per_word):
                    weights = [self._load_widened(code, place, j) for place in places]
                    for row in range(rows):
                        number = self._repeat(code, numbers[j * rows + row])
                        for column, weight in enumerate(weights):
                            self._add(code, line, row * columns + column, number, weight)
        return line.values

    def _repeat(self, code: Code, place: Value) -> Value:
        return code.repeat(code.load(place), self.lanes)

    def _load_widened(self, code: Code, place: Value, j: int) -> Value:
        return widen(code, self.weights, code.load(place, vector(WORD, self.lanes)), j)

    def _add(self, code: Code, line: Loop, i: int, number: Value, weight: Value) -> None:
        line.values[i] = code.fma(number, weight, line.values[i])


def widen(code: Code, weights: str, words: Value, j: int) -> Value:
    """Return number j of each word of stored weights as float32; of int8 the whole numbers."""
    floats = vector(FLOAT, words.lanes)
    if weights == "float32":
        return code.bitcast(words, floats)
    if weights == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        return code.bitcast(words << 16 if j == 0 else words & -0x10000, floats)
    number = (words << (24 - 8 * j) if j < 3 else words) >> 24
    return Value(code, code.builder.sitofp(number.llvm, floats))


class BFloat16Dots(Form):
    """Rows are rounded to bfloat16; an instruction adds two products to each sum, which is float32."""

    def __init__(self, weights: str, instructions: InstructionSet, dot: str) -> None:
        super().__init__(weights, instructions)
        self.dot = dot

    def packed_bytes(self, k: Value) -> Value:
        return self.lines(k) * 4

    def pack(self, code: Code, x: Value, k: Value, out: Value, rows: Value) -> None:
        step = rows * 4
        with code.loop(0, k, 32) as many:
            words = self._round(code, code.load_floats(x + many.index * 4, 32))
            for i in range(16):
                code.store(code.part(words, i, 1), out + (many.index // 2 + i) * step)
        with code.loop(many.index, k, 2) as two:
            word = self._round(code, code.load_floats(x + two.index * 4, 2))
            code.store(word, out + two.index // 2 * step)
        with code.loop(two.index, k) as one:
            last = code.pair(code.load(x + one.index * 4), code.constant(0.0, FLOAT))
            code.store(self._round(code, last), out + one.index // 2 * step)

    def _round(self, code: Code, numbers: Value) -> Value:
        rounded = code.builder.fptrunc(numbers.llvm, vector(BFLOAT, numbers.lanes))
        return Value(code, code.builder.bitcast(rounded, vector(WORD, numbers.lanes // 2)))

    def sum_lines(
        self, code: Code, x: Value, panels: Sequence[Value], lines: Value, ahead: Value, rows: int
    ) -> list[Value]:
        halves = vector(BFLOAT, 2 * self.lanes)
        with code.loop(0, lines, 1, self.begin_sums(code, rows, len(panels))) as line:
            at = line.index * LINE_BYTES
            self.prefetch(code, ahead, at, lines, rows, len(panels))
            weights = [code.bitcast(words, halves) for words in self.load_lines(code, panels, at)]
            place = x + line.index * (4 * rows)
            for row in range(rows):
                number = code.bitcast(code.repeat(code.load(place + 4 * row, WORD), self.lanes), halves)
                for column, weight in enumerate(weights):
                    i = row * len(weights) + column
                    line.values[i] = code.intrinsic(self.dot, vector(FLOAT, self.lanes), line.values[i], number, weight)
        return line.values


class Int8Dots(Form):
    """Rows are rounded to int8, `SCALED_TOGETHER` numbers by one scale; an instruction adds four products.

    x86 multiplies unsigned bytes by signed ones. So 128 is added to each weight as it is read, by turning its highest
    bit over, and 128 times the sum of the row's numbers is taken from the sum beforehand.
    """

    def __init__(self, weights: str, instructions: InstructionSet, dot: str) -> None:
        super().__init__(weights, instructions)
        self.dot = dot
        self.unsigned = ".x86." in dot
        # Each sum has two registers: of the group in whole numbers, and of all groups in float32.
        self.sums = instructions.sums // 2

    def packed_bytes(self, k: Value) -> Value:
        return (k + (SCALED_TOGETHER - 1)) // SCALED_TOGETHER * _GROUP_BYTES

    def pack(self, code: Code, x: Value, k: Value, out: Value, rows: Value) -> None:
        with code.loop(0, k, SCALED_TOGETHER) as group:
            numbers = code.load_floats(x + group.index * 4, SCALED_TOGETHER)
            self._pack_group(code, numbers, out + group.index // SCALED_TOGETHER * _GROUP_BYTES * rows, rows)
        with code.when(group.index < k):
            rest = code.room(4 * SCALED_TOGETHER)
            code.store(code.floats(0.0, SCALED_TOGETHER), rest)
            with code.loop(group.index, k) as one:
                code.store(code.load(x + one.index * 4), rest + (one.index - group.index) * 4)
            numbers = code.load_floats(rest, SCALED_TOGETHER)
            self._pack_group(code, numbers, out + group.index // SCALED_TOGETHER * _GROUP_BYTES * rows, rows)

    def _pack_group(self, code: Code, numbers: Value, out: Value, rows: Value) -> None:
        magnitudes = code.absolute(numbers)
        # This adds nothing, unless a number is not finite: then the scale is not a number, and so will be the result.
        flaw = code.sum(magnitudes * 0.0)
        largest = code.largest(magnitudes)
        scale = largest * (1 / 127) + flaw
        inverse = code.where(largest > 0.0, code.constant(127.0, FLOAT) / largest, 0.0)
        # The nearest whole number, in the lowest byte.
        shifted = code.bitcast(numbers * inverse + ROUNDING, vector(WORD, SCALED_TOGETHER))
        whole = Value(code, code.builder.trunc(shifted.llvm, vector(BYTE, SCALED_TOGETHER)))
        words = code.bitcast(whole, vector(WORD, _GROUP_LINES))
        for i in range(_GROUP_LINES):
            code.store(code.part(words, i, 1), out + rows * (4 * i))
        total = code.sum(shifted - ROUNDING_BITS)
        code.store(total * -128, out + rows * (4 * _GROUP_LINES))
        code.store(scale, out + rows * (4 * _GROUP_LINES + 4))

    def sum_lines(
        self, code: Code, x: Value, panels: Sequence[Value], lines: Value, ahead: Value, rows: int
    ) -> list[Value]:
        groups = (lines + (_GROUP_LINES - 1)) // _GROUP_LINES
        first = self.begin_sums(code, rows, len(panels))
        bytes_ = vector(BYTE, 4 * self.lanes)
        with code.loop(0, groups, 1, first) as group:
            begin = group.index * _GROUP_LINES
            end = code.smaller(begin + _GROUP_LINES, lines)
            words_of_group = x + group.index * (_GROUP_BYTES * rows)
            behind = words_of_group + 4 * _GROUP_LINES * rows
            starts = []
            for row in range(rows):
                start = code.load(behind + 4 * row, WORD) if self.unsigned else code.constant(0, WORD)
                starts += [code.repeat(start, self.lanes)] * (len(panels) * self.vectors)
            with code.loop(begin, end, 1, starts) as line:
                at = line.index * LINE_BYTES
                self.prefetch(code, ahead, at, lines, rows, len(panels))
                stored = self.load_lines(code, panels, at)
                weights = [words ^ -0x7F7F7F80 if self.unsigned else words for words in stored]
                place = words_of_group + (line.index - begin) * (4 * rows)
                for row in range(rows):
                    number = code.repeat(code.load(place + 4 * row, WORD), self.lanes)
                    for column, weight in enumerate(weights):
                        i = row * len(weights) + column
                        line.values[i] = self._dot(code, line.values[i], weight, number, bytes_)
            for row in range(rows):
                scale = code.repeat(code.load(behind + 4 * rows + 4 * row), self.lanes)
                for column in range(len(panels) * self.vectors):
                    i = row * len(panels) * self.vectors + column
                    whole = code.builder.sitofp(line.values[i].llvm, vector(FLOAT, self.lanes))
                    group.values[i] = code.fma(Value(code, whole), scale, group.values[i])
        return group.values

    def _dot(self, code: Code, total: Value, weight: Value, number: Value, bytes_: Any) -> Value:
        return code.intrinsic(self.dot, total.type, total, code.bitcast(weight, bytes_), code.bitcast(number, bytes_))


def form_of(weights: str, instructions: InstructionSet) -> Form:
    """Return how weights of a kind are multiplied by an instruction set."""
    dot = instructions.dot(weights)
    if dot is None:
        return Widened(weights, instructions)
    return BFloat16Dots(weights, instructions, dot) if weights == "bfloat16" else Int8Dots(weights, instructions, dot)


# Parameters of the functions within: packed rows, panels and how many, lines in each, the panels that are multiplied
# next, scales, biases, the result and the bytes from one of its rows to the next.
_INNER = "ppiippppi"


def write_product(module: Module, weights: str, instructions: InstructionSet) -> None:
    """Write the operations `pack_rows`, `multiply` and `embed`.

    Strides are in bytes. `rows` is an address, where that number stands.

    pack_rows(x, x_stride, k, rows, packed) packs rows for `multiply`, part by part.

    multiply(packed, k, w, n, then, scales, bias, out, out_stride, rows), then the weights that are multiplied next:
    out[r, c] = scales[c] * (sum over k of x[r, k] * w[c // 16, k, c % 16]) + bias[c], without scales unless the weights
    are int8.

    embed(ids, positions, rows, w, scales, wpe, x, x_stride, k): x[r] = the column ids[r] + wpe[positions[r]].
    """
    form = form_of(weights, instructions)
    most = form.most_rows
    sizes = {(rows, panels) for rows in range(1, most + 1) for panels in (1, form.panels(rows), form.panels(most))}
    tiles = {(rows, panels): _write_tile(module, form, rows, panels) for rows, panels in sorted(sizes)}
    strips = {rows: _write_strip(module, rows, form.panels(rows), tiles) for rows in range(1, most + 1)}
    _write_pack(module, form)
    _write_multiply(module, form, tiles, strips)
    _write_embed(module, weights)


def _write_tile(module: Module, form: Form, rows: int, panels: int) -> Code:
    """Write the function that multiplies some rows by some panels that follow each other."""
    code = module.function(f"tile_{rows}_{panels}", _INNER)
    x, w, _, lines, ahead, scales, bias, out, out_stride = code.parameters
    places = [w]
    for _ in range(1, panels):
        places.append(places[-1] + lines * LINE_BYTES)
    sums = form.sum_lines(code, x, places, lines, ahead, rows)
    columns = panels * form.vectors
    for column in range(columns):
        at = 4 * form.lanes * column
        biases = code.load_floats(bias + at, form.lanes)
        scale = code.load_floats(scales + at, form.lanes) if form.weights == "int8" else None
        row_out = out
        for row in range(rows):
            total = sums[row * columns + column]
            code.store((total if scale is None else total * scale) + biases, row_out + at)
            row_out = row_out + out_stride
    code.end()
    return code


def _write_strip(module: Module, rows: int, panels: int, tiles: dict[tuple[int, int], Code]) -> Code:
    """Write the function for some rows by all panels: as many panels at a time as a tile holds, then one by one."""
    code = module.function(f"strip_{rows}", _INNER)
    _, _, n, *_ = code.parameters
    with code.loop(0, n, panels) as several:
        _call_at_panel(code, tiles[rows, panels], code.parameters, several)
    with code.loop(several.index, n) as single:
        _call_at_panel(code, tiles[rows, 1], code.parameters, single)
    code.end()
    return code


def _call_at_panel(code: Code, tile: Code, parameters: Sequence[Value], panel: Loop) -> None:
    x, w, n, lines, then, scales, bias, out, out_stride = parameters
    columns = panel.index * (4 * COMPILED_WIDTH)
    ahead = code.where(panel.following < n, w + panel.following * lines * LINE_BYTES, then)
    w = w + panel.index * lines * LINE_BYTES
    code.call(tile, x, w, n, lines, ahead, scales + columns, bias + columns, out + columns, out_stride)


def _write_pack(module: Module, form: Form) -> None:
    code = module.operation("pack_rows")
    x, x_stride, k, rows, packed = code.arguments("piinp")
    packed_bytes = form.packed_bytes(k)
    parts = (rows + (form.most_rows - 1)) // form.most_rows
    with code.loop(0, parts) as part:
        first = rows * part.index // parts
        count = rows * (part.index + 1) // parts - first
        place = packed + first * packed_bytes
        with code.loop(0, count) as row:
            form.pack(code, x + (first + row.index) * x_stride, k, place + row.index * 4, count)
    code.end()


def _write_multiply(module: Module, form: Form, tiles: dict[tuple[int, int], Code], strips: dict[int, Code]) -> None:
    """Write the function for all rows by all panels: few rows are one strip, more go in equal parts."""
    code = module.operation("multiply")
    x, k, w, n, then, scales, bias, out, out_stride, rows = code.arguments("pipippppin")
    most = form.most_rows
    inner = [x, w, n, form.lines(k), then, scales, bias, out, out_stride]
    for count in code.choose(rows, range(1, most + 1)):
        code.call(strips[count], *inner)
    with code.when(rows > most):
        _write_panels(code, form, tiles, form.panels(most), inner, rows, form.packed_bytes(k))
    code.end()


def _write_panels(
    code: Code,
    form: Form,
    tiles: dict[tuple[int, int], Code],
    panels: int,
    inner: Sequence[Value],
    rows: Value,
    packed_bytes: Value,
) -> None:
    """Write the loop for all panels, some at a time, so that each is read from memory once."""
    n = inner[2]
    with code.loop(0, n, panels) as several:
        _write_parts(code, form, tiles, panels, inner, several, rows, packed_bytes)
    with code.loop(several.index, n) as single:
        _write_parts(code, form, tiles, 1, inner, single, rows, packed_bytes)


def _write_parts(
    code: Code,
    form: Form,
    tiles: dict[tuple[int, int], Code],
    panels: int,
    inner: Sequence[Value],
    panel: Loop,
    rows: Value,
    packed_bytes: Value,
) -> None:
    """Write the loop for all rows by some panels, a part of the rows in each round."""
    x, w, n, lines, then, scales, bias, out, out_stride = inner
    parts = (rows + (form.most_rows - 1)) // form.most_rows
    with code.loop(0, parts) as part:
        first = rows * part.index // parts
        count = rows * (part.index + 1) // parts - first
        here = [x + first * packed_bytes, w, n, lines, then, scales, bias, out + first * out_stride, out_stride]
        sizes = [size for size in range(1, form.most_rows + 1) if (size, panels) in tiles]
        for size in code.choose(count, sizes):
            _call_at_panel(code, tiles[size, panels], here, panel)


def _write_embed(module: Module, weights: str) -> None:
    code = module.operation("embed")
    ids, positions, rows, w, scales, wpe, x, x_stride, k = code.arguments("ppnppppii")
    per_word = STORED_TYPES[weights].per_word
    lines = (k + (per_word - 1)) // per_word
    with code.loop(0, rows) as row:
        token = code.load_integer(ids + row.index * 8)
        column = w + token // COMPILED_WIDTH * lines * LINE_BYTES + token % COMPILED_WIDTH * 4
        scale = code.load(scales + token * 4) if weights == "int8" else None
        position = wpe + code.load_integer(positions + row.index * 8) * k * 4
        out = x + row.index * x_stride

        def add(at: Value, j: int) -> None:
            number = widen(code, weights, code.load(column + at // per_word * LINE_BYTES, WORD), j)
            number = number if scale is None else number * scale
            code.store(number + code.load(position + (at + j) * 4), out + (at + j) * 4)

        with code.loop(0, k, per_word) as many:
            for j in range(per_word):
                add(many.index, j)
        for j in range(per_word - 1):
            with code.when(many.index + j < k):
                add(many.index, j)
    code.end()
