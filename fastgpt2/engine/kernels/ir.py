"""The language that compiled operations are written in: numbers, vectors and addresses with NumPy's operators.

What an operation writes in Python, once, becomes instructions of LLVM, which run many times: `x * y + 1.0` adds two
instructions to the function that is being written, and a number beside a vector is repeated in every lane, as NumPy
broadcasts it. A vector may be of any length: LLVM cuts it into the registers that there are. Nothing is reordered:
sums come in the order in which they are written, so that their bits depend on nothing else.

It is a thin layer on `llvmlite.ir`, whose builder checks types but has no operators, and no loops: those are phi nodes
and branches, which hide a formula as well as an assembler does.

Grammar of what comes out: https://llvm.org/docs/LangRef.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

FLOAT, INT, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(8)
WORD = ir.IntType(32)  # what one lane of a register holds: a float32, two bfloat16 or four int8
POINTER = ir.PointerType()


class _BFloatType(ir.Type):  # type: ignore[misc]  # llvmlite has no name for it
    null = "0.0"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


BFLOAT = _BFloatType()

# Parameters by a letter: an address, an integer, a float32.
KINDS = {"p": POINTER, "i": INT, "f": FLOAT}

# exp: Cephes' expf (Moshier 1992), the polynomial on [-ln(2) / 2, ln(2) / 2] and ln(2) in two parts.
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Beyond these, exp is 0, or would not be finite.
_EXP_LEAST, _EXP_MOST = -87.33, 88.37

# Adding 1.5 * 2**23 to a float32 leaves the nearest whole number in its lowest bits, ties to even.
ROUNDING = 12582912.0
ROUNDING_BITS = 0x4B400000


class Value:
    """A number, a vector or an address in the function that `code` writes; operators write instructions.

    A Python number takes the type of the other operand. A number beside a vector is repeated in every lane.
    """

    __slots__ = ("code", "llvm")

    def __init__(self, code: Code, llvm: Any) -> None:
        self.code, self.llvm = code, llvm

    @property
    def type(self) -> Any:
        return self.llvm.type

    @property
    def lanes(self) -> int:
        return int(self.type.count) if isinstance(self.type, ir.VectorType) else 1

    @property
    def element(self) -> Any:
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    def _operate(self, other: Operand, of_floats: str, of_integers: str, swapped: bool = False) -> Value:
        left, right = self.code.alike(self, other)
        if swapped:
            left, right = right, left
        operation = of_floats if left.element == FLOAT else of_integers
        return Value(self.code, getattr(self.code.builder, operation)(left.llvm, right.llvm))

    def __add__(self, other: Operand) -> Value:
        if self.type == POINTER:
            return self.code.offset(self, other)
        return self._operate(other, "fadd", "add")

    def __radd__(self, other: Operand) -> Value:
        return self._operate(other, "fadd", "add", swapped=True)

    def __sub__(self, other: Operand) -> Value:
        return self._operate(other, "fsub", "sub")

    def __rsub__(self, other: Operand) -> Value:
        return self._operate(other, "fsub", "sub", swapped=True)

    def __mul__(self, other: Operand) -> Value:
        return self._operate(other, "fmul", "mul")

    def __rmul__(self, other: Operand) -> Value:
        return self._operate(other, "fmul", "mul", swapped=True)

    def __truediv__(self, other: Operand) -> Value:
        return self._operate(other, "fdiv", "sdiv")

    def __rtruediv__(self, other: Operand) -> Value:
        return self._operate(other, "fdiv", "sdiv", swapped=True)

    def __floordiv__(self, other: Operand) -> Value:  # of integers that are not negative
        return self._operate(other, "", "udiv")

    def __mod__(self, other: Operand) -> Value:
        return self._operate(other, "", "urem")

    def __and__(self, other: Operand) -> Value:
        return self._operate(other, "", "and_")

    def __xor__(self, other: Operand) -> Value:
        return self._operate(other, "", "xor")

    def __lshift__(self, other: Operand) -> Value:
        return self._operate(other, "", "shl")

    def __rshift__(self, other: Operand) -> Value:  # which keeps the sign
        return self._operate(other, "", "ashr")

    def _compare(self, sign: str, other: Operand) -> Value:
        left, right = self.code.alike(self, other)
        builder = self.code.builder
        # An ordered comparison with NaN is false.
        compare = builder.fcmp_ordered if left.element == FLOAT else builder.icmp_signed
        return Value(self.code, compare(sign, left.llvm, right.llvm))

    def __lt__(self, other: Operand) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Operand) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Operand) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Operand) -> Value:
        return self._compare(">=", other)


Operand = Value | int | float


class Loop:
    """A loop that is being written.

    Attributes:
        index: the counter; after the loop, where it stopped.
        following: what the counter is in the next round; the body may set it.
        values: what goes from one round to the next. The body sets the new ones; after the loop they are the last ones.
    """

    def __init__(self, index: Value, following: Value, values: Sequence[Value]) -> None:
        self.index, self.following, self.values = index, following, list(values)


class Module:
    """The functions that are compiled together.

    Args:
        lanes: float32 numbers in a register of the CPU.
        x86: whether the CPU is one of that family.

    Attributes:
        operations: the names of those that Python calls.
    """

    def __init__(self, lanes: int, x86: bool) -> None:
        self.x86 = x86
        self.llvm = ir.Module(name="fastgpt2")
        self.lanes = lanes
        self.operations: list[str] = []

    def operation(self, name: str) -> Code:
        """Begin a function that Python calls, with the address of its arguments: 64 bits each.

        It returns 0, or another number if what it waits for has not come.
        """
        self.operations.append(name)
        return Code(self, name, "p", internal=False)

    def function(self, name: str, parameters: str) -> Code:
        """Begin a function that only others of the module call, with parameters of these kinds (`KINDS`)."""
        return Code(self, name, parameters, internal=True)

    def __str__(self) -> str:
        return str(self.llvm)


class Code:
    """One function while it is written.

    Attributes:
        builder: llvmlite's, at the place where the next instruction goes.
        parameters: the function's own.
    """

    def __init__(self, module: Module, name: str, parameters: str, internal: bool) -> None:
        self.module, self._internal = module, internal
        kind = ir.FunctionType(ir.VoidType() if internal else INT, [KINDS[letter] for letter in parameters])
        self.function = ir.Function(module.llvm, kind, name)
        if internal:
            self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.parameters = [Value(self, argument) for argument in self.function.args]

    def arguments(self, kinds: str) -> list[Value]:
        """Return the arguments of an operation, by their kinds: as `KINDS`, or "n" for an integer at an address."""
        (block,) = self.parameters
        found = []
        for place, kind in enumerate(kinds):
            argument = self.load(block + 8 * place, KINDS["p" if kind == "n" else kind], align=8)
            found.append(self.load_integer(argument) if kind == "n" else argument)
        return found

    def end(self) -> None:
        """Return from the function, from an operation with 0: all is done."""
        if self._internal:
            self.builder.ret_void()
        else:
            self.builder.ret(ir.Constant(INT, 0))

    # Constants and types

    def constant(self, number: float, type_: Any = INT) -> Value:
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, [ir.Constant(type_.element, number)] * type_.count))
        return Value(self, ir.Constant(type_, number))

    def floats(self, number: float, lanes: int) -> Value:
        """Return one float32 in every lane."""
        return self.constant(float(number), vector(FLOAT, lanes))

    def alike(self, left: Value, right: Operand) -> tuple[Value, Value]:
        """Return two operands of one type."""
        if not isinstance(right, Value):
            number = float(right) if left.element == FLOAT else int(right)
            return left, self.constant(number, left.type)
        lanes = max(left.lanes, right.lanes)
        return self.repeat(left, lanes), self.repeat(right, lanes)

    def constant_float(self, number: float) -> Value:
        return self.constant(float(number), FLOAT)

    def value(self, number: Operand) -> Value:
        return number if isinstance(number, Value) else self.constant(number)

    def repeat(self, number: Value, lanes: int) -> Value:
        """Return a number in every lane; of a vector, the vector."""
        if lanes == 1 or number.lanes > 1:
            return number
        of = vector(number.type, lanes)
        one = self.builder.insert_element(ir.Constant(of, ir.Undefined), number.llvm, ir.Constant(WORD, 0))
        zeros = ir.Constant(vector(WORD, lanes), [ir.Constant(WORD, 0)] * lanes)
        return Value(self, self.builder.shuffle_vector(one, ir.Constant(of, ir.Undefined), zeros))

    def bitcast(self, value: Value, type_: Any) -> Value:
        return Value(self, self.builder.bitcast(value.llvm, type_))

    def words_in_order(self, lanes: int) -> Value:
        """Return the 32-bit integers 0, 1, 2 and so on, one a lane."""
        return Value(self, ir.Constant(vector(WORD, lanes), [ir.Constant(WORD, lane) for lane in range(lanes)]))

    def word(self, number: Value) -> Value:
        """Return the lower 32 bits of an integer."""
        return Value(self, self.builder.trunc(number.llvm, WORD))

    # Memory

    def offset(self, address: Value, offset: Operand) -> Value:
        if isinstance(offset, int) and offset == 0:
            return address
        return Value(self, self.builder.gep(address.llvm, [self.value(offset).llvm], source_etype=BYTE))

    def load(self, address: Value, type_: Any = FLOAT, align: int = 4) -> Value:
        return Value(self, self.builder.load(address.llvm, typ=type_, align=align))

    def load_integer(self, address: Value) -> Value:
        return self.load(address, INT, align=8)

    def load_address(self, address: Value) -> Value:
        return self.load(address, POINTER, align=8)

    def load_floats(self, address: Value, lanes: int) -> Value:
        return self.load(address, vector(FLOAT, lanes))

    def store(self, value: Value, address: Value, align: int = 4) -> None:
        self.builder.store(value.llvm, address.llvm, align=align)

    def prefetch(self, address: Value) -> None:
        """Ask for the cache line at an address, which is to be read soon, to come into the second cache.

        The first cache has too few requests on the way at a time for what memory gives.
        """
        kind = ir.FunctionType(ir.VoidType(), (POINTER, WORD, WORD, WORD))
        function = self._declare("llvm.prefetch.p0", kind)
        self.builder.call(function, (address.llvm, *(ir.Constant(WORD, number) for number in (0, 2, 1))))

    def load_shared(self, address: Value) -> Value:
        """Load an integer that another process stores. What is loaded after it was stored before (acquire)."""
        return Value(self, self.builder.load_atomic(address.llvm, "acquire", 8, typ=INT))

    def store_shared(self, value: Value, address: Value) -> None:
        """Store an integer for another process, which then sees all that was stored before (release)."""
        store = ir.instructions.StoreAtomicInstr(self.builder.block, value.llvm, address.llvm, "release", 8)
        self.builder._insert(store)

    def room(self, size: int) -> Value:
        """Return the address of some bytes that live as long as the call."""
        with self.builder.goto_entry_block():
            room = self.builder.alloca(ir.ArrayType(BYTE, size))
        room.type = POINTER
        return Value(self, room)

    # Arithmetic that has no operator

    def intrinsic(self, name: str, result: Any, *operands: Value) -> Value:
        """Call one of LLVM's own functions."""
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return Value(self, self.builder.call(self._declare(name, kind), [operand.llvm for operand in operands]))

    def _declare(self, name: str, kind: Any) -> Any:
        known = self.module.llvm.globals.get(name)
        return known if known is not None else ir.Function(self.module.llvm, kind, name)

    def fma(self, a: Value, b: Operand, c: Operand) -> Value:
        """Return a * b + c, rounded once where the CPU can."""
        a, b = self.alike(a, b)
        a, c = self.alike(a, c)
        a, b = self.alike(a, b)
        return self.intrinsic(f"llvm.fmuladd.{_suffix(a)}", a.type, a, b, c)

    def sqrt(self, value: Value) -> Value:
        return self.intrinsic(f"llvm.sqrt.{_suffix(value)}", value.type, value)

    def absolute(self, value: Value) -> Value:
        return self.intrinsic(f"llvm.fabs.{_suffix(value)}", value.type, value)

    def copy_sign(self, magnitude: Value, sign: Value) -> Value:
        return self.intrinsic(f"llvm.copysign.{_suffix(magnitude)}", magnitude.type, magnitude, sign)

    def where(self, condition: Value, yes: Operand, no: Operand) -> Value:
        """Return, lane by lane, one or the other."""
        if isinstance(yes, Value):
            yes, no = self.alike(yes, no)
        else:
            assert isinstance(no, Value)
            no, yes = self.alike(no, yes)
        return Value(self, self.builder.select(condition.llvm, yes.llvm, no.llvm))

    def maximum(self, a: Value, b: Operand) -> Value:
        """Return the larger of two; b if either is NaN."""
        a, b = self.alike(a, b)
        return self.where(a > b, a, b)

    def exp(self, x: Value) -> Value:
        """Return e to the power x, to within about 1.5 units in the last place; 0 below -87.33."""
        bounded = self.where(x < _EXP_LEAST, _EXP_LEAST, x)
        bounded = self.where(bounded > _EXP_MOST, _EXP_MOST, bounded)
        shifted = self.fma(bounded, 1 / math.log(2), ROUNDING)
        power = shifted - ROUNDING
        rest = self.fma(power, -_LN2_HIGH, bounded)
        rest = self.fma(power, -_LN2_LOW, rest)
        polynomial: Value = self.floats(_EXP_POLYNOMIAL[0], x.lanes)
        for coefficient in _EXP_POLYNOMIAL[1:]:
            polynomial = self.fma(polynomial, rest, coefficient)
        result = self.fma(polynomial, rest * rest, rest + 1.0)
        words = vector(WORD, x.lanes)
        scaled = self.bitcast(result, words) + (self.bitcast(shifted, words) << 23)
        return self.where(x < _EXP_LEAST, 0.0, self.bitcast(scaled, x.type))

    def smaller(self, a: Value, b: Value) -> Value:
        return self.where(a < b, a, b)

    def pair(self, first: Value, second: Value) -> Value:
        """Return a vector of two numbers."""
        both = ir.Constant(vector(first.type, 2), ir.Undefined)
        for lane, number in enumerate((first, second)):
            both = self.builder.insert_element(both, number.llvm, ir.Constant(WORD, lane))
        return Value(self, both)

    def part(self, value: Value, first: int, lanes: int) -> Value:
        """Return some lanes of a vector that follow each other."""
        order = ir.Constant(vector(WORD, lanes), [ir.Constant(WORD, first + lane) for lane in range(lanes)])
        if lanes == 1:
            return Value(self, self.builder.extract_element(value.llvm, ir.Constant(WORD, first)))
        nothing = ir.Constant(value.type, ir.Undefined)
        return Value(self, self.builder.shuffle_vector(value.llvm, nothing, order))

    def halves(self, value: Value) -> tuple[Value, Value]:
        half = value.lanes // 2
        return self.part(value, 0, half), self.part(value, half, half)

    def sum(self, value: Value) -> Value:
        """Return the sum of a vector's lanes, by halves; their number is a power of two."""
        while value.lanes > 1:
            first, second = self.halves(value)
            value = first + second
        return value

    def largest(self, value: Value) -> Value:
        while value.lanes > 1:
            value = self.maximum(*self.halves(value))
        return value

    # Control

    @contextmanager
    def loop(self, start: Operand, stop: Operand, step: Operand = 1, carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """Write a loop from `start`, in steps, for as long as a whole step is left before `stop`.

        Args:
            carried: the values that go from one round to the next, as they are at first.
        """
        builder, before = self.builder, self.builder.block
        limit = self.value(stop) - step
        head, body, done = (self.function.append_basic_block(name) for name in ("loop", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INT)
        index.add_incoming(self.value(start).llvm, before)
        slots = [builder.phi(value.type) for value in carried]
        for slot, value in zip(slots, carried, strict=True):
            slot.add_incoming(value.llvm, before)
        builder.cbranch(builder.icmp_signed("<=", index, limit.llvm), body, done)
        builder.position_at_end(body)
        loop = Loop(Value(self, index), Value(self, index) + step, [Value(self, slot) for slot in slots])
        yield loop
        back = builder.block
        builder.branch(head)
        index.add_incoming(loop.following.llvm, back)
        for slot, value in zip(slots, loop.values, strict=True):
            slot.add_incoming(value.llvm, back)
        builder.position_at_end(done)
        loop.values = [Value(self, slot) for slot in slots]

    def each(self, n: Value, lanes: int) -> Iterator[tuple[Value, int]]:
        """Write a pass over n float32: `lanes` at a time, then one by one; yields the offset in bytes and the lanes.

        What is written in between is written twice, once for vectors and once for single numbers.
        """
        with self.loop(0, n, lanes) as many:
            yield many.index * 4, lanes
        with self.loop(many.index, n) as one:
            yield one.index * 4, 1

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Write what is done only if a condition holds."""
        with self.builder.if_then(condition.llvm):
            yield

    def choose(self, number: Value, cases: Sequence[int]) -> Iterator[int]:
        """Write a case for each of some values of a number, while it is yielded; other numbers do nothing."""
        blocks = [self.function.append_basic_block("case") for _ in cases]
        done = self.function.append_basic_block("chosen")
        switch = self.builder.switch(number.llvm, done)
        for case, block in zip(cases, blocks, strict=True):
            switch.add_case(ir.Constant(INT, case), block)
            self.builder.position_at_end(block)
            yield case
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def call_address(self, address: Value, argument: Value) -> Value:
        """Call an operation at an address; return its status."""
        operation = self.builder.inttoptr(address.llvm, ir.FunctionType(INT, (POINTER,)).as_pointer())
        return Value(self, self.builder.call(operation, (argument.llvm,)))

    def return_if(self, condition: Value, status: Value) -> None:
        """Return from an operation at once if a condition holds."""
        with self.builder.if_then(condition.llvm):
            self.builder.ret(status.llvm)

    def pause(self) -> None:
        """Tell the CPU that it waits for another one, where there is a word for that."""
        if self.module.x86:
            kind = ir.FunctionType(ir.VoidType(), ())
            self.builder.call(self._declare("llvm.x86.sse2.pause", kind), ())

    def call(self, other: Code, *arguments: Operand) -> None:
        self.builder.call(other.function, [self.value(argument).llvm for argument in arguments])


def vector(element: Any, lanes: int) -> Any:
    """Return the type of a vector; of one lane, that of the number."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def _suffix(value: Value) -> str:
    return "f32" if value.lanes == 1 else f"v{value.lanes}f32"
