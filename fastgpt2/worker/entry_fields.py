"""The fields of a job's hash as a worker may hand them to RQ: within bounds, and told by name where they are not.

RQ and Redis stumble over some only when a job's end is written, and its work is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rq.utils import str_to_date

from fastgpt2.protocol.keys import ATTEMPTS_FIELD

# Three hundred years: the most that a number of seconds, or of anything else in an entry, may be. Ten times as much is
# beyond the last day that Python knows.
MOST = 10**10
MAX_DIGITS = 40
_NUMBERS = (
    "timeout",
    "result_ttl",
    "failure_ttl",
    "ttl",
    "retries_left",
    "repeats_left",
    "number_of_retries",
    "rate_limit_concurrency",
    "enqueue_at_front",
    "enqueue_at_front_on_retry",
    "allow_dependency_failures",
    "success_callback_timeout",
    "failure_callback_timeout",
    "stopped_callback_timeout",
    ATTEMPTS_FIELD,
)
_MOMENTS = ("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat")
_INTERVALS = ("retry_intervals", "repeat_intervals")
_IDS = "dependency_ids"

# Of no use here: the error of an earlier run, which may inflate to anything, and what is never called.
_UNREAD = (b"exc_info", b"webhooks")


def check_fields(raw: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return those fields of a job's hash that RQ may read.

    Raises:
        ValueError: one of them is nothing that RQ writes, or is beyond what Redis and Python can count.
    """
    fields = {name: value for name, value in raw.items() if name not in _UNREAD}
    for name in _NUMBERS:
        value = fields.get(name.encode())
        if value:
            _check_number(name, value)
        elif value is not None:  # an empty one is none
            del fields[name.encode()]
    for name in _MOMENTS:
        if value := fields.get(name.encode()):
            try:
                str_to_date(value)
            except (ValueError, OverflowError):
                raise ValueError(f"{name} is no moment as RQ writes it") from None
    for name in _INTERVALS:
        if value := fields.get(name.encode()):
            _check_intervals(name, _list_of(name, value))
    ids = _list_of(_IDS, fields.get(_IDS.encode()) or b"[]")
    if not all(isinstance(one, str) for one in ids):
        raise ValueError(f"{_IDS} is no list of ids")
    return fields


def _check_number(name: str, value: bytes) -> None:
    if len(value) > MAX_DIGITS:
        raise ValueError(f"{name} has {len(value)} characters; the limit is {MOST}")
    try:
        number = int(value)
    except ValueError:
        raise ValueError(f"{name} is no whole number") from None
    if abs(number) > MOST:
        raise ValueError(f"{name} is {number}; the limit is {MOST}")


def _list_of(name: str, value: bytes) -> list[Any]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{name} is no list in JSON")
    return found


def _check_intervals(name: str, intervals: list[Any]) -> None:
    for one in intervals:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= MOST:
            raise ValueError(f"{name} holds something else than numbers of seconds from 0 to {MOST}")
