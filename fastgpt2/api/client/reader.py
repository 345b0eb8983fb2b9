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

from redis.exceptions import NoPermissionError, RedisError
from rq.job import JobStatus
from rq.results import Result

from fastgpt2.api.client.enqueue import SentJob
from fastgpt2.api.client.flow import Command, Entries, Flow, Pipeline
from fastgpt2.api.client.outcome import Outcome, read_outcome, read_partial, return_value
from fastgpt2.api.client.recovery import Recovery
from fastgpt2.engine.decoding.records import GenerationResult, TokenLogprob, Usage
from fastgpt2.errors import FastGPT2Error, JobCancelled, JobNotFound, TextReplaced
from fastgpt2.protocol.keys import cancellations_key, job_key, queues_of, results_key, stream_key
from fastgpt2.protocol.messages import Piece, entry_to_piece, result_from_json
from fastgpt2.protocol.untrusted import is_of_entry, whole

# How long one blocking read lasts at most. Between two reads the states are queried, as not all that happens to a job
# writes an entry: another program may cancel or delete it, or Redis lose it.
READ_SECONDS = 2.0

# For how long RQ's worker keeps a result if the job does not say.
RQ_RESULT_TTL_SECONDS = 500.0

# For how long cancellations are not read once Redis refused it.
DISREGARD_SECONDS = 60.0

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
        return self._put(text, at, logprobs, token_at, piece.usage) if text or logprobs else None

    def begin_again(self) -> None:
        """Listen to the first attempt: the job was lost, and starts as if it had never been."""
        self.attempt = 1

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

    def _put(
        self, text: str, at: int, logprobs: tuple[TokenLogprob, ...], token_at: int, usage: Usage | None = None
    ) -> Piece:
        self.text = self.text[:at] + text
        self._tokens[token_at:] = _tokens(logprobs)
        return Piece(text, at, self.attempt, logprobs, token_at, self._choice_index, usage)


def _tokens(logprobs: Sequence[TokenLogprob]) -> list[Token]:
    return [(one.token_id, one.text_offset) for one in logprobs]


def _count_held(held: Sequence[object], at: int, new: Sequence[object]) -> int:
    """Return how many of the first items of `new` equal what is held from `at` on."""
    same = 0
    while same < min(len(new), len(held) - at) and held[at + same] == new[same]:
        same += 1
    return same


