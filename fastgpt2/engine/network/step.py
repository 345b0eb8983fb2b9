"""What one forward step does, as plain numbers: the same for every process that has a share in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.network.arena import Spec


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence.

    Attributes:
        slot: the sequence's slot in the KV cache.
        ids: the tokens that follow what the slot holds, at least one.
        n_logits: for how many of the last of these tokens logits are wanted (0 in the midst of a prompt, else 1).
    """

    slot: int
    ids: Sequence[int]
    n_logits: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """Segments, each with the position of its first token; `by` which of a network's sets of weights, 0 its own."""

    segments: Sequence[Segment]
    starts: Sequence[int]
    by: int = 0

    @property
    def rows(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    def rows_with_logits(self) -> list[int]:
        rows: list[int] = []
        stop = 0
        for segment in self.segments:
            stop += len(segment.ids)
            rows.extend(range(stop - segment.n_logits, stop))
        return rows

    def encode(self) -> list[int]:
        """As numbers, for `decode` in another process."""
        numbers = [self.by, len(self.segments)]
        for segment, start in zip(self.segments, self.starts, strict=True):
            numbers += (segment.slot, segment.n_logits, start, len(segment.ids), *segment.ids)
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Step:
        segments, starts, at = [], [], 2
        for _ in range(numbers[1]):
            slot, n_logits, start, length = numbers[at : at + 4]
            at += 4
            segments.append(Segment(slot, numbers[at : at + length], n_logits))
            starts.append(start)
            at += length
        return cls(segments, starts, numbers[0])


def encoded_size(rows: int, segments: int) -> int:
    """The most numbers that `Step.encode` gives."""
    return 2 + 4 * segments + rows


# NOTE engine.team: Processes that carry out each step together: they meet dozens of times a step, and wait for each
# other by looking.
#
# Threads would do if it were not for two things. Python's threads share a lock, and to wake one that sleeps took 50
# microseconds on a virtual machine (`docs/engine.md`): of a step of 50 products, a sixth. So each core has a process,
# all of them map the weights and the state, and a process that is done looks at a number in that state until the
# others are done, too. Between steps the helpers soon stop looking and sleep.

# Numbers apart, so that no two processes write to one cache line (or its neighbour, which is fetched along).
STRIDE = 16
STEP = 0  # the number of the step begun last; the arrivals follow at multiples of STRIDE

# A helper that has nothing to do looks for a new step for so long, then sleeps.
SPIN_SECONDS = 0.003

# Beyond this pause between two steps, helpers may sleep, or be about to; well below the time above.
WAKE_AFTER_SECONDS = 0.001

# At a meeting, processes that have a core each come within microseconds; so many looks take a few hundred.
_LOOKS_BEFORE_SLEEP = 5000
_NAP_SECONDS = 50e-6

# How often to see whether who is waited for still lives.
_PATIENCE_SECONDS = 0.05


class TeamBroken(Exception):
    """Another process of the team has ended; what it had to do in this step is not done."""


def control_spec(size: int, numbers: int) -> Spec:
    """Of the shared array: step, arrivals, and a step's description of at most so many numbers."""
    return (STRIDE * (2 * size + 1) + 2 + numbers,), np.int64


class Meeting:
    """One process's seat in the team."""

    def __init__(self, control: NDArray[np.int64], rank: int, size: int, check: Callable[[], None]) -> None:
        """
        Args:
            control: the shared array, of `control_spec`.
            check: called now and then while waiting; raises `TeamBroken` when it is in vain.
        """
        self._numbers = memoryview(control.data)
        self._mine = STRIDE * (1 + rank)
        self._others = [STRIDE * (1 + other) for other in range(size) if other != rank]
        self._ready = [STRIDE * (1 + size + other) for other in range(size)]
        self._description = STRIDE * (2 * size + 1)
        self._check = check
        self._rank = rank
        self._arrivals = 0
        self.arrived_at = 0.0
        self.step = 0

    def join(self) -> None:
        """Tell the others that this process takes part from the next step on."""
        self._numbers[self._ready[self._rank]] = 1

    @property
    def complete(self) -> bool:
        return all(self._numbers[at] for at in self._ready)

    def begin(self, description: list[int]) -> None:
        """Start a step in every process (the first process only)."""
        at = self._description
        self._numbers[at] = self._arrivals
        self._numbers[at + 1] = len(description)
        for offset, number in enumerate(description, at + 2):
            self._numbers[offset] = number
        self.step += 1
        self._numbers[STEP] = self.step

    def begun(self) -> bool:
        """Whether there is a step that this process has not taken up (all but the first process)."""
        return self._numbers[STEP] > self.step

    def take_up(self) -> list[int]:
        """The description of that step."""
        self.step = self._numbers[STEP]
        at = self._description
        self._arrivals = self._numbers[at]
        return self._numbers[at + 2 : at + 2 + self._numbers[at + 1]].tolist()

    def wait(self) -> None:
        """Return when every process has come here.

        Raises:
            TeamBroken: from `check`.
        """
        numbers = self._numbers
        self._arrivals += 1
        self.arrived_at = time.monotonic()
        numbers[self._mine] = arrivals = self._arrivals
        for other in self._others:
            looks = 0
            while numbers[other] < arrivals:
                looks += 1
                if looks > _LOOKS_BEFORE_SLEEP:
                    self._wait_long(other)

    def _wait_long(self, other: int) -> None:
        """Somebody else has that process's core. A core left idle is one that it can come to."""
        checked = time.monotonic()
        while self._numbers[other] < self._arrivals:
            time.sleep(_NAP_SECONDS)
            now = time.monotonic()
            if now - checked > _PATIENCE_SECONDS:
                self._check()
                checked = now
