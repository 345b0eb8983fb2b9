"""Waiting for jobs: a `JobReader` keeps what has been read of one job, a `ReadLoop` reads for one job or for many.

A client that waits for one job, a bulk run and the HTTP endpoint all wait by the same loop: query the jobs' states,
wait for new entries of their Redis streams, hand these to the jobs. Neither class does I/O: see `flow`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fastgpt2.api.client.flow import Entries, Flow, Pipeline, Retries, entries_by_key, read_streams
from fastgpt2.api.client.outcome import Outcome, PendingResult, Stage
from fastgpt2.engine.decoding.records import GenerationResult, TokenLogprob
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.keys import job_key, stream_key
from fastgpt2.protocol.messages import Piece, entry_to_piece

# How long one blocking read lasts at most. Between two reads the states are queried, as a cancellation writes no entry.
READ_SECONDS = 2.0

# How often the state of a cancelled job is queried whose worker is about to write down what it had generated.
LETTING_GO_QUERY_SECONDS = 0.03

# A token's id, and where in the text it begins: log probabilities differ between machines in their last digits.
Token: TypeAlias = tuple[int, int]


class Assembly:
    """A text put together from pieces: every character, and every token's log probability, is given once.

    Attributes:
        text: what a reader holds who has taken every piece, and cut the text where a piece said so.
        attempt: the latest attempt of which something was read, from 1.
    """

    def __init__(self) -> None:
        self.text = ""
        self.attempt = 1
        self._tokens: list[Token] = []

    def add(self, piece: Piece) -> Piece | None:
        """Return what is new in a piece.

        None if all of it is held already, or if what comes before it was lost, so that it has no place.
        """
        if piece.attempt < self.attempt or piece.at > len(self.text):
            return None
        self.attempt = piece.attempt
        same = _count_held(self.text, piece.at, piece.text)
        # Where nothing is new, an empty text at the end of all that is held cuts nothing off.
        text, at = (piece.text[same:], piece.at + same) if same < len(piece.text) else ("", len(self.text))
        known = _count_held(self._tokens, piece.token_at, _tokens(piece.logprobs))
        logprobs, token_at = piece.logprobs[known:], piece.token_at + known
        if not logprobs or token_at > len(self._tokens):
            logprobs, token_at = (), len(self._tokens)
        return self._put(text, at, logprobs, token_at) if text or logprobs else None

    def complete(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Piece | None:
        """Return what is missing of the whole text and of the tokens that begin in it; None if nothing is.

        If more is held than the whole text, the piece is empty and cuts the rest off.
        """
        inside = tuple(one for one in logprobs if one.text_offset < len(text))
        tokens = _tokens(inside)
        if text == self.text and tokens == self._tokens:
            return None
        same, known = _count_held(self.text, 0, text), _count_held(self._tokens, 0, tokens)
        return self._put(text[same:], same, inside[known:], known)

    def _put(self, text: str, at: int, logprobs: tuple[TokenLogprob, ...], token_at: int) -> Piece:
        self.text = self.text[:at] + text
        self._tokens[token_at:] = _tokens(logprobs)
        return Piece(text, at, self.attempt, logprobs, token_at)


def _tokens(logprobs: Sequence[TokenLogprob]) -> list[Token]:
    return [(one.token_id, one.text_offset) for one in logprobs]


def _count_held(held: Sequence[object], at: int, new: Sequence[object]) -> int:
    """Return how many of the first items of `new` equal what is held from `at` on."""
    same = 0
    while same < min(len(new), len(held) - at) and held[at + same] == new[same]:
        same += 1
    return same


class _TextStream:
    """The Redis stream of one job's text, as far as it has been read.

    Attributes:
        pieces: read, and not yet taken by whoever reads the text.
    """

    def __init__(self, job_id: str) -> None:
        self.key = stream_key(job_id)
        self.after: bytes | str = "0-0"
        self.pieces: deque[Piece] = deque()
        self._assembly = Assembly()

    def on_entries(self, entries: Entries) -> bool:
        """Take in new entries. Returns whether an attempt's last entry was among them."""
        has_last = False
        for entry_id, fields in entries:
            self.after = entry_id
            try:
                piece = entry_to_piece(fields)
            except (KeyError, TypeError, ValueError):
                continue  # not written by a worker; text that is missing comes with the result
            if piece is None:
                has_last = True
            else:
                self._append(self._assembly.add(piece))
        return has_last

    def complete(self, result: GenerationResult) -> None:
        """Add the piece that is missing of the result's text."""
        self._append(self._assembly.complete(result.text, result.logprobs or ()))

    def _append(self, piece: Piece | None) -> None:
        if piece is not None:
            self.pieces.append(piece)


