"""The pickles that torch.save writes, read by a machine that can make values and do nothing else.

A pickle is a program. Python's own machine imports and calls whatever it names. This one imports nothing and calls
nothing but the few functions below. A name that it knows becomes a record (`torch_names`), a name that it does not
know ends it.

Everything is bounded before memory is spent: bytes, opcodes (so also values, and entries of the memo), lengths, and
what a tensor may refer to within its storage. Of what no weights depend on (bytes, sets, objects of training), only
the name is kept.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgpt2.engine.model.torch_names import DType, Function, Inert, StorageType, look_up

# gpt2-xl's weights take 25,000 opcodes and 0.1 MB, with the state of an optimizer three times as much.
MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 1 << 19
MAX_MARKS = 1000
MAX_DIMENSIONS = 64
_MAX_SIZE = 1 << 48
_MAX_NAME_BYTES = 256
_MAX_LONG_BYTES = 256
_MAX_QUOTED = 80
_NEWEST_PROTOCOL = 5

# Keys of a dict are compared by Python. Texts have random hashes, and numbers of 32 bits cannot be chosen to collide.
_MAX_KEY = 1 << 31


class BadPickle(ValueError):
    """Raised if a pickle is damaged, beyond a limit, or of a form that torch.save does not write."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: the key of its storage, its type, and its first byte in the storage; shape and strides in numbers."""

    key: str
    dtype: DType
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage, by its key, or the part of it from `first` on, as the old format has it.

    Attributes:
        dtype: None if the storage is untyped; its numbers are bytes then.
        numel: numbers of the whole storage.
        count: numbers of the part.
    """

    key: str
    dtype: DType | None
    numel: int
    first: int
    count: int

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype is None else self.dtype.itemsize


class TorchPickle:
    """One pickle in a file, from a byte on. The machine has a stack, marks in it, and a memo, as Python's has.

    Attributes:
        at: the next byte; after `read`, the first byte behind the pickle.
        storages: every storage that the pickle names, by its key.
    """

    def __init__(self, data: mmap.mmap, start: int, stop: int) -> None:
        self.at = start
        self.storages: dict[str, Storage] = {}
        self._data, self._stop = data, min(stop, start + MAX_PICKLE_BYTES)
        self._cut = stop > self._stop
        self._opcodes = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Return the pickle's value: plain values, tuples, lists and dicts, and the records of this module.

        Raises:
            BadPickle, UnknownName: as they say.
        """
        while True:
            self._spend(1)
            code = self._take(1)[0]
            if code == _STOP:
                return self._pop()
            act = _OPCODES.get(code)
            if act is None:
                raise BadPickle(f"its pickle has the opcode {_opcode_name(code)}, which torch.save does not write")
            act(self)

    def _spend(self, opcodes: int) -> None:
        self._opcodes += opcodes
        if self._opcodes > MAX_OPCODES:
            raise BadPickle(f"its pickle has more than {MAX_OPCODES} opcodes")

    def _take(self, count: int) -> bytes:
        if count > self._stop - self.at:
            raise BadPickle(
                f"its pickle has more than {MAX_PICKLE_BYTES} bytes" if self._cut else "its pickle ends too early"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, min(self._stop, self.at + _MAX_NAME_BYTES))
        if end < 0:
            raise BadPickle("its pickle has a name without an end")
        return (self._take(end + 1 - self.at)[:-1]).decode("utf-8", "replace")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise BadPickle("its pickle takes what it has not made")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise BadPickle("its pickle takes what it has not made")
        return self._stack[-1]

    # Opcodes, by the names that `pickletools` has for them.

    def proto(self) -> None:
        if self._number("<B") > _NEWEST_PROTOCOL:
            raise BadPickle("its pickle is of a protocol that does not exist")

    def frame(self) -> None:
        self._take(8)  # the length of a part: of use to who reads ahead

    def mark(self) -> None:
        if len(self._marks) == MAX_MARKS:
            raise BadPickle("its pickle is nested too deeply")
        self._marks.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        if not self._marks:
            raise BadPickle("its pickle takes what it has not made")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark()

    def long(self, length: int) -> None:
        if length > _MAX_LONG_BYTES:
            raise BadPickle(f"its pickle has a number of {length} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def binfloat(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def text(self, length: int) -> None:
        try:
            self._push(self._take(length).decode("utf-8", "strict"))
        except UnicodeDecodeError:
            raise BadPickle("its pickle has a text that is no UTF-8") from None

    def old_text(self, length: int) -> None:
        """Push a text of Python 2, which may be bytes."""
        self._push(self._take(length).decode("utf-8", "replace"))

    def skip_bytes(self, length: int) -> None:
        if length > self._stop - self.at:
            raise BadPickle("its pickle ends too early")
        self.at += length
        self._push(Inert("builtins.bytes"))

    def make_tuple(self, count: int) -> None:
        self._push(tuple([self._pop() for _ in range(count)][::-1]))

    def append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            raise BadPickle("its pickle appends to what is no list")

    def set_items(self, items: list[Any]) -> None:
        """Set entries of a dict; those whose keys are no texts or small numbers are of no use to weights: left out."""
        target = self._top()
        if type(target) is Inert:
            return
        if type(target) is not dict or len(items) % 2:
            raise BadPickle("its pickle sets entries of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str or (type(key) is int and -_MAX_KEY <= key < _MAX_KEY):
                target[key] = value

    def frozenset_(self) -> None:
        self.pop_mark()
        self._push(Inert("builtins.frozenset"))

    def setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self.set_items([key, value])

    def put(self, index: int) -> None:
        if index > MAX_OPCODES:
            raise BadPickle("its pickle numbers what it has not made")
        self._memo[index] = self._top()

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise BadPickle("its pickle takes what it has not made")
        self._push(self._memo[index])

    def global_(self) -> None:
        module, name = self._line(), self._line()
        self._push_name(module, name)

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise BadPickle("its pickle has a name that is no text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        if len(module) + len(name) > _MAX_NAME_BYTES or not f"{module}.{name}".replace(".", "_").isidentifier():
            raise BadPickle("its pickle has a name that cannot be")
        self._push(look_up(module, name))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._push(self._call(function, arguments))

    def newobj_ex(self) -> None:
        _, _, made = self._pop(), self._pop(), self._pop()
        if type(made) is not Inert:
            raise BadPickle("its pickle makes what torch.save does not write")
        self._push(made)

    def build(self) -> None:
        """Drop the state of an object: `_metadata` of a state dict, and of what nothing is kept."""
        self._pop()
        if type(self._top()) not in (dict, Inert):
            raise BadPickle("its pickle changes what it has made")

    def persid(self) -> None:
        match self._pop():
            case ("storage", StorageType(dtype), str(key), str(), int(numel), *view):
                pass
            case _:
                raise BadPickle("its pickle refers to something outside that is no storage")
        first, count = 0, numel
        match view:
            case [] | [None]:
                pass
            case [(str(), int(first), int(count))]:
                pass
            case _:
                raise BadPickle(f"storage {key[:_MAX_QUOTED]!r} is described in a way that torch.save does not write")
        if not 0 <= numel < _MAX_SIZE or not 0 <= first <= first + count <= numel:
            raise BadPickle(f"storage {key[:_MAX_QUOTED]!r} has a size that cannot be")
        storage = Storage(key, dtype, numel, first, count)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.numel) != (dtype, numel):
            raise BadPickle(f"storage {key[:_MAX_QUOTED]!r} is described in two ways")
        self._push(storage)

    # The functions that a pickle may call.

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is Inert:
            return function
        if type(function) is not Function or type(arguments) is not tuple:
            raise BadPickle("its pickle calls what is no function")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "collections.OrderedDict", ([*pairs],):
                return self._ordered_dict(pairs)
            case "torch.Size", (tuple() | list() as shape,):
                self._spend(len(shape))
                return tuple(shape)
            case "torch._utils._rebuild_tensor", (storage, offset, shape, strides):
                return _rebuild(storage, offset, shape, strides, None, None)
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *rest) if len(rest) <= 1:
                return _rebuild(storage, offset, shape, strides, None, rest[0] if rest else None)
            case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, strides, _, _, DType() as dtype, *rest):
                return _rebuild(storage, offset, shape, strides, dtype, rest[0] if rest else None)
            case "torch._utils._rebuild_parameter", (Tensor() | Inert() as tensor, _, _):
                return tensor
            case "torch._utils._rebuild_parameter_with_state", (Tensor() | Inert() as tensor, _, _, _):
                return tensor
            case "torch._tensor._rebuild_from_type_v2", (Function() | Inert() as inner, _, inner_arguments, _):
                if inner == function:
                    raise BadPickle("its pickle calls a function by itself")
                return self._call(inner, inner_arguments)
        raise BadPickle(f"its pickle calls {function.name} in a way that torch.save does not write")

    def _ordered_dict(self, pairs: list[Any]) -> dict[Any, Any]:
        """Return the dict that Python 2 pickled as a list of pairs."""
        self._spend(len(pairs))
        if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise BadPickle("its pickle makes a dict of what is no list of pairs")
        self._push({})
        self.set_items([item for pair in pairs for item in pair])
        made: dict[Any, Any] = self._pop()
        return made


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None, flags: Any) -> Tensor:
    """Return a tensor on a storage; raise BadPickle unless all of the tensor lies within."""
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise BadPickle("its pickle makes a tensor of what is no storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise BadPickle("its pickle makes a tensor without a type")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise BadPickle("its pickle makes a tensor whose shape and strides do not agree")
    if not all(type(number) is int and 0 <= number < _MAX_SIZE for number in (offset, *shape, *strides)):
        raise BadPickle("its pickle makes a tensor of a size that cannot be")
    if type(flags) is dict and any(flags.values()):
        raise BadPickle("its pickle makes a tensor whose numbers are negated or conjugated only when read")
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if math.prod(shape) == 0:
        offset = 0
    elif (last + 1) * dtype.itemsize > storage.count * storage.itemsize:
        raise BadPickle(f"a tensor reaches beyond its storage {storage.key[:_MAX_QUOTED]!r}")
    return Tensor(storage.key, dtype, storage.first * storage.itemsize + offset * dtype.itemsize, shape, strides)


def _opcode_name(code: int) -> str:
    import pickletools

    return next((opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), f"0x{code:02x}")


_STOP = ord(".")
_Action = Callable[[TorchPickle], object]

# Every opcode that is carried out. Left out are those that name classes by number or by text, and buffers from outside.
_OPCODES: dict[int, _Action] = {
    0x80: TorchPickle.proto,
    0x95: TorchPickle.frame,
    ord("("): TorchPickle.mark,
    ord("0"): TorchPickle.pop,
    ord("1"): TorchPickle.pop_mark,
    ord("2"): lambda m: m._push(m._top()),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(m._number("<i")),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    0x8A: lambda m: m.long(m._number("<B")),
    0x8B: lambda m: m.long(m._number("<I")),
    ord("G"): TorchPickle.binfloat,
    ord("X"): lambda m: m.text(m._number("<I")),
    0x8C: lambda m: m.text(m._number("<B")),
    0x8D: lambda m: m.text(m._number("<Q")),
    ord("T"): lambda m: m.old_text(m._number("<I")),
    ord("U"): lambda m: m.old_text(m._number("<B")),
    ord("B"): lambda m: m.skip_bytes(m._number("<I")),
    ord("C"): lambda m: m.skip_bytes(m._number("<B")),
    0x8E: lambda m: m.skip_bytes(m._number("<Q")),
    0x96: lambda m: m.skip_bytes(m._number("<Q")),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m.append([m._pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("l"): lambda m: m._push(m.pop_mark()),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m.pop_mark())),
    0x85: lambda m: m.make_tuple(1),
    0x86: lambda m: m.make_tuple(2),
    0x87: lambda m: m.make_tuple(3),
    ord("}"): lambda m: m._push({}),
    ord("s"): TorchPickle.setitem,
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m._push(Inert("builtins.set")),
    0x90: lambda m: m.append(m.pop_mark()),
    0x91: TorchPickle.frozenset_,
    ord("q"): lambda m: m.put(m._number("<B")),
    ord("r"): lambda m: m.put(m._number("<I")),
    0x94: lambda m: m.put(len(m._memo)),
    ord("h"): lambda m: m.get(m._number("<B")),
    ord("j"): lambda m: m.get(m._number("<I")),
    ord("c"): TorchPickle.global_,
    0x93: TorchPickle.stack_global,
    ord("R"): TorchPickle.reduce,
    0x81: TorchPickle.reduce,
    0x92: TorchPickle.newobj_ex,
    ord("b"): TorchPickle.build,
    ord("Q"): TorchPickle.persid,
}
