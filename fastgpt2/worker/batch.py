"""The jobs that a worker holds: those that are decoded together, and those that wait for room. No Redis here."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.executions import Execution

from fastgpt2.engine.decoding.records import FinishReason, GenerationResult, Timings, Usage
from fastgpt2.engine.network.gpt2 import PREFILL_ROWS_BESIDE
from fastgpt2.errors import JobTimedOut
from fastgpt2.protocol.keys import SUSPECT_CRASHES
from fastgpt2.protocol.messages import JobOptions, Piece, result_to_json
from fastgpt2.protocol.untrusted import seconds_between
from fastgpt2.worker.rq_job import GenerationJob

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
    from fastgpt2.engine.engine import Engine


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


@dataclass(eq=False, slots=True)
class Started:
    """A job that this worker has started.

    Attributes:
        attempt: how often it has been started, this time included.
        crashes: how many workers have died with it in their hands.
        began_at: when, on `time.monotonic`'s clock.
    """

    job: GenerationJob
    queue: Queue
    execution: Execution
    attempt: int
    began_at: float
    crashes: int

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def waited_seconds(self) -> float:
        """From being enqueued until started, by the clocks of two machines; never below zero."""
        return seconds_between(self.job.enqueued_at, self.job.started_at)


@dataclass(eq=False, slots=True)
class Running:
    """A started job.

    Attributes:
        sequence: None while it waits for a slot.
        due_at: when its time is up, on `time.monotonic`'s clock.
        sent: how much of it has been streamed.
        muted: no more is: its stream is something else.
    """

    started: Started
    prompt: TokenizedPrompt
    options: JobOptions
    model: str
    due_at: float
    due_reason: str
    sequence: Sequence | None = None
    sent: Sent = field(default_factory=Sent)
    muted: bool = False

    @classmethod
    def begin(cls, started: Started, prompt: TokenizedPrompt, options: JobOptions, model: str, now: float) -> Running:
        limit = started.job.timeout or Queue.DEFAULT_TIMEOUT
        due_at = now + limit if limit > 0 else math.inf
        reason = f"took longer than the {limit} s that it was given from its start (job_timeout)"
        if options.timeout is not None:
            left = options.timeout - started.waited_seconds
            if now + left < due_at:
                due_at = now + left
                reason = (
                    f"took longer than the {options.timeout:g} s that it was given from being enqueued (timeout), "
                    f"{started.waited_seconds:.1f} s of them in the queue"
                )
        return cls(started, prompt, options, model, due_at, reason)

    @property
    def alone(self) -> bool:
        """Whether it is run with no other beside it."""
        return self.started.crashes >= SUSPECT_CRASHES

    @property
    def id(self) -> str:
        return self.started.id

    @property
    def first_token_seconds(self) -> float:
        """From being enqueued to the first token: in the queue, waiting for a slot, reading the prompt.

        By two clocks: the time since the start, less that since the first token.
        """
        assert self.sequence is not None
        since_start = time.monotonic() - self.started.began_at
        since_first_token = time.perf_counter() - self.sequence.first_token_at
        return self.started.waited_seconds + max(0.0, since_start - since_first_token)

    def time_up(self, now: float) -> JobTimedOut | None:
        return JobTimedOut(self.id, self.due_reason) if now > self.due_at else None

    def unsent(self) -> Piece | None:
        """The text that may be streamed and has not been, if there is any."""
        if not self.options.stream or self.muted or self.sequence is None:
            return None
        return self.sent.next(self.sequence, self.started.attempt)

    def last(self) -> Piece | None:
        """What the stream ends with, perhaps without text; None if there is no stream."""
        if not self.options.stream:
            return None
        return self.unsent() or Piece("", self.sent.characters, self.started.attempt)

    def result(self) -> dict[str, Any]:
        """The result of a sequence that ended by itself, as JSON."""
        assert self.sequence is not None
        return result_to_json(self.sequence.result(self.model), self.started.waited_seconds)

    def partial(self, reason: FinishReason) -> dict[str, Any]:
        """What has been generated so far, perhaps nothing, as the JSON of a result."""
        if self.sequence is not None:
            result = self.sequence.result(self.model, reason)
        else:
            usage, timings = Usage(len(self.prompt.ids), 0), Timings(0.0, 0.0, 0.0)
            result = GenerationResult("", (), reason, usage, timings, self.model)
        return result_to_json(result, self.started.waited_seconds)


class Batch:
    """First come, first served: a job that must wait for memory lets nobody past.

    Attributes:
        steps, tokens: taken and generated so far.
        sizes: how many of the steps had 0, 1, 2... sequences.
        step_seconds: spent in the steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._most = engine.max_batch
        self._decoder = engine.decoder
        self._waiting: deque[Running] = deque()
        self._running: dict[Sequence, Running] = {}
        self.steps = self.tokens = 0
        self.sizes = [0] * (self._most + 1)
        self.step_seconds = 0.0

    def __iter__(self) -> Iterator[Running]:
        """All of them, in the order in which they came."""
        yield from list(self._running.values())
        yield from list(self._waiting)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def running(self) -> list[Running]:
        return list(self._running.values())

    @property
    def waiting(self) -> list[Running]:
        return list(self._waiting)

    def add(self, running: Running) -> None:
        self._waiting.append(running)

    def admit(self) -> None:
        """Let in whom there is room for; they are decoded from the next step on."""
        while self._waiting and self._may_join(self._waiting[0]):
            running = self._waiting.popleft()
            running.sequence = self._decoder.admit(running.prompt)
            self._running[running.sequence] = running

    def _may_join(self, running: Running) -> bool:
        if self._running and (running.alone or self._is_one_alone()):
            return False
        return len(self._running) < self._most and self._decoder.has_room(running.prompt)

    def _is_one_alone(self) -> bool:
        return len(self._running) == 1 and next(iter(self._running.values())).alone

    def room(self) -> int:
        """How many more could begin now. None while prompts keep the next step busy: another worker might be free."""
        unread = sum(len(sequence.pending) for sequence in self._running if not sequence.token_ids)
        if self._waiting or unread >= PREFILL_ROWS_BESIDE or self._is_one_alone():
            return 0
        return self._most - len(self._running)

    def step(self) -> list[Running]:
        """Advance all of them. Returns those that ended by themselves, which are not held any more.

        Raises whatever the decoder raises; then none of them can go on.
        """
        if not self._running:
            return []
        began = time.perf_counter()
        before = [len(sequence.token_ids) for sequence in self._running]
        ended = self._decoder.step()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1
        self.sizes[len(before)] += 1
        self.tokens += sum(len(sequence.token_ids) for sequence in self._running) - sum(before)
        return [self._running.pop(sequence) for sequence in ended]

    def drop(self, running: Running) -> None:
        """Let go of a job; what it has generated stays readable."""
        if running.sequence is None:
            self._waiting.remove(running)
        elif self._running.pop(running.sequence, None) is not None:
            self._decoder.finish(running.sequence)
