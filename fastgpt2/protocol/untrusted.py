"""Careful reading of what stands in Redis: whoever may write there may have written anything.

A payload is JSON or a pickle of plain values, of bounded size, and nothing that could run. A reply of Redis is read as
a number, a text or a moment, within bounds, and as nothing if it is something else.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from redis.exceptions import DataError, RedisError, ResponseError

from fastgpt2.engine.decoding.records import MAX_PROMPT_BYTES
from fastgpt2.fields import why_no_json
from fastgpt2.protocol.keys import MAX_MODEL_CHARACTERS, MAX_MODELS_OF_WORKER

# A prompt of the longest kind, every character of it escaped.
MAX_PAYLOAD_BYTES = 8 * MAX_PROMPT_BYTES
MAX_PICKLE_OPCODES = 1 << 18

# A result may be larger: what Redis keeps as one value, and about 240 opcodes a token that names the 20 likeliest ones.
MAX_RESULT_BYTES = 512 << 20
MAX_RESULT_OPCODES = 1 << 20

# The most that a number may be, so that sums of many stay exact enough and finite.
MOST = 2.0**63
MAX_TEXT_CHARACTERS = 200
_MAX_NUMBER_BYTES = 40

# JSON writes at most twelve bytes for a character.
_MAX_MODELS_BYTES = MAX_MODELS_OF_WORKER * (12 * MAX_MODEL_CHARACTERS + 4)

# Plain values are made of these. No opcode names a class, calls anything, or takes a length to allocate on trust.
_PLAIN_OPCODES = frozenset(
    {
        "APPEND", "APPENDS", "BINBYTES", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE",
        "BINUNICODE8", "DICT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET",
        "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS",
        "SHORT_BINBYTES", "SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    }
)  # fmt: skip


class JSONOnlySerializer:
    """A serializer that writes JSON, and reads what `read` reads. RQ's own unpickles, which runs what a pickle says."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return json.dumps(value).encode("utf-8")

    @staticmethod
    def loads(data: bytes) -> Any:
        return read(data)


class PlainPickleSerializer(JSONOnlySerializer):
    """A serializer that writes pickles of plain values, for jobs that came pickled: so their results are read too."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return pickle.dumps(value, protocol=4)


def is_pickle(data: bytes) -> bool:
    """Tell whether the data are a pickle of protocol 2 or later. JSON never begins like one."""
    return data[:1] == pickle.PROTO


def read(data: bytes, most_bytes: int = MAX_PAYLOAD_BYTES, most_opcodes: int = MAX_PICKLE_OPCODES) -> Any:
    """Return the value of a JSON text, or of a pickle that holds plain values only.

    Args:
        most_bytes, most_opcodes: the limits, for the data and for a pickle's operations.

    Raises:
        ValueError: the data are neither, too large, or nested too deeply.
    """
    if len(data) > most_bytes:
        raise ValueError(f"{len(data)} bytes; the limit is {most_bytes}")
    try:
        return _unpickle(data, most_opcodes) if is_pickle(data) else json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as reason:
        raise ValueError(why_no_json(reason)) from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickle that names {module[:100]}.{name[:100]}")

    def persistent_load(self, _pid: Any) -> Any:
        raise ValueError("a pickle that refers to something outside")


def _unpickle(data: bytes, most_opcodes: int) -> Any:
    """Unpickle after a look at every opcode: the unpickler allocates whatever index or length a pickle states."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(
                    f"a pickle of more than plain values (it has the opcode {opcode.name}): plain are Python's own "
                    "numbers, strings, lists and dicts"
                )
            if count > most_opcodes:
                raise ValueError(f"a pickle of more than {most_opcodes} opcodes")
            if opcode.name == "LONG_BINPUT" and (argument is None or argument > count):
                raise ValueError("a pickle that numbers what it does not hold")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError) as reason:
        raise ValueError(f"a damaged pickle ({reason})") from None


def check_replies(replies: Sequence[Any]) -> list[Any]:
    """Return the replies of a pipeline, with None for each that says that its key is of another kind than it should be.

    Raises:
        RedisError: the first other error among them.
    """
    for reply in replies:
        if isinstance(reply, Exception) and not is_of_entry(reply):
            raise reply
    return [None if isinstance(reply, Exception) else reply for reply in replies]


def real(value: Any) -> float | None:
    """Return a number from 0 on, or None if the value is none, or more than anything here could be."""
    if isinstance(value, bytes | str):
        if len(value) > _MAX_NUMBER_BYTES:
            return None
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < MOST and math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """Return a whole number from 0 on, or None as `real` does."""
    if isinstance(value, bytes | str) and len(value) <= _MAX_NUMBER_BYTES:
        try:
            value = int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST else None


