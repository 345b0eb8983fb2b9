"""A job's text as it comes: the entries of its Redis stream, as the worker writes and clients read them.

At least once: a job that is started again begins its stream again, with the next attempt's number. The job's result in
RQ stays the authority; the stream's last entry says only that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The fields of an entry; the redis library's own type of them is not worth spelling.
Entry = dict[Any, Any]

# For the time after the job has ended. While it runs, its stream lives as long as the job is heard of.
STREAM_TTL_SECONDS = 3600
RUNNING_TTL_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a job, whole characters only, which no stop string can take back any more.

    Attributes:
        text: the next characters.
        at: how many characters of the result's text come before it. Less than what you hold only if the job was started
            again elsewhere and came out otherwise: then cut your text there first.
        attempt: how often the job had been started when this was generated, from 1.
    """

    text: str
    at: int
    attempt: int

    def __str__(self) -> str:
        return self.text


def piece_to_entry(piece: Piece) -> Entry:
    """The fields of a stream entry."""
    return {"attempt": piece.attempt, "at": piece.at, "text": piece.text}


def end_entry(attempt: int) -> Entry:
    """The last entry of an attempt that came to its end: the job's result, or its failure, has been written."""
    return {"attempt": attempt, "end": 1}


def entry_to_piece(fields: Mapping[bytes, bytes]) -> Piece | None:
    """The piece in an entry; None for the last one.

    Raises:
        ValueError, KeyError: not an entry of such a stream.
    """
    if b"end" in fields:
        return None
    return Piece(fields[b"text"].decode("utf-8"), int(fields[b"at"]), int(fields[b"attempt"]))