class JobReader:
    """What has been read of one job: pieces of its text, if that is streamed, and how it ended.

    Args:
        streamed: read the text too.
        new: the job was enqueued just now, so there is no need to ask whether it exists or has ended long since.
        notify: called when there are pieces to take, or the job has ended.
    """

    def __init__(
        self, job_id: str, streamed: bool = False, new: bool = False, notify: Callable[[], object] | None = None
    ) -> None:
        self.id = job_id
        self.pending = PendingResult(job_id, Stage.WAITING if new else Stage.UNCLEAR)
        self._text = _TextStream(job_id) if streamed else None
        self._notify = notify

    @property
    def outcome(self) -> Outcome | None:
        """How the job ended; None until then."""
        return self.pending.outcome

    @property
    def result(self) -> GenerationResult | None:
        """The job's result; None until there is one."""
        outcome = self.pending.outcome
        return outcome if isinstance(outcome, GenerationResult) else None

    @property
    def positions(self) -> dict[str, bytes | str]:
        """The keys of the job's streams, each with the id of the last entry read there."""
        positions = {self.pending.key: self.pending.after}
        if self._text is not None:
            positions[self._text.key] = self._text.after
        return positions

    @property
    def key_types(self) -> dict[str, bytes]:
        """The Redis type of each of the job's keys, as TYPE names it."""
        return {job_key(self.id): b"hash", **dict.fromkeys(self.positions, b"stream")}

    def pieces(self) -> Iterator[Piece]:
        """Take the pieces that have come, each once."""
        while self._text is not None and self._text.pieces:
            yield self._text.pieces.popleft()

    def on_state(self, replies: Sequence[Any], now: float) -> None:
        """Take in the replies to `PendingResult.query`."""
        self.pending.on_state(replies, now)
        self._conclude()

    def on_entries(self, entries: Mapping[str, Entries]) -> None:
        """Take in new entries, by the keys of their streams; those of other jobs are passed over."""
        if self._text is not None and self._text.on_entries(entries.get(self._text.key, ())):
            self.pending.require_query()
        self.pending.on_entries(entries.get(self.pending.key, ()))
        self._conclude()

    def fail(self, error: FastGPT2Error) -> None:
        """End the reading with an error."""
        self.pending.end(error)
        self._conclude()

    def _conclude(self) -> None:
        if self._text is not None and self.result is not None:
            self._text.complete(self.result)
        has_news = self.outcome is not None or (self._text is not None and self._text.pieces)
        if has_news and self._notify is not None:
            self._notify()


class ReadLoop:
    """The waiting for one job or many over one connection.

    Args:
        timeout: seconds to wait; None waits for as long as it takes.
        wake_key: a Redis stream that is read too. An entry there ends a read, so that jobs which have joined are read.

    Attributes:
        blocked: a read waits just now, for the jobs that were there when it began.
        timed_out: the time was up when the states were queried last.
    """

    def __init__(self, retries: Retries, timeout: float | None = None, wake_key: str | None = None) -> None:
        self.timeout = timeout
        self.blocked = self.timed_out = False
        self._retries = retries
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._wake_positions: dict[str, bytes | str] = {} if wake_key is None else {wake_key: "0-0"}
        self._query_all_at = 0.0

    def turn(self, jobs: Collection[JobReader], longest: float = math.inf) -> Flow[bool]:
        """Query the states that are due; if no job ended so far, wait for entries and hand them to the jobs.

        Args:
            jobs: looked at again after the queries, so that others may join meanwhile.
            longest: seconds that the read may last, at most `READ_SECONDS`.

        Returns:
            Whether entries have come.
        """
        if (yield from self._query_due(jobs)):
            return False
        waiting = list(jobs)
        now = time.monotonic()
        self.timed_out = now >= self._deadline
        if self.timed_out or not waiting:
            return False
        stages = {job.pending.stage for job in waiting}
        seconds = min(longest, self._query_all_at - now)
        if Stage.LETTING_GO in stages:
            seconds = min(seconds, LETTING_GO_QUERY_SECONDS)
        if Stage.UNCLEAR in stages:  # such jobs have joined meanwhile
            seconds = 0.0
        entries = yield from self._read(waiting, max(0.0, seconds))
        if entries:
            for job in waiting:
                job.on_entries(entries)
        return bool(entries)

    def _query_due(self, jobs: Collection[JobReader]) -> Flow[bool]:
        """Query all states every `READ_SECONDS` and at the deadline, otherwise those that are not clear.

        Returns:
            Whether a job has ended.
        """
        if query_all := time.monotonic() >= self._query_all_at:
            due = list(jobs)
        else:
            due = [job for job in jobs if job.pending.stage in (Stage.UNCLEAR, Stage.LETTING_GO)]
        if due:
            queries = Pipeline(tuple(one for job in due for one in job.pending.query().commands), transaction=True)
            replies = yield from self._retries.ask(queries, self._deadline)
            now = time.monotonic()
            for job, two in zip(due, zip(replies[::2], replies[1::2], strict=True), strict=True):
                job.on_state(two, now)
        if query_all:
            now = time.monotonic()
            self._query_all_at = min(now + READ_SECONDS, self._deadline if self._deadline > now else math.inf)
        return any(job.outcome is not None for job in due)

    def _read(self, jobs: Sequence[JobReader], seconds: float) -> Flow[dict[str, Entries]]:
        positions = dict(self._wake_positions)
        for job in jobs:
            positions.update(job.positions)
        self.blocked = True
        try:
            reply = yield from self._retries.ask(read_streams(positions, seconds), self._deadline)
        finally:
            self.blocked = False
        entries = entries_by_key(reply)
        for key in self._wake_positions:
            for entry_id, _ in entries.pop(key, ()):
                self._wake_positions[key] = entry_id
        return entries
