"""Reading what stands in Redis: JSON or the plain values of a pickle, of bounded size, and nothing that could run."""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import RedisError, ResponseError

from fastgpt2.engine.decoding.records import MAX_PROMPT_BYTES

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


# NOTE api.replies: What Redis answered, taken with care: whoever may write there may have written anything.

# What a number may be at most, so that sums of many stay exact enough and finite.
MOST = 2.0**63
_MAX_NUMBER_BYTES = 40
MAX_TEXT_CHARACTERS = 200


def checked(replies: Sequence[Any]) -> list[Any]:
    """The replies of a pipeline; None for each that says that its key is of another kind than it should be.

    Raises:
        RedisError: the first other error among them.
    """
    found = []
    for reply in replies:
        if isinstance(reply, Exception):
            if not is_of_entry(reply):  # type: ignore[arg-type]
                raise reply
            reply = None
        found.append(reply)
    return found


def real(value: Any) -> float | None:
    """A number from 0 on; None if it is none, or more than anything here could be."""
    if isinstance(value, bytes | str):
        if len(value) > _MAX_NUMBER_BYTES:
            return None
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value < MOST else None


def whole(value: Any) -> int | None:
    """A whole number from 0 on, as `real`."""
    if isinstance(value, bytes | str) and len(value) <= _MAX_NUMBER_BYTES:
        try:
            value = int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST else None


def text(value: Any) -> str:
    """At most so many characters; empty if it is none."""
    if isinstance(value, bytes):
        # No character has more than four bytes.
        value = value[: 4 * MAX_TEXT_CHARACTERS].decode("utf-8", "replace")
    return value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) else ""


def by_name(names: Sequence[str], reply: Any) -> dict[str, Any]:
    """The answer to an HMGET; without what is not there."""
    values = reply if isinstance(reply, list) else []
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


# What Redis says when an entry is not what it should be, as opposed to when it cannot serve.
_FAULTS_OF_ENTRIES = ("WRONGTYPE", "not an integer", "not a valid float", "would overflow")


def is_of_entry(error: RedisError) -> bool:
    """Whether the error tells of a key that is not what it should be: trying again would not help."""
    return isinstance(error, ResponseError) and any(words in str(error) for words in _FAULTS_OF_ENTRIES)


def seconds_between(earlier: datetime | None, later: datetime | None) -> float:
    """Time between two moments that RQ noted; 0 where one is missing or the clocks of two machines disagree."""
    if earlier is None or later is None:
        return 0.0
    return max(0.0, (_aware(later) - _aware(earlier)).total_seconds())


def _aware(moment: datetime) -> datetime:
    """RQ notes moments in UTC, with or without saying so."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
