"""The jobs that a worker runs: what is known of each, how it may end, and which are decoded together. No Redis here."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.executions import Execution

from fastgpt2.engine.decoding.records import FinishReason, GenerationResult, Timings, Usage
from fastgpt2.engine.network.gpt2 import PREFILL_ROWS_BESIDE
from fastgpt2.protocol.keys import SUSPECT_CRASHES
from fastgpt2.protocol.messages import JobOptions, Piece, result_to_json
from fastgpt2.protocol.untrusted import seconds_between
from fastgpt2.worker.rq_job import GenerationJob

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
    from fastgpt2.engine.engine import Engine


@dataclass(slots=True)
class StreamPosition:
    """The part of a job's stream that was sent: a number of characters of its text, and of log probabilities."""

    characters: int = 0
    logprobs: int = 0

    def next_piece(self, sequence: Sequence, attempt: int) -> Piece | None:
        """Return what may be sent next; None if there is no further text that is sure to stay."""
        end = sequence.settled
        if end <= self.characters:
            return None
        text, at = sequence.text[self.characters : end], self.characters
        if not sequence.logprobs:
            return Piece(text, at, attempt)
        unsent = sequence.logprobs[self.logprobs :]
        return Piece(text, at, attempt, tuple(takewhile(lambda one: one.text_offset < end, unsent)), self.logprobs)

    def advance(self, piece: Piece) -> None:
        """Note that a piece was sent."""
        self.characters = piece.at + len(piece.text)
        self.logprobs = piece.token_at + len(piece.logprobs)


@dataclass(eq=False, slots=True)
class Attempt:
    """A job that this worker has claimed, and then one run of it: RQ calls the run an execution.

    Attributes:
        execution: RQ's record of the run; without an id until the job is started.
        began_at: when it began, on `time.monotonic`'s clock.
        number: how often the job has been started, this time included; 0 until it is started.
    """

    id: str
    rq_job: GenerationJob
    queue: Queue
    execution: Execution
    began_at: float
    number: int = 0

    @property
    def waited_seconds(self) -> float:
        """The time from being enqueued until being started, by the clocks of two machines; never below zero."""
        return seconds_between(self.rq_job.enqueued_at, self.rq_job.started_at)

    @property
    def is_suspect(self) -> bool:
        """True if workers have died of the job: then it runs with no other beside it."""
        return self.rq_job.crashes >= SUSPECT_CRASHES


@dataclass(eq=False, slots=True)
class ActiveJob:
    """A running job: its request is known to be good; it waits for a slot, or is decoded.

    Attributes:
        deadline: when its time is up, on `time.monotonic`'s clock; `deadline_reason` says why.
        sequence: None while the job waits for a slot.
        position: how far its stream has come.
        muted: no more is streamed: under the stream's key stands something else.
    """

    id: str
    attempt: Attempt
    prompt: TokenizedPrompt
    options: JobOptions
    model: str
    deadline: float
    deadline_reason: str
    sequence: Sequence | None = None
    position: StreamPosition = field(default_factory=StreamPosition)
    muted: bool = False

    @classmethod
    def begin(cls, attempt: Attempt, prompt: TokenizedPrompt, options: JobOptions, model: str, now: float) -> ActiveJob:
        """Return the running job of an attempt, with the earlier of its two deadlines."""
        limit = attempt.rq_job.timeout or Queue.DEFAULT_TIMEOUT
        deadline = now + limit if limit > 0 else math.inf
        reason = f"took longer than the {limit} s that it was given from its start (job_timeout)"
        if options.timeout is not None:
            left = options.timeout - attempt.waited_seconds
            if now + left < deadline:
                deadline = now + left
                reason = (
                    f"took longer than the {options.timeout:g} s that it was given from being enqueued (timeout), "
                    f"{attempt.waited_seconds:.1f} s of them in the queue"
                )
        return cls(attempt.id, attempt, prompt, options, model, deadline, reason)

    @property
    def first_token_seconds(self) -> float:
        """The time from being enqueued to the first token: in the queue, waiting for a slot, reading the prompt.

        By two clocks: the time since the start, less the time since the first token.
        """
        assert self.sequence is not None
        since_start = time.monotonic() - self.attempt.began_at
        since_first_token = time.perf_counter() - self.sequence.first_token_at
        return self.attempt.waited_seconds + max(0.0, since_start - since_first_token)

    def next_piece(self) -> Piece | None:
        """Return the text that may be streamed and was not yet; None if there is none."""
        if not self.options.stream or self.muted or self.sequence is None:
            return None
        return self.position.next_piece(self.sequence, self.attempt.number)

    def last_piece(self) -> Piece | None:
        """Return what the stream ends with, perhaps without text; None if the job has no stream."""
        if not self.options.stream:
            return None
        return self.next_piece() or Piece("", self.position.characters, self.attempt.number)

    def result(self) -> dict[str, Any]:
        """Return the result of a sequence that ended by itself, as JSON."""
        assert self.sequence is not None
        return result_to_json(self.sequence.result(self.model), self.attempt.waited_seconds)

    def partial_result(self, reason: FinishReason) -> dict[str, Any]:
        """Return what has been generated so far, perhaps nothing, as the JSON of a result."""
        if self.sequence is not None:
            result = self.sequence.result(self.model, reason)
        else:
            usage, timings = Usage(len(self.prompt.ids), 0), Timings(0.0, 0.0, 0.0)
            result = GenerationResult("", (), reason, usage, timings, self.model)
        return result_to_json(result, self.attempt.waited_seconds)


