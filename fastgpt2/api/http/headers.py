"""The headers of a request, as ASGI has them: pairs of bytes, the names in small letters."""

from __future__ import annotations

from collections.abc import Iterable

Headers = Iterable[tuple[bytes, bytes]]


def values_of(headers: Headers, name: bytes) -> list[bytes]:
    """Return the values of all headers of this name."""
    return [value for key, value in headers if key == name]


def single_value(headers: Headers, name: bytes) -> str:
    """Return the value of a header; empty if there is none of this name, or more than one."""
    values = values_of(headers, name)
    return values[0].decode("latin-1") if len(values) == 1 else ""
