"""A job's text as it comes: the entries of its Redis stream, as the worker writes and clients read them.

At least once: a job that is started again begins its stream again, with the next attempt's number. The job's result in
RQ stays the authority; the stream's last entry says only that it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.generation import TokenLogprob
from fastgpt2.worker.job import logprobs_from_json, logprobs_to_json

if TYPE_CHECKING:
    from fastgpt2.engine.sequence import Sequence

# The fields of an entry; the redis library's own type of them is not worth spelling.
Entry = dict[Any, Any]

# For the time after the job has ended. While it runs, its stream lives as long as the job is heard of.
STREAM_TTL_SECONDS = 3600
RUNNING_TTL_SECONDS = 24 * 3600

# In one entry: 500 tokens with the 20 likeliest of each. What is longer is left to the result.
MAX_LOGPROBS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a job, whole characters only, which no stop string can take back any more.

    Attributes:
        text: the next characters.
        at: how many characters of the result's text come before it. Less than what you hold only if the job was started
            again elsewhere and came out otherwise: then cut your text there first.
        attempt: how often the job had been started when this was generated, from 1.
        logprobs: of a job that asked for them, those of the next tokens, as far as these begin within the text so far.
        token_at: how many of the result's `logprobs` come before them; less than what you hold as it is with `at`.
    """

    text: str
    at: int
    attempt: int
    logprobs: tuple[TokenLogprob, ...] = ()
    token_at: int = 0

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Sent:
    """How much of a sequence has been sent: characters of its text, and log probabilities."""

    characters: int = 0
    tokens: int = 0

    def next(self, sequence: Sequence, attempt: int) -> Piece | None:
        """What may be sent beyond that, if there is any text that nothing takes back."""
        end = sequence.settled
        if end <= self.characters:
            return None
        text, at = sequence.text[self.characters : end], self.characters
        if not sequence.logprobs:
            return Piece(text, at, attempt)
        untold = sequence.logprobs[self.tokens :]
        return Piece(text, at, attempt, tuple(takewhile(lambda one: one.text_offset < end, untold)), self.tokens)

    def note(self, piece: Piece) -> None:
        """It has been sent."""
        self.characters = piece.at + len(piece.text)
        self.tokens = piece.token_at + len(piece.logprobs)


def piece_to_entry(piece: Piece) -> Entry:
    """The fields of a stream entry."""
    entry: Entry = {"attempt": piece.attempt, "at": piece.at, "text": piece.text}
    if piece.logprobs:
        entry.update(token_at=piece.token_at, logprobs=json.dumps(logprobs_to_json(piece.logprobs)))
    return entry


def end_entry(attempt: int) -> Entry:
    """The last entry of an attempt that came to its end: the job's result, or its failure, has been written."""
    return {"attempt": attempt, "end": 1}


def entry_to_piece(fields: Mapping[bytes, bytes]) -> Piece | None:
    """The piece in an entry; None for the last one.

    Raises:
        ValueError, KeyError, TypeError: not an entry of such a stream.
    """
    if b"end" in fields:
        return None
    text, at, attempt = fields[b"text"].decode("utf-8"), _number(fields[b"at"]), int(fields[b"attempt"])
    if b"logprobs" not in fields:
        return Piece(text, at, attempt)
    return Piece(text, at, attempt, _logprobs(fields[b"logprobs"]), _number(fields[b"token_at"]))


def _number(data: bytes) -> int:
    value = int(data)
    if value < 0:
        raise ValueError(f"{value} is no number of what comes before")
    return value


def _logprobs(data: bytes) -> tuple[TokenLogprob, ...]:
    if len(data) > MAX_LOGPROBS_BYTES:
        raise ValueError(f"{len(data)} bytes of log probabilities; the limit is {MAX_LOGPROBS_BYTES}")
    try:
        return logprobs_from_json(json.loads(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None