class EndKind(Enum):
    """The ways in which a job leaves a worker."""

    FINISHED = "it came to its end"
    FAILED = "an error ended it"
    RETRIED = "an error ended it, and it is to run again"
    STOPPED = "a stop command ended it"
    CANCELED = "somebody has cancelled it"
    LOST = "it is not this worker's to end: cancelled, deleted, or taken back"


@dataclass(frozen=True, slots=True)
class End:
    """An end of a job.

    Attributes:
        result: of a job that finished, as JSON.
        error: of a job that failed, is retried, or was stopped.
        partial: what had been generated of a job that was stopped or is out of time, as the JSON of a result.
        last_piece: what its stream ends with; None if it has none.
    """

    attempt: Attempt
    kind: EndKind
    result: dict[str, Any] | None = None
    error: Exception | None = None
    partial: dict[str, Any] | None = None
    last_piece: Piece | None = None


class Batch:
    """The running jobs of a worker, first come, first served: one that must wait for memory lets nobody past.

    Attributes:
        steps, tokens: how many were taken and generated so far.
        sizes: how many of the steps had 0, 1, 2... sequences.
        step_seconds: the time that the steps took.
    """

    def __init__(self, engine: Engine) -> None:
        self._slots = engine.max_batch
        self._decoder = engine.decoder
        self._waiting: deque[ActiveJob] = deque()
        self._decoding: dict[Sequence, ActiveJob] = {}
        self.steps = 0
        self.tokens = 0
        self.sizes = [0] * (self._slots + 1)
        self.step_seconds = 0.0

    def __iter__(self) -> Iterator[ActiveJob]:
        """Yield all jobs, in the order in which they came."""
        yield from list(self._decoding.values())
        yield from list(self._waiting)

    def __len__(self) -> int:
        return len(self._decoding) + len(self._waiting)

    @property
    def decoding(self) -> list[ActiveJob]:
        """The jobs that have a slot."""
        return list(self._decoding.values())

    @property
    def waiting(self) -> list[ActiveJob]:
        """The jobs that wait for a slot."""
        return list(self._waiting)

    def add(self, job: ActiveJob) -> None:
        self._waiting.append(job)

    def admit(self) -> None:
        """Give slots to the jobs that there is room for; they are decoded from the next step on."""
        while self._waiting and self._may_join(self._waiting[0]):
            job = self._waiting.popleft()
            job.sequence = self._decoder.admit(job.prompt)
            self._decoding[job.sequence] = job

    def _may_join(self, job: ActiveJob) -> bool:
        if self._decoding and (job.attempt.is_suspect or self._decodes_suspect()):
            return False
        return len(self._decoding) < self._slots and self._decoder.has_room(job.prompt)

    def _decodes_suspect(self) -> bool:
        return len(self._decoding) == 1 and next(iter(self._decoding.values())).attempt.is_suspect

    def room(self) -> int:
        """Return how many more jobs could begin now.

        0 while prompts keep the next step busy: another worker might be free.
        """
        unread = sum(len(sequence.pending) for sequence in self._decoding if not sequence.token_ids)
        if self._waiting or unread >= PREFILL_ROWS_BESIDE or self._decodes_suspect():
            return 0
        return self._slots - len(self._decoding)

    def step(self) -> list[ActiveJob]:
        """Advance all decoding jobs. Return those that ended by themselves; the batch has them no more.

        Raises whatever the decoder raises; then none of them can go on.
        """
        if not self._decoding:
            return []
        began = time.perf_counter()
        before = [len(sequence.token_ids) for sequence in self._decoding]
        ended = self._decoder.step()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1
        self.sizes[len(before)] += 1
        self.tokens += sum(len(sequence.token_ids) for sequence in self._decoding) - sum(before)
        return [self._decoding.pop(sequence) for sequence in ended]

    def drop(self, job: ActiveJob) -> None:
        """Take a job out, if the batch has it; what was generated of it stays readable."""
        if job.sequence is None:
            self._waiting.remove(job)
        elif self._decoding.pop(job.sequence, None) is not None:
            self._decoder.finish(job.sequence)
