"""A product of rows by panels of float32 or compact weights, in LLVM's assembly language: text in, text out.

The text spells out what an optimizing compiler would have to find. A tile of some rows by some panels has all its sums
in registers, goes through K once, and widens each weight once for all its rows. The sum of one row is never split or
reordered, whatever stands beside the row, so that its bits do not depend on its neighbours.

From the inside out: `_tile` multiplies a few rows by a few panels, `_strip` a few rows by all panels, `_multiply` all
rows by all panels.

Grammar: https://llvm.org/docs/LangRef.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastgpt2.engine.kernels.panels import COMPILED_WIDTH, STORED_TYPES

# Bytes that come from memory together.
CACHE_LINE = 64

# Rows and panels of a tile, at most. Each size of tile is a function of its own, compiled at every start.
MAX_TILE_ROWS, MAX_TILE_PANELS = 12, 8

_ARGUMENTS = "ptr %x, i64 %x_stride, ptr %w, i64 %n, i64 %k, ptr %out, i64 %out_stride"


@dataclass(frozen=True, slots=True)
class Registers:
    """The vector registers of a CPU.

    Attributes:
        lanes: float32 numbers in a register.
        sums: registers that may hold sums.
    """

    lanes: int
    sums: int

    @classmethod
    def of(cls, features: set[str]) -> Registers:
        """Return those of a CPU with these features, by LLVM's names."""
        # Of 16 registers four are needed for other things than sums, of 32 eight.
        if "avx512f" in features:
            return cls(16, 24)
        if "avx" in features:
            return cls(8, 12)
        return cls(4, 24 if "neon" in features else 12)

    @property
    def vectors(self) -> int:  # that a panel's columns take
        return COMPILED_WIDTH // self.lanes

    @property
    def most_rows(self) -> int:
        """Rows of the largest tile of one panel."""
        return min(MAX_TILE_ROWS, self.sums // self.vectors)

    def panels(self, rows: int) -> int:
        """Return the panels of a tile of `rows` rows: sums enough to keep the multipliers busy, and several streams."""
        most = max(1, min(MAX_TILE_PANELS, self.sums // (rows * self.vectors)))
        return 1 << (most.bit_length() - 1)


def write_module(weights: str, registers: Registers) -> str:
    """Return a module with the function `multiply(x, x_stride, w, n, k, out, out_stride, rows)`; strides in bytes.

    With P = COMPILED_WIDTH: out[r, c] = sum over k of x[r, k] * w[c // P, k, c % P]; x float32 [rows, k], w [n, k, P]
    as stored, out float32 [rows, at least n * P].
    """
    most, lanes = registers.most_rows, registers.lanes
    sizes = {(rows, panels) for rows in range(1, most + 1) for panels in (1, registers.panels(rows))}
    tiles = [_tile(weights, lanes, rows, panels) for rows, panels in sorted(sizes)]
    strips = [_strip(weights, rows, registers.panels(rows)) for rows in range(1, most + 1)]
    vector = f"<{lanes} x float>"
    declarations = (
        f"declare {vector} @llvm.fmuladd.v{lanes}f32({vector}, {vector}, {vector})\n"
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"
    )
    return "\n\n".join((declarations, *tiles, *strips, _multiply(weights, most))) + "\n"


class _Function:
    """The lines of one function while it is written, and the names in it, each of which is given once."""

    def __init__(self, head: str) -> None:
        self.lines = [head + " {", "entry:"]
        self.block = "entry"
        self._names = 0

    def __str__(self) -> str:
        return "\n".join((*self.lines, "}"))

    def do(self, instruction: str) -> None:
        """Add an instruction that gives nothing."""
        self.lines.append("  " + instruction)

    def let(self, instruction: str) -> str:
        """Add an instruction, and return the name of what it gives."""
        self._names += 1
        self.do(f"%v{self._names} = {instruction}")
        return f"%v{self._names}"

    def at(self, base: str, offset: str | int) -> str:
        """Return the name of the address `offset` bytes after `base`."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {offset}")

    def begin(self, block: str) -> None:
        self.lines.append(f"{block}:")
        self.block = block

    def loop(
        self,
        name: str,
        bounds: tuple[str, str],
        step: str | int,
        carried: tuple[str, Sequence[str]],
        body: Callable[[str, list[str]], list[str]],
    ) -> list[str]:
        """Add a loop from the first bound on, in steps, for as long as a whole step is left.

        Args:
            carried: the type of the values that go from one round to the next, and what they are at first.
            body: writes one round; gets the names of the counter and of the values, returns those of the new values.

        Returns:
            The names of the counter and of the values after the loop.
        """
        first, last = bounds
        kind, values = carried
        came_from = self.block
        slots = [f"%{name}.{i}" for i in range(len(values))]
        limit = self.let(f"sub i64 {last}, {step}")
        self.do(f"br label %{name}")
        self.begin(name)
        head = len(self.lines)
        self.do(f"%{name}.more = icmp sle i64 %{name}.i, {limit}")
        self.do(f"br i1 %{name}.more, label %{name}.body, label %{name}.done")
        self.begin(f"{name}.body")
        new_values = body(f"%{name}.i", slots)
        self.do(f"%{name}.next = add i64 %{name}.i, {step}")
        self.do(f"br label %{name}")
        back = self.block
        heads = [f"  %{name}.i = phi i64 [ {first}, %{came_from} ], [ %{name}.next, %{back} ]"]
        heads += [
            f"  {slot} = phi {kind} [ {value}, %{came_from} ], [ {new}, %{back} ]"
            for slot, value, new in zip(slots, values, new_values, strict=True)
        ]
        self.lines[head:head] = heads
        self.begin(f"{name}.done")
        return [f"%{name}.i", *slots]

    def switch(self, value: str, most: int, case: str, otherwise: str) -> None:
        """Go to the block `case` + N for a value N from 1 to `most`, else to `otherwise`."""
        cases = " ".join(f"i64 {n}, label %{case}{n}" for n in range(1, most + 1))
        self.do(f"switch i64 {value}, label %{otherwise} [ {cases} ]")

    def call(self, name: str, w: str, x: str, out: str, n: str) -> None:
        self.do(f"call void @{name}(ptr {x}, i64 %x_stride, ptr {w}, i64 {n}, i64 %k, ptr {out}, i64 %out_stride)")


def _load_widened(f: _Function, weights: str, lanes: int, address: str) -> str:
    """Load a vector of stored weights as float32; of int8 the whole numbers."""
    stored = STORED_TYPES[weights]
    loaded = f.let(f"load <{lanes} x {stored.llvm}>, ptr {address}, align {stored.itemsize}")
    if weights == "float32":
        return loaded
    whole, vector = f"<{lanes} x i32>", f"<{lanes} x float>"
    if weights == "int8":
        number = f.let(f"sext <{lanes} x i8> {loaded} to {whole}")
        return f.let(f"sitofp {whole} {number} to {vector}")
    # A bfloat16 is the upper half of a float32.
    bits = f.let(f"zext <{lanes} x i16> {loaded} to {whole}")
    shifted = f.let(f"shl {whole} {bits}, <{', '.join(['i32 16'] * lanes)}>")
    return f.let(f"bitcast {whole} {shifted} to {vector}")


def _load_repeated(f: _Function, lanes: int, address: str) -> str:
    """Load one float32 into every lane of a vector."""
    vector = f"<{lanes} x float>"
    one = f.let(f"insertelement {vector} poison, float {f.let(f'load float, ptr {address}, align 4')}, i32 0")
    return f.let(f"shufflevector {vector} {one}, {vector} poison, <{lanes} x i32> zeroinitializer")


def _add_products(
    f: _Function, weights: str, lanes: int, xs: Sequence[str], places: Sequence[str], sums: Sequence[str]
) -> list[str]:
    """Add one product to each sum: of every row's number, at `xs`, and every vector of weights, at `places`."""
    vector, result = f"<{lanes} x float>", list(sums)

    def add(row: int, column: int, number: str, weight: str) -> None:
        place = row * len(places) + column
        operands = ", ".join(f"{vector} {value}" for value in (number, weight, sums[place]))
        result[place] = f.let(f"call {vector} @llvm.fmuladd.v{lanes}f32({operands})")

    # Whichever of the two are fewer stay in registers while the others pass by.
    if len(xs) <= len(places):
        numbers = [_load_repeated(f, lanes, x) for x in xs]
        for column, place in enumerate(places):
            weight = _load_widened(f, weights, lanes, place)
            for row, number in enumerate(numbers):
                add(row, column, number, weight)
    else:
        columns = [_load_widened(f, weights, lanes, place) for place in places]
        for row, x in enumerate(xs):
            number = _load_repeated(f, lanes, x)
            for column, weight in enumerate(columns):
                add(row, column, number, weight)
    return result


def _tile(weights: str, lanes: int, rows: int, panels: int) -> str:
    """Write the function that multiplies some rows by some panels that follow each other; it does not look at `n`."""
    f = _Function(f"define internal void @tile_{rows}_{panels}({_ARGUMENTS})")
    vector, vectors, itemsize = f"<{lanes} x float>", COMPILED_WIDTH // lanes, STORED_TYPES[weights].itemsize
    row_bytes = COMPILED_WIDTH * itemsize
    panel_bytes = f.let(f"mul i64 %k, {row_bytes}")
    xs, ws = ["%x"], ["%w"]
    for _ in range(1, rows):
        xs.append(f.at(xs[-1], "%x_stride"))
    for _ in range(1, panels):
        ws.append(f.at(ws[-1], panel_bytes))
    # What the next tile will read: a core that reads one stream does not ask for the next one by itself.
    ahead = f.let(f"mul i64 {panel_bytes}, {panels}")
    prefetches = rows > 1 or weights == "int8"

    def one_k(k: str, sums: list[str]) -> list[str]:
        at_x, at_w = f.let(f"mul i64 {k}, 4"), f.let(f"mul i64 {k}, {row_bytes}")
        places = [f.at(f.at(w, at_w), i * lanes * itemsize) for w in ws for i in range(vectors)]
        return _add_products(f, weights, lanes, [f.at(x, at_x) for x in xs], places, sums)

    def one_line(k: str, sums: list[str]) -> list[str]:
        if prefetches:
            at = f.let(f"mul i64 {k}, {row_bytes}")
            for w in ws:
                address = f.at(f.at(w, at), ahead)
                f.do(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 3, i32 1)")
        for i in range(CACHE_LINE // row_bytes):
            sums = one_k(f.let(f"add i64 {k}, {i}"), sums)
        return sums

    zeros = ["zeroinitializer"] * (rows * panels * vectors)
    at, *sums = f.loop("lines", ("0", "%k"), CACHE_LINE // row_bytes, (vector, zeros), one_line)
    _, *sums = f.loop("rest", (at, "%k"), 1, (vector, sums), one_k)
    out = "%out"
    for row in range(rows):
        if row:
            out = f.at(out, "%out_stride")
        for i in range(panels * vectors):
            f.do(f"store {vector} {sums[row * panels * vectors + i]}, ptr {f.at(out, i * lanes * 4)}, align 4")
    f.do("ret void")
    return str(f)


def _at_panel(f: _Function, weights: str, panel: str) -> tuple[str, str]:
    """Return the address of a panel, and that of its columns in the first row of the result."""
    panel_bytes = f.let(f"mul i64 %k, {COMPILED_WIDTH * STORED_TYPES[weights].itemsize}")
    w = f.at("%w", f.let(f"mul i64 {panel}, {panel_bytes}"))
    return w, f.at("%out", f.let(f"mul i64 {panel}, {COMPILED_WIDTH * 4}"))


def _strip(weights: str, rows: int, panels: int) -> str:
    """Write the function for some rows by all n panels: as many panels at a time as a tile holds, then one by one."""
    f = _Function(f"define internal void @strip_{rows}({_ARGUMENTS})")

    def call_tile(panels: int, panel: str, _values: list[str]) -> list[str]:
        w, out = _at_panel(f, weights, panel)
        f.call(f"tile_{rows}_{panels}", w, "%x", out, "%n")
        return []

    (at,) = f.loop("several", ("0", "%n"), panels, ("", ()), partial(call_tile, panels))
    f.loop("single", (at, "%n"), 1, ("", ()), partial(call_tile, 1))
    f.do("ret void")
    return str(f)


def _multiply(weights: str, most: int) -> str:
    """Write the function for all rows by all panels: few rows are one strip, more go in equal parts."""
    f = _Function(f"define void @multiply({_ARGUMENTS}, i64 %rows)")
    f.switch("%rows", most, "strip", "many")
    for rows in range(1, most + 1):
        f.begin(f"strip{rows}")
        f.call(f"strip_{rows}", "%w", "%x", "%out", "%n")
        f.do("ret void")
    f.begin("many")
    parts = f.let(f"udiv i64 {f.let(f'add i64 %rows, {most - 1}')}, {most}")

    def all_rows(panel: str, _values: list[str]) -> list[str]:
        w, out = _at_panel(f, weights, panel)
        _loop_over_parts(f, most, parts, w, out)
        return []

    # A panel at a time, so that each is read from memory once.
    f.loop("panels", ("0", "%n"), 1, ("", ()), all_rows)
    f.do("ret void")
    return str(f)


def _loop_over_parts(f: _Function, most: int, parts: str, w: str, out: str) -> None:
    """Write the loop for all rows by one panel, a part of the rows in each round."""

    def one_part(index: str, _values: list[str]) -> list[str]:
        first = f.let(f"udiv i64 {f.let(f'mul i64 %rows, {index}')}, {parts}")
        following = f.let(f"add i64 {index}, 1")
        stop = f.let(f"udiv i64 {f.let(f'mul i64 %rows, {following}')}, {parts}")
        x = f.at("%x", f.let(f"mul i64 {first}, %x_stride"))
        rows_out = f.at(out, f.let(f"mul i64 {first}, %out_stride"))
        f.switch(f.let(f"sub i64 {stop}, {first}"), most, "part", "parted")
        for rows in range(1, most + 1):
            f.begin(f"part{rows}")
            f.call(f"tile_{rows}_1", w, x, rows_out, "1")
            f.do("br label %parted")
        f.begin("parted")
        return []

    f.loop("parts", ("0", parts), 1, ("", ()), one_part)
