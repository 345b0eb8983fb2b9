"""One job in a worker's hands: what was asked, how far it is, when its time is up."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rq import Queue

from fastgpt2.engine.generation import FinishReason, GenerationResult, Timings, Usage
from fastgpt2.errors import JobTimedOut
from fastgpt2.worker.claims import SUSPECT_CRASHES
from fastgpt2.worker.job import JobOptions, result_to_json
from fastgpt2.worker.started import Started
from fastgpt2.worker.stream import Piece, Sent

if TYPE_CHECKING:
    from fastgpt2.engine.sequence import Prompt, Sequence


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
    prompt: Prompt
    options: JobOptions
    model: str
    due_at: float
    due_reason: str
    sequence: Sequence | None = None
    sent: Sent = field(default_factory=Sent)
    muted: bool = False

    @classmethod
    def begin(cls, started: Started, prompt: Prompt, options: JobOptions, model: str, now: float) -> Running:
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
