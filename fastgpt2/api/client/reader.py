"""Waiting for jobs: a `JobReader` keeps what has been read of one job, a `ReadLoop` reads for one job or for many.

A client that waits for one job, a bulk run and the HTTP endpoint all wait by the same loop: query the jobs' states,
wait for new entries of their Redis streams, hand these to the jobs. Neither class does I/O: see `flow`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias

from rq.job import JobStatus
from rq.results import Result

from fastgpt2.api.client.flow import Command, Entries, Flow, Pipeline, Retries
from fastgpt2.api.client.outcome import Outcome, read_outcome, read_partial, return_value
from fastgpt2.engine.decoding.records import GenerationResult, TokenLogprob
from fastgpt2.errors import FastGPT2Error, JobCancelled
from fastgpt2.protocol.keys import job_key, results_key, stream_key
from fastgpt2.protocol.messages import Piece, entry_to_piece, result_from_json

# How long one blocking read lasts at most. Between two reads the states are queried, as a cancellation writes no entry.
READ_SECONDS = 2.0

# How long a worker may take to write down what it had generated of a job that was cancelled.
LETTING_GO_SECONDS = 5.0

# How often the state of a cancelled job is queried whose worker is about to write down what it had generated.
LETTING_GO_QUERY_SECONDS = 0.03

_CANCELED = JobStatus.CANCELED.value.encode()
_SUCCESSFUL = str(Result.Type.SUCCESSFUL.value).encode()

# A token's id, and where in the text it begins: log probabilities differ between machines in their last digits.
Token: TypeAlias = tuple[int, int]


class Assembly:
    """A text put together from pieces: every character, and every token's log probability, is given once.

    Args:
        choice_index: the text's index among those of its job.
        attempt: the latest attempt of which something was read, of this text or another of the job.

    Attributes:
        text: what a reader holds who has taken every piece, and cut the text where a piece said so.
        attempt: the latest attempt that is listened to, from 1.
    """

    def __init__(self, choice_index: int = 0, attempt: int = 1) -> None:
        self.text = ""
        self.attempt = attempt
        self._choice_index = choice_index
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
        return Piece(text, at, self.attempt, logprobs, token_at, self._choice_index)


def _tokens(logprobs: Sequence[TokenLogprob]) -> list[Token]:
    return [(one.token_id, one.text_offset) for one in logprobs]


def _count_held(held: Sequence[object], at: int, new: Sequence[object]) -> int:
    """Return how many of the first items of `new` equal what is held from `at` on."""
    same = 0
    while same < min(len(new), len(held) - at) and held[at + same] == new[same]:
        same += 1
    return same


class Stage(Enum):
    """Where a job stands, for those who wait for its end."""

    # It waits, runs or will run again. Its end will write an entry to its results.
    WAITING = "waiting"

    # Something was written whose meaning only the job's state tells; or nothing is known of the job yet.
    UNCLEAR = "unclear"

    # It was cancelled, and its worker still has to write down what it had generated. That writes no entry.
    LETTING_GO = "letting go"

    ENDED = "ended"


class JobReader:
    """The reader of one job: it keeps pieces of its text, if that is streamed, and how it ended.

    Args:
        streamed: read the text too.
        new: the job was enqueued just now, so there is no need to ask whether it exists or has ended long since.
        notify: called when there are pieces to take, or the job has ended.

    Attributes:
        outcome: how the job ended; None until then.
        positions: the keys of the job's streams, each with the id of the last entry read there.
    """

    def __init__(
        self, job_id: str, streamed: bool = False, new: bool = False, notify: Callable[[], object] | None = None
    ) -> None:
        self.id = job_id
        self.stage = Stage.WAITING if new else Stage.UNCLEAR
        self.outcome: Outcome | None = None
        self._results_key = results_key(job_id)
        self._text_key = stream_key(job_id) if streamed else ""
        self.positions: dict[str, bytes | str] = dict.fromkeys(filter(None, (self._results_key, self._text_key)), "0-0")
        # By their indices: each text of the job has pieces of its own.
        self._assemblies: dict[int, Assembly] = {}
        self._pieces = deque[Piece]()
        self._cancelled_at = 0.0
        self._notify = notify

    @property
    def result(self) -> GenerationResult | None:
        """Return the job's result; None until there is one."""
        return self.outcome if isinstance(self.outcome, GenerationResult) else None

    def pieces(self) -> Iterator[Piece]:
        """Take the pieces that have come, each once."""
        while self._pieces:
            yield self._pieces.popleft()

    def query(self) -> tuple[Command, Command]:
        """Return what reads the job's state, for one transaction: its status and its result belong together."""
        return (
            Command("hmget", (job_key(self.id), "status", "worker_name", "meta")),
            Command("xrevrange", (self._results_key, "+", "-", 1)),
        )

    def on_state(self, replies: Sequence[Any], now: float) -> None:
        """Take in the replies to `query`; `now` is on the monotonic clock."""
        (status, worker_name, meta), entries = replies
        if entries:
            self.positions[self._results_key] = entries[-1][0]
        if status == _CANCELED:
            if self.stage is not Stage.LETTING_GO:
                self.stage, self._cancelled_at = Stage.LETTING_GO, now
            if not worker_name or now - self._cancelled_at >= LETTING_GO_SECONDS:
                self.end(JobCancelled(self.id, "on request", "JobCancelled", read_partial(meta)))
            return
        self.stage = Stage.WAITING
        try:
            outcome = read_outcome(self.id, status, meta, entries)
        except FastGPT2Error as error:
            outcome = error
        if outcome is not None:
            self.end(outcome)

    def on_entries(self, entries: Mapping[str, Entries]) -> None:
        """Take in new entries, by the keys of their streams; those of other jobs are passed over."""
        for entry_id, fields in entries.get(self._text_key, ()):
            self.positions[self._text_key] = entry_id
            try:
                piece = entry_to_piece(fields)
            except (KeyError, TypeError, ValueError):
                continue  # not written by a worker; text that is missing comes with the result
            if piece is None:
                self._require_query()
            else:
                self._append(self._assembly(piece.choice_index).add(piece))
        for entry_id, fields in entries.get(self._results_key, ()):
            self.positions[self._results_key] = entry_id
            if fields.get(b"type") == _SUCCESSFUL:
                try:
                    self.end(result_from_json(return_value(fields)))
                except FastGPT2Error as error:
                    self.end(error)
                return
            self._require_query()

    def end(self, outcome: Outcome) -> None:
        """Note how the job, or the reading, ended. Its texts are completed from the result."""
        self.stage, self.outcome = Stage.ENDED, outcome
        if self._text_key and isinstance(outcome, GenerationResult):
            for one in (outcome, *outcome.alternatives):
                self._append(self._assembly(one.choice_index).complete(one.text, one.logprobs or ()))
        if self._notify is not None:
            self._notify()

    def _assembly(self, choice_index: int) -> Assembly:
        """Return what has been put together of one text."""
        if choice_index not in self._assemblies:
            attempt = max((other.attempt for other in self._assemblies.values()), default=1)
            self._assemblies[choice_index] = Assembly(choice_index, attempt)
        return self._assemblies[choice_index]

    def _require_query(self) -> None:
        """Have the state queried: of entries, only one of success tells by itself how the job ended."""
        if self.stage is Stage.WAITING:
            self.stage = Stage.UNCLEAR

    def _append(self, piece: Piece | None) -> None:
        if piece is not None:
            self._pieces.append(piece)
            if self._notify is not None:
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
            True if entries have come.
        """
        if (yield from self._query_due(jobs)):
            return False
        waiting = list(jobs)
        now = time.monotonic()
        self.timed_out = now >= self._deadline
        if self.timed_out or not waiting:
            return False
        stages = {job.stage for job in waiting}
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
            True if a job has ended.
        """
        if query_all := time.monotonic() >= self._query_all_at:
            due = list(jobs)
        else:
            due = [job for job in jobs if job.stage in (Stage.UNCLEAR, Stage.LETTING_GO)]
        if due:
            queries = Pipeline(tuple(one for job in due for one in job.query()), transaction=True)
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
        # For at least a millisecond: to Redis, zero means for ever.
        read = Command("xread", (positions, None, max(1, int(seconds * 1000))))
        self.blocked = True
        try:
            reply = yield from self._retries.ask(read, self._deadline)
        finally:
            self.blocked = False
        entries = _entries_by_key(reply)
        for key in self._wake_positions:
            for entry_id, _ in entries.pop(key, ()):
                self._wake_positions[key] = entry_id
        return entries


def _entries_by_key(reply: Any) -> dict[str, Entries]:
    """Return the entries in a reply to XREAD by the keys of their streams, whichever protocol the connection speaks."""
    if isinstance(reply, dict):  # RESP3, where the entries are a list in a list
        return {key.decode(): [entry for part in parts for entry in part] for key, parts in reply.items()}
    return {key.decode(): entries for key, entries in reply or ()}
