"""A program: the calls of a step, one after the other, the compiled ones without coming back to Python in between.

A step of a small batch is some hundred operations, of which many take a microsecond. Python would take as long to call
each. So compiled calls that follow each other are put into a table of addresses, and one compiled operation, `run`,
goes through it. Where processes meet, `arrive` tells the others, and `wait` looks for them; if they do not come soon,
`run` returns to Python, which waits asleep and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.machine_code import MachineCode, caller, load_code

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.ir import Module

# Looks for another process before it is waited for asleep: some hundred microseconds.
LOOKS = 20_000

# What a program is made of: a function of Python, or a `NativeCall`.
Call = Callable[[], None]


class Meeting(Protocol):
    """The place where processes wait for each other.

    Attributes:
        count: one integer of this process: how often it has come.
        own: where it tells that to the others, in memory that all share.
        others: where the others tell it, one integer each.
        arrived_at: when it came last in a step, by `time.monotonic`.
    """

    count: memoryview
    own: memoryview
    arrived_at: float

    @property
    def others(self) -> Sequence[memoryview]: ...

    def wait(self) -> None:
        """Come, and return when every other process has come."""

    def wait_asleep(self) -> None:
        """Return when every other process has come, after this one has; what is wrong with them is raised."""


def arguments_of(*arguments: NDArray[Any] | float) -> NDArray[np.int64]:
    """Return arguments as an operation reads them, 64 bits each: of an array the address, of a float the float32."""
    block = np.zeros(len(arguments), np.int64)
    for place, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray):
            block[place] = argument.ctypes.data
        elif isinstance(argument, float):
            block[place : place + 1].view(np.float32)[0] = argument
        else:
            block[place] = argument
    return block


class NativeCall:
    """Compiled operations with their arguments, to be run one after the other.

    Args:
        operations: the address of each, and its arguments as 64-bit integers.
        keep: what the arguments are addresses of.
        meeting: where it is waited for others, if one of them does.
    """

    __slots__ = ("_keep", "meeting", "operations")

    def __init__(
        self, operations: Sequence[tuple[int, NDArray[np.int64]]], keep: Any, meeting: Meeting | None = None
    ) -> None:
        self.operations, self._keep, self.meeting = operations, keep, meeting

    def __call__(self) -> None:
        for address, arguments in self.operations:
            while caller(address)(arguments.ctypes.data):
                assert self.meeting is not None
                self.meeting.wait_asleep()


class Program:
    """Calls to be made in this order, as often as wanted."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self._parts: list[Call] = []
        for is_native, group in groupby(calls, lambda call: isinstance(call, NativeCall)):
            following: list[Any] = list(group)
            self._parts += [_Stretch(following)] if is_native else following

    def run(self) -> None:
        for part in self._parts:
            part()


class _Stretch:
    """Compiled calls that follow each other."""

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        rows = [(address, arguments.ctypes.data) for call in calls for address, arguments in call.operations]
        self._table, self._keep = np.array(rows, np.int64), calls
        self._meeting = next((call.meeting for call in calls if call.meeting is not None), None)
        self._run = caller(load_program_code().address("run"))
        # The table, how many rows it has, and the row to go on from, which `run` changes.
        self._arguments = np.array([self._table.ctypes.data, len(rows), 0], np.int64)
        self._address = self._arguments.ctypes.data

    def __call__(self) -> None:
        self._arguments[2] = 0
        while self._run(self._address):
            assert self._meeting is not None
            self._meeting.wait_asleep()


def meet(meeting: Meeting) -> NativeCall:
    """Return a call that comes to a meeting and waits for the others."""
    code = load_program_code()
    count, own = np.asarray(meeting.count), np.asarray(meeting.own)
    others = arguments_of(*(np.asarray(other) for other in meeting.others))
    arrive, wait = arguments_of(count, own), arguments_of(count, others, len(others), LOOKS)
    operations = ((code.address("arrive"), arrive), (code.address("wait"), wait))
    return NativeCall(operations, (others, meeting), meeting)


def load_program_code() -> MachineCode:
    """Return the operations that run programs. Raises BadRequest if llvmlite is not installed, or cannot be used."""
    return load_code("program", lambda module, _instructions: write_program(module))


def write_program(module: Module) -> None:
    """Write the operations `run`, `arrive` and `wait`."""
    code = module.operation("run")
    table, n, first = code.arguments("pii")
    (block,) = code.parameters
    with code.loop(first, n) as row:
        place = table + row.index * 16
        status = code.call_address(code.load_integer(place), code.load_address(place + 8))
        with code.when(status > 0):
            code.store(row.index, block + 16, align=8)
        code.return_if(status > 0, status)
    code.end()

    code = module.operation("arrive")
    count, own = code.arguments("pp")
    arrivals = code.load_integer(count) + 1
    code.store(arrivals, count, align=8)
    code.store_shared(arrivals, own)
    code.end()

    code = module.operation("wait")
    count, others, n, looks = code.arguments("ppii")
    arrivals = code.load_integer(count)
    with code.loop(0, n) as other:
        place = code.load_address(others + other.index * 8)
        with code.loop(0, looks, 1, [code.value(1)]) as look:
            here = code.load_shared(place) >= arrivals
            code.pause()
            look.values[0] = code.where(here, 0, look.values[0])
            look.following = code.where(here, looks, look.following)
        code.return_if(look.values[0] > 0, code.value(1))
    code.end()