def text(value: Any) -> str:
    """Return the first 200 characters of a text, or "" if the value is none."""
    if isinstance(value, bytes):
        # No character has more than four bytes.
        value = value[: 4 * MAX_TEXT_CHARACTERS].decode("utf-8", "replace")
    return value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) else ""


def read_model_names(reply: Any) -> list[str]:
    """Return the names of models that a pool's set of them holds, sorted; what else stands there is passed over."""
    return sorted({name.decode("utf-8", "replace") for name in reply or () if _may_name_model(name)})


def read_model_list(value: Any) -> list[str]:
    """Return the names of a worker's model, the first one first, of the list that stands in its hash; [] if none does.

    A worker of an earlier release has no such list.
    """
    if not isinstance(value, bytes) or len(value) > _MAX_MODELS_BYTES:
        return []
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return []
    names = found if isinstance(found, list) else []
    # A lone surrogate is not printable, and could stand in no key.
    return [name for name in names if isinstance(name, str) and name.isprintable() and _may_name_model(name.encode())]


def _may_name_model(name: Any) -> bool:
    if not isinstance(name, bytes):
        return False
    text = name.decode("utf-8", "replace")
    return 0 < len(text) <= MAX_MODEL_CHARACTERS and text.isprintable()


def by_name(names: Sequence[str], reply: Any) -> dict[str, Any]:
    """Return the answer to an HMGET by the names of the fields, without those that are not there."""
    values = reply if isinstance(reply, list) else []
    return {name: value for name, value in zip(names, values, strict=False) if value is not None}


# Redis says this when an entry is not what it should be, as opposed to when it cannot serve.
_FAULTS_OF_ENTRIES = (
    "WRONGTYPE",
    "not an integer",
    "not a valid float",
    "not a float",
    "would overflow",
    "invalid expire time",
    "would produce NaN or Infinity",
    "resulting score is not a number",
    "ID specified in XADD is equal or smaller",
    "has exhausted the last possible ID",
)

# Redis says this when it cannot serve anybody, or not this user, or not now; alone, or within what it says of a script.
_FAULTS_OF_SERVICE = re.compile(
    r"\b(OOM|READONLY|LOADING|MISCONF|BUSY|UNKILLABLE|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|CROSSSLOT|MOVED|ASK|TRYAGAIN|NOPERM"
    r"|NOAUTH|WRONGPASS|DENIED|NOSCRIPT|NOPROTO)\b|[Pp]ermission|unknown command|max number of clients"
)


def is_of_entry(error: Exception) -> bool:
    """Tell whether an error is about a key that is not what it should be: to try again would not help."""
    return isinstance(error, ResponseError) and any(phrase in str(error) for phrase in _FAULTS_OF_ENTRIES)


def is_of_service(error: BaseException) -> bool:
    """Tell whether Redis cannot be reached or cannot serve: that is no job's fault, and waiting may help."""
    if type(error) in (ResponseError, DataError):  # the library knows no more of it than its words
        return _FAULTS_OF_SERVICE.search(str(error)) is not None
    return isinstance(error, RedisError | OSError)


def read_moment(value: Any) -> datetime | None:
    """Return a moment that RQ wrote, or None if it is none. RQ writes ISO 8601 in UTC, with or without the zone."""
    try:
        then = value if isinstance(value, datetime) else datetime.fromisoformat(text(value))
        return then.astimezone(UTC) if then.tzinfo else then.replace(tzinfo=UTC)
    except (ValueError, OverflowError):  # the first day of year 1, east of Greenwich
        return None


def epoch_seconds(value: Any) -> float | None:
    """Return a moment that RQ wrote in seconds since 1970, to a millisecond, or None if the value is none."""
    then = read_moment(value)
    return None if then is None else round(then.timestamp(), 3)


def seconds_since(value: Any, now: float) -> float | None:
    """Return how long ago a moment that RQ wrote was: 0 if it lies after `now`, None if the value is no moment."""
    then = read_moment(value)
    return None if then is None else max(0.0, now - then.timestamp())


def seconds_between(earlier: Any, later: Any) -> float:
    """Return the time between two moments that RQ wrote: 0 if one is missing or the clocks of two machines disagree."""
    begin, end = read_moment(earlier), read_moment(later)
    return 0.0 if begin is None or end is None else max(0.0, (end - begin).total_seconds())