class AppendOnlyTexts:
    """Texts for a reader who cannot take anything back: they may only grow."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def add(self, number: int, piece: Piece) -> None:
        """Take in a piece of the text with this number.

        Raises:
            TextReplaced: the piece replaces some of the text.
        """
        if piece.at < self._lengths.get(number, 0):
            raise TextReplaced(
                "the job was started again by another worker, whose text differs from what has been given: ask again"
            )
        self._lengths[number] = piece.at + len(piece)


class Stage(Enum):
    """Where a job stands, for those who wait for its end."""

    # It waits, runs or will run again. Its end will write an entry to its results.
    WAITING = "waiting"

    # Something was written whose meaning only the job's state tells; or nothing is known of the job yet.
    UNCLEAR = "unclear"

    # It was cancelled, and its worker still has to write down what it had generated. That writes no entry.
    LETTING_GO = "letting go"

    # It is known to have been there, and is not there any more: see `Recovery`.
    MISSED = "missed"

    ENDED = "ended"


class JobReader:
    """The reader of one job: it keeps pieces of its text, if that is streamed, and how it ended.

    Args:
        streamed: read the text too.
        new: the job was enqueued just now, so there is no need to ask whether it exists or has ended long since.
        notify: called when there are pieces to take, or the job has ended.
        sent: the job as it was enqueued here, so that it can be enqueued again if Redis loses it.

    Attributes:
        id: the job's id.
        outcome: how the job ended; None until then.
        history: the run id of the Redis that had the job when it was seen last; None if that is not known.
        positions: the keys of the job's streams, each with the id of the last entry read there.
    """

    def __init__(
        self,
        job_id: str,
        streamed: bool = False,
        new: bool = False,
        notify: Callable[[], object] | None = None,
        sent: SentJob | None = None,
    ) -> None:
        self.stage = Stage.WAITING if new else Stage.UNCLEAR
        self.outcome: Outcome | None = None
        self.sent = sent
        self.history: str | None = None
        # When the job was last known to be there, on the monotonic clock, and for how long its end can be read.
        self._seen_at: float | None = time.monotonic() if new else None
        self._kept_for = RQ_RESULT_TTL_SECONDS
        if sent is not None:
            self.history, self._seen_at, self._kept_for = sent.history, sent.sent_at, float(sent.result_ttl)
        self._streamed = streamed
        self._begin(job_id)
        # By their indices: each text of the job has pieces of its own.
        self._assemblies: dict[int, Assembly] = {}
        self._pieces = deque[Piece]()
        self._cancelled_at = 0.0
        self._notify = notify

    def _begin(self, job_id: str) -> None:
        self.id = job_id
        self._results_key = results_key(job_id)
        self._text_key = stream_key(job_id) if self._streamed else ""
        self.positions: dict[str, bytes | str] = dict.fromkeys(filter(None, (self._results_key, self._text_key)), "0-0")

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
            Command("hmget", (job_key(self.id), "status", "worker_name", "meta", "result_ttl")),
            Command("xrevrange", (self._results_key, "+", "-", 1)),
        )

    def on_state(self, replies: Sequence[Any], now: float, history: str | None = None) -> None:
        """Take in the replies to `query`.

        Args:
            now: the time on the monotonic clock.
            history: the run id of the Redis that replied, if it is known.
        """
        (status, worker_name, meta, *result_ttl), entries = replies
        if entries:
            self.positions[self._results_key] = entries[-1][0]
        if status is not None:
            self._on_presence(now, history, *result_ttl)
        if status == _CANCELED:
            if self.stage is not Stage.LETTING_GO:
                self.stage, self._cancelled_at = Stage.LETTING_GO, now
            if not worker_name or now - self._cancelled_at >= LETTING_GO_SECONDS:
                self.end(JobCancelled(self.id, "on request", "JobCancelled", read_partial(meta)))
            return
        was_cancelled, self.stage = self.stage is Stage.LETTING_GO, Stage.WAITING
        try:
            outcome = read_outcome(self.id, status, meta, entries)
        except JobNotFound as error:
            if was_cancelled:
                outcome = JobCancelled(self.id, "on request", "JobCancelled")
            elif self.is_missed(now):
                self.stage = Stage.MISSED
                return
            else:
                outcome = error
        except FastGPT2Error as error:
            outcome = error
        if outcome is not None:
            self.end(outcome)

    def is_missed(self, now: float) -> bool:
        """Tell whether the job must still be there: it was, and what is kept of its end cannot have expired since."""
        return self._seen_at is not None and now - self._seen_at < self._kept_for

    def _on_presence(self, now: float, history: str | None, result_ttl: bytes | None = None) -> None:
        self._seen_at = now
        if self.sent is None and result_ttl is not None:
            seconds = whole(result_ttl)
            self._kept_for = math.inf if seconds is None else float(seconds)
        if history is not None and history != self.history:
            self.history = history
            # Another Redis has taken over. By its clock, new entries may come before those that were read elsewhere.
            if self._text_key:
                self.positions[self._text_key] = "0-0"

    def renew(self, job_id: str, history: str | None, now: float) -> None:
        """Wait for the job anew, which was lost and is enqueued again: its text begins again, and is given once."""
        self._begin(job_id)
        for assembly in self._assemblies.values():
            assembly.begin_again()
        self.stage, self.history, self._seen_at = Stage.WAITING, history, now

    def on_cancellation(self) -> None:
        """Have the state queried: somebody has cancelled the job."""
        self._require_query()

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
        if self.sent is not None:
            self.sent.is_wanted = False
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
        recovery: enqueues again what Redis has lost.
        timeout: seconds to wait; None waits for as long as it takes.
        wake_key: a Redis stream that is read too. An entry there ends a read, so that jobs which have joined are read.

    Attributes:
        blocked: a read waits just now, for the jobs that were there when it began.
        timed_out: the time was up when the states were queried last.
    """

    def __init__(self, recovery: Recovery, timeout: float | None = None, wake_key: str | None = None) -> None:
        self.timeout = timeout
        self.blocked = self.timed_out = False
        self._recovery = recovery
        self._retries = recovery.retries
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._wake_positions: dict[str, bytes | str] = {} if wake_key is None else {wake_key: "0-0"}
        # Where the queues' cancellations are read from: from behind the last one that the query of the states covers.
        self._cancellations = [cancellations_key(name) for name in queues_of(recovery.queue)]
        self._cancellation_positions: dict[str, bytes | str] = {}
        self._cancellations_from = 0.0
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
            yield from self._query(due, query_all)
        if query_all:
            now = time.monotonic()
            self._query_all_at = min(now + READ_SECONDS, self._deadline if self._deadline > now else math.inf)
        return any(job.outcome is not None for job in due)

    def _query(self, jobs: Sequence[JobReader], all_of_them: bool) -> Flow[None]:
        """Query the jobs' states, and enqueue again what has been lost."""
        more: tuple[Command, ...] = ()
        if all_of_them:
            yield from self._recovery.look(self._deadline)
            if time.monotonic() >= self._cancellations_from:
                more = tuple(Command("xrevrange", (key, "+", "-", 1)) for key in self._cancellations)
        queries = tuple(one for job in jobs for one in job.query())
        try:
            replies = yield from self._retries.ask(Pipeline((*queries, *more), transaction=True), self._deadline)
        except RedisError as error:
            if not more or not self._disregards_cancellations(error):
                raise
            replies = yield from self._retries.ask(Pipeline(queries, transaction=True), self._deadline)
        now = time.monotonic()
        for job, at in zip(jobs, range(0, 2 * len(jobs), 2), strict=True):
            job.on_state(replies[at : at + 2], now, self._recovery.history)
        for key, entries in zip(self._cancellations, replies[2 * len(jobs) :], strict=False):
            self._cancellation_positions[key] = entries[0][0] if entries else "0-0"
        missed = [job for job in jobs if job.stage is Stage.MISSED]
        if missed:
            yield from self._recovery.recover(missed, self._deadline)

    def _read(self, jobs: Sequence[JobReader], seconds: float) -> Flow[dict[str, Entries]]:
        positions = {**self._wake_positions, **self._cancellation_positions}
        for job in jobs:
            positions.update(job.positions)
        # For at least a millisecond: to Redis, zero means for ever.
        read = Command("xread", (positions, None, max(1, int(seconds * 1000))))
        self.blocked = True
        try:
            reply = yield from self._retries.ask(read, self._deadline)
        except RedisError as error:
            if not self._cancellation_positions or not self._disregards_cancellations(error):
                raise
            return {}
        finally:
            self.blocked = False
        entries = _entries_by_key(reply)
        for key in self._wake_positions:
            for entry_id, _ in entries.pop(key, ()):
                self._wake_positions[key] = entry_id
        self._take_cancellations(jobs, entries)
        return entries

    def _disregards_cancellations(self, error: Exception) -> bool:
        """Tell whether the error may come of reading cancellations. If so, these are not read for a while.

        A key may have another type, or the user have the rights that sufficed before. As the states are queried every
        `READ_SECONDS`, cancellations are then heard of later.
        """
        if not is_of_entry(error) and not isinstance(error, NoPermissionError):
            return False
        self._cancellations_from = time.monotonic() + DISREGARD_SECONDS
        self._cancellation_positions = {}
        return True

    def _take_cancellations(self, jobs: Sequence[JobReader], entries: dict[str, Entries]) -> None:
        """Have the states of those jobs queried that were cancelled."""
        cancelled = set()
        for key in self._cancellation_positions:
            for entry_id, fields in entries.pop(key, ()):
                self._cancellation_positions[key] = entry_id
                cancelled.add(fields.get(b"job"))
        if cancelled:
            for job in jobs:
                if job.id.encode() in cancelled:
                    job.on_cancellation()


def _entries_by_key(reply: Any) -> dict[str, Entries]:
    """Return the entries in a reply to XREAD by the keys of their streams, whichever protocol the connection speaks."""
    if isinstance(reply, dict):  # RESP3, where the entries are a list in a list
        return {key.decode(): [entry for part in parts for entry in part] for key, parts in reply.items()}
    return {key.decode(): entries for key, entries in reply or ()}
