"""A product of rows by panels of float32 or compact weights, as LLVM's assembly language: text in, text out.

What is written down is what an optimizing compiler would have to find: a tile of some rows by some panels has all its
sums in registers, goes through K once, and widens each weight once for all its rows. Sums of one row are never split
or reordered, whatever stands beside it, so that its bits do not depend on its neighbours.

Grammar: https://llvm.org/docs/LangRef.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Columns of a panel: a row of it is one or two registers wide on every CPU, and four panels read side by side are four
# streams, which keep one core's share of the memory busy.
WIDTH = 16

# The type of a stored weight, and its size.
STORED = {"float32": ("float", 4), "bfloat16": ("i16", 2), "int8": ("i8", 1)}
CACHE_LINE = 64
_ARGUMENTS = "ptr %x, i64 %x_stride, ptr %w, i64 %n, i64 %k, ptr %out, i64 %out_stride"


@dataclass(frozen=True, slots=True)
class Registers:
    """Of a CPU: float32 numbers in a vector register, and how many such registers may hold sums."""

    lanes: int
    sums: int

    @classmethod
    def of(cls, features: set[str]) -> Registers:
        """By LLVM's names of what the CPU has. Of 16 registers four are needed otherwise, of 32 eight."""
        if "avx512f" in features:
            return cls(16, 24)
        return cls(8, 12) if "avx" in features else cls(4, 24 if "neon" in features else 12)

    @property
    def vectors(self) -> int:
        """Registers for a panel's columns."""
        return WIDTH // self.lanes

    @property
    def most_rows(self) -> int:
        """Rows of a tile of one panel."""
        return min(12, self.sums // self.vectors)

    def panels(self, rows: int) -> int:
        """Panels of a tile of so many rows: sums enough to keep the multipliers busy, and several streams."""
        most = max(1, min(8, self.sums // (rows * self.vectors)))
        return 1 << (most.bit_length() - 1)


def module(weights: str, registers: Registers) -> str:
    """The function `multiply(x, x_stride, w, n, k, out, out_stride, rows)`; strides in bytes.

    out[r, c] = sum over k of x[r, k] * w[c // WIDTH, k, c % WIDTH]; x float32 [rows, k], w [n, k, WIDTH] as stored,
    out float32 [rows, at least n * WIDTH].
    """
    most, lanes = registers.most_rows, registers.lanes
    sizes = {(rows, panels) for rows in range(1, most + 1) for panels in (1, registers.panels(rows))}
    tiles = [_tile(weights, lanes, rows, panels) for rows, panels in sorted(sizes)]
    strips = [_strip(weights, rows, registers.panels(rows)) for rows in range(1, most + 1)]
    vector = f"<{lanes} x float>"
    declared = (
        f"declare {vector} @llvm.fmuladd.v{lanes}f32({vector}, {vector}, {vector})\n"
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"
    )
    return "\n\n".join((declared, *tiles, *strips, _multiply(weights, most))) + "\n"


class _Function:
    """Lines of one function, and names that occur once in it."""

    def __init__(self, head: str) -> None:
        self.lines = [head + " {", "entry:"]
        self.block = "entry"
        self._names = 0

    def __str__(self) -> str:
        return "\n".join((*self.lines, "}"))

    def do(self, instruction: str) -> None:
        self.lines.append("  " + instruction)

    def let(self, instruction: str) -> str:
        """The name of what an instruction gives."""
        self._names += 1
        self.do(f"%v{self._names} = {instruction}")
        return f"%v{self._names}"

    def at(self, base: str, offset: str | int) -> str:
        """An address so many bytes further on."""
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
        """For i from the first bound, in steps, as long as a whole step is left: `body` turns values into new ones.

        Args:
            carried: the type of the values, and what they are at first.

        Returns:
            The counter and the values after it.
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
        found = body(f"%{name}.i", slots)
        self.do(f"%{name}.next = add i64 %{name}.i, {step}")
        self.do(f"br label %{name}")
        back = self.block
        heads = [f"  %{name}.i = phi i64 [ {first}, %{came_from} ], [ %{name}.next, %{back} ]"]
        heads += [
            f"  {slot} = phi {kind} [ {value}, %{came_from} ], [ {new}, %{back} ]"
            for slot, value, new in zip(slots, values, found, strict=True)
        ]
        self.lines[head:head] = heads
        self.begin(f"{name}.done")
        return [f"%{name}.i", *slots]


def _widened(f: _Function, weights: str, lanes: int, address: str) -> str:
    """A vector of stored weights as float32; of int8 the whole numbers."""
    stored, size = STORED[weights]
    loaded = f.let(f"load <{lanes} x {stored}>, ptr {address}, align {size}")
    if weights == "float32":
        return loaded
    whole, vector = f"<{lanes} x i32>", f"<{lanes} x float>"
    if weights == "int8":
        number = f.let(f"sext <{lanes} x i8> {loaded} to {whole}")
        return f.let(f"sitofp {whole} {number} to {vector}")
    # The upper half of a float32.
    bits = f.let(f"zext <{lanes} x i16> {loaded} to {whole}")
    shifted = f.let(f"shl {whole} {bits}, <{', '.join(['i32 16'] * lanes)}>")
    return f.let(f"bitcast {whole} {shifted} to {vector}")


def _repeated(f: _Function, lanes: int, address: str) -> str:
    """One float32 in every lane of a vector."""
    vector = f"<{lanes} x float>"
    one = f.let(f"insertelement {vector} poison, float {f.let(f'load float, ptr {address}, align 4')}, i32 0")
    return f.let(f"shufflevector {vector} {one}, {vector} poison, <{lanes} x i32> zeroinitializer")


def _multiplied(
    f: _Function, weights: str, lanes: int, xs: Sequence[str], places: Sequence[str], sums: Sequence[str]
) -> list[str]:
    """Sums, with one more product each: of every row's number, at `xs`, and every vector of weights, at `places`."""
    vector, result = f"<{lanes} x float>", list(sums)

    def add(row: int, column: int, number: str, weight: str) -> None:
        place = row * len(places) + column
        operands = ", ".join(f"{vector} {value}" for value in (number, weight, sums[place]))
        result[place] = f.let(f"call {vector} @llvm.fmuladd.v{lanes}f32({operands})")

    # Whichever of the two are fewer stay in registers while the others pass by.
    if len(xs) <= len(places):
        numbers = [_repeated(f, lanes, x) for x in xs]
        for column, place in enumerate(places):
            weight = _widened(f, weights, lanes, place)
            for row, number in enumerate(numbers):
                add(row, column, number, weight)
    else:
        columns = [_widened(f, weights, lanes, place) for place in places]
        for row, x in enumerate(xs):
            number = _repeated(f, lanes, x)
            for column, weight in enumerate(columns):
                add(row, column, number, weight)
    return result


def _tile(weights: str, lanes: int, rows: int, panels: int) -> str:
    """Some rows by some panels that follow each other; `n` is not looked at."""
    f = _Function(f"define internal void @tile_{rows}_{panels}({_ARGUMENTS})")
    vector, vectors, size = f"<{lanes} x float>", WIDTH // lanes, STORED[weights][1]
    row_bytes = WIDTH * size
    panel_bytes = f.let(f"mul i64 %k, {row_bytes}")
    xs, ws = ["%x"], ["%w"]
    for _ in range(1, rows):
        xs.append(f.at(xs[-1], "%x_stride"))
    for _ in range(1, panels):
        ws.append(f.at(ws[-1], panel_bytes))
    # What the next tile will read; a core that reads one stream does not ask for the next one by itself.
    ahead = f.let(f"mul i64 {panel_bytes}, {panels}")
    prefetches = rows > 1 or weights == "int8"

    def multiplied(k: str, sums: list[str]) -> list[str]:
        at_x, at_w = f.let(f"mul i64 {k}, 4"), f.let(f"mul i64 {k}, {row_bytes}")
        places = [f.at(f.at(w, at_w), i * lanes * size) for w in ws for i in range(vectors)]
        return _multiplied(f, weights, lanes, [f.at(x, at_x) for x in xs], places, sums)

    def lines(k: str, sums: list[str]) -> list[str]:
        """As many k as fill a cache line of a panel."""
        if prefetches:
            at = f.let(f"mul i64 {k}, {row_bytes}")
            for w in ws:
                address = f.at(f.at(w, at), ahead)
                f.do(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 3, i32 1)")
        for i in range(CACHE_LINE // row_bytes):
            sums = multiplied(f.let(f"add i64 {k}, {i}"), sums)
        return sums

    zeros = ["zeroinitializer"] * (rows * panels * vectors)
    at, *sums = f.loop("lines", ("0", "%k"), CACHE_LINE // row_bytes, (vector, zeros), lines)
    _, *sums = f.loop("rest", (at, "%k"), 1, (vector, sums), multiplied)
    out = "%out"
    for row in range(rows):
        if row:
            out = f.at(out, "%out_stride")
        for i in range(panels * vectors):
            f.do(f"store {vector} {sums[row * panels * vectors + i]}, ptr {f.at(out, i * lanes * 4)}, align 4")
    f.do("ret void")
    return str(f)


def _call(f: _Function, name: str, w: str, x: str, out: str, n: str) -> None:
    """Of a tile or a strip."""
    f.do(f"call void @{name}(ptr {x}, i64 %x_stride, ptr {w}, i64 {n}, i64 %k, ptr {out}, i64 %out_stride)")


def _at_panel(f: _Function, weights: str, panel: str) -> tuple[str, str]:
    """Where a panel begins, and its columns in the first row of the result."""
    panel_bytes = f.let(f"mul i64 %k, {WIDTH * STORED[weights][1]}")
    return f.at("%w", f.let(f"mul i64 {panel}, {panel_bytes}")), f.at("%out", f.let(f"mul i64 {panel}, {WIDTH * 4}"))


def _strip(weights: str, rows: int, panels: int) -> str:
    """Some rows by all n panels, as many at a time as a tile holds, then one at a time."""
    f = _Function(f"define internal void @strip_{rows}({_ARGUMENTS})")

    def tiles(panels: int) -> Callable[[str, list[str]], list[str]]:
        def body(panel: str, _values: list[str]) -> list[str]:
            w, out = _at_panel(f, weights, panel)
            _call(f, f"tile_{rows}_{panels}", w, "%x", out, "%n")
            return []

        return body

    (at,) = f.loop("several", ("0", "%n"), panels, ("", ()), tiles(panels))
    f.loop("single", (at, "%n"), 1, ("", ()), tiles(1))
    f.do("ret void")
    return str(f)


def _multiply(weights: str, most: int) -> str:
    """Few rows in one strip; more in equal parts, a panel at a time, so that it is read from memory once."""
    f = _Function(f"define void @multiply({_ARGUMENTS}, i64 %rows)")
    few = " ".join(f"i64 {rows}, label %strip{rows}" for rows in range(1, most + 1))
    f.do(f"switch i64 %rows, label %many [ {few} ]")
    for rows in range(1, most + 1):
        f.begin(f"strip{rows}")
        _call(f, f"strip_{rows}", "%w", "%x", "%out", "%n")
        f.do("ret void")
    f.begin("many")
    parts = f.let(f"udiv i64 {f.let(f'add i64 %rows, {most - 1}')}, {most}")

    def panel(index: str, _values: list[str]) -> list[str]:
        w, out = _at_panel(f, weights, index)
        _parts(f, most, parts, w, out)
        return []

    f.loop("panels", ("0", "%n"), 1, ("", ()), panel)
    f.do("ret void")
    return str(f)


def _parts(f: _Function, most: int, parts: str, w: str, out: str) -> None:
    """All rows by one panel."""

    def part(index: str, _values: list[str]) -> list[str]:
        first = f.let(f"udiv i64 {f.let(f'mul i64 %rows, {index}')}, {parts}")
        following = f.let(f"add i64 {index}, 1")
        stop = f.let(f"udiv i64 {f.let(f'mul i64 %rows, {following}')}, {parts}")
        x = f.at("%x", f.let(f"mul i64 {first}, %x_stride"))
        rows_out = f.at(out, f.let(f"mul i64 {first}, %out_stride"))
        cases = " ".join(f"i64 {rows}, label %part{rows}" for rows in range(1, most + 1))
        f.do(f"switch i64 {f.let(f'sub i64 {stop}, {first}')}, label %parted [ {cases} ]")
        for rows in range(1, most + 1):
            f.begin(f"part{rows}")
            _call(f, f"tile_{rows}_1", w, x, rows_out, "1")
            f.do("br label %parted")
        f.begin("parted")
        return []

    f.loop("parts", ("0", parts), 1, ("", ()), part)
