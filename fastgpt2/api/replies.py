"""What Redis answered, taken with care: whoever may write there may have written anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastgpt2.worker.guarded import is_of_entry

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
