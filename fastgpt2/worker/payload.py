"""Reading what stands in Redis: JSON or the plain values of a pickle, of bounded size, and nothing that could run."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from typing import Any

from fastgpt2.engine.generation import MAX_PROMPT_BYTES

# A prompt of the longest kind, every character of it escaped.
MAX_PAYLOAD_BYTES = 8 * MAX_PROMPT_BYTES
MAX_PICKLE_OPCODES = 1 << 18

# What plain values are made of. No opcode that names a class, calls anything, or takes a length to allocate on trust.
_PLAIN_OPCODES = frozenset(
    {
        "APPEND", "APPENDS", "BINBYTES", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE",
        "BINUNICODE8", "DICT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET",
        "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS",
        "SHORT_BINBYTES", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    }
)  # fmt: skip


class JSONOnlySerializer:
    """Writes JSON, and reads what `read` reads. RQ's own default would unpickle, which runs whatever a pickle says."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode("utf-8")

    @staticmethod
    def loads(data: bytes) -> Any:
        return read(data)


class PlainPickleSerializer:
    """For jobs that came pickled, whose enqueuers read their results as pickles: writes those, of plain values."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return pickle.dumps(value, protocol=4)

    @staticmethod
    def loads(data: bytes) -> Any:
        return read(data)


def is_pickle(data: bytes) -> bool:
    """Protocol 2 and later begin so; JSON never does."""
    return data[:1] == pickle.PROTO


def read(data: bytes) -> Any:
    """The value of a JSON text, or of a pickle that holds plain values only.

    Raises:
        ValueError: neither, too large, or nested too deeply.
    """
    if len(data) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"{len(data)} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    try:
        return _unpickle(data) if is_pickle(data) else json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickle that names {module[:100]}.{name[:100]}")

    def persistent_load(self, _pid: Any) -> Any:
        raise ValueError("a pickle that refers to something outside")


def _unpickle(data: bytes) -> Any:
    """Every opcode is looked at first: the unpickler would allocate whatever index or length a pickle states."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(f"a pickle of more than plain values (it has the opcode {opcode.name})")
            if count > MAX_PICKLE_OPCODES:
                raise ValueError(f"a pickle of more than {MAX_PICKLE_OPCODES} opcodes")
            if opcode.name == "LONG_BINPUT" and (argument is None or argument > count):
                raise ValueError("a pickle that numbers what it does not hold")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError) as reason:
        raise ValueError(f"a damaged pickle ({reason})") from None
