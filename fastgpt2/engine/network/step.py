"""A step, and the barrier at which the processes that share it wait for each other.

A step runs some tokens of some sequences through the network. What it runs of one sequence is a segment; the sequence's
place in the KV cache is a slot. A step is plain numbers, so that the first process can write it into memory that the
others read.

The processes of a team carry out each step together and meet dozens of times in it. Threads would do if it were not for
two things: Python's threads share a lock, and to wake one that sleeps took 50 microseconds on a virtual machine
(`docs/engine.md`), which is a sixth of a step of 50 products. So each core has a process, all of them map the weights
and the state, and a process that is done reads a number in that state again and again until the others are done, too.
Between steps the helpers soon stop looking and sleep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.network.arena import Spec

# A network's sets of weights: those that its logits come from, and those that make drafts, if there are any.
OWN_WEIGHTS, DRAFT_WEIGHTS = 0, 1

# Numbers that different processes write stand this far apart: no two on one cache line, nor on its neighbour, which is
# fetched along.
STRIDE = 16
STEP = 0  # the number of the step begun last; at multiples of STRIDE follow the arrivals, then who has joined

# Processes that have a core each come to the barrier within microseconds; this many looks take a few hundred.
_LOOKS_BEFORE_SLEEP = 5000
_NAP_SECONDS = 50e-6

# How often to check whether the process that is waited for still lives.
_CHECK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence.

    Attributes:
        ids: the tokens that follow what the slot holds, at least one.
        n_logits: of how many of the last of these tokens logits are wanted: 0 in the midst of a prompt, else 1 or more.
    """

    slot: int
    ids: Sequence[int]
    n_logits: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """Segments to run together, a row a token.

    Attributes:
        starts: the position of each segment's first token.
        weights: the set of weights to run them by, `OWN_WEIGHTS` or `DRAFT_WEIGHTS`.
    """

    segments: Sequence[Segment]
    starts: Sequence[int]
    weights: int = OWN_WEIGHTS

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

    def to_numbers(self) -> list[int]:
        numbers = [self.weights, len(self.segments)]
        for segment, start in zip(self.segments, self.starts, strict=True):
            numbers += (segment.slot, segment.n_logits, start, len(segment.ids), *segment.ids)
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Step:
        segments, starts, at = [], [], 2
        for _ in range(numbers[1]):
            slot, n_logits, start, length = numbers[at : at + 4]
            at += 4
            segments.append(Segment(slot, numbers[at : at + length], n_logits))
            starts.append(start)
            at += length
        return cls(segments, starts, numbers[0])


def most_numbers(rows: int, segments: int) -> int:
    """Return how many numbers `Step.to_numbers` gives at most."""
    return 2 + 4 * segments + rows


def control_spec(size: int, max_rows: int) -> Spec:
    """Return the shared array of a team's barrier: step, arrivals, who has joined, and the step as numbers."""
    return (STRIDE * (2 * size + 1) + 2 + most_numbers(max_rows, max_rows),), np.int64


class Barrier:
    """One process's end of a team's barrier: it starts or receives steps, and waits for the others within them.

    Args:
        control: the shared array, of `control_spec`.
        rank: 0 for the first process, which starts the steps.
        check: called now and then while waiting; raises an error when waiting is in vain.

    Attributes:
        count, own, others, arrived_at: how often processes have come, and when this one came last (`Meeting`).
    """

    def __init__(self, control: NDArray[np.int64], rank: int, size: int, check: Callable[[], None]) -> None:
        self._numbers = memoryview(control.data)
        self.count = memoryview(np.zeros(1, np.int64).data)
        # How often each process has come to the barrier.
        arrivals = [self._numbers[at : at + 1] for at in range(STRIDE, STRIDE * (1 + size), STRIDE)]
        self.own = arrivals[rank]
        self.others = [*arrivals[:rank], *arrivals[rank + 1 :]]
        self._joined = [STRIDE * (1 + size + other) for other in range(size)]
        self._description = STRIDE * (2 * size + 1)
        self._check, self._rank = check, rank
        self._step = 0
        self.arrived_at = 0.0

    def join(self) -> None:
        """Tell the others that this process takes part from the next step on."""
        self._numbers[self._joined[self._rank]] = 1

    @property
    def complete(self) -> bool:
        return all(self._numbers[at] for at in self._joined)

    def begin(self, step: Step) -> None:
        """Start a step in every process; only the first process does."""
        numbers, at = step.to_numbers(), self._description
        self._numbers[at] = self.count[0]
        self._numbers[at + 1] = len(numbers)
        for offset, number in enumerate(numbers, at + 2):
            self._numbers[offset] = number
        self._step += 1
        # Last: whoever sees this number sees all that was written before it.
        self._numbers[STEP] = self._step

    def has_begun(self) -> bool:
        """Tell whether there is a step that this process has not received; all but the first process ask."""
        return self._numbers[STEP] > self._step

    def receive(self) -> Step:
        self._step = self._numbers[STEP]
        at = self._description
        self.count[0] = self._numbers[at]
        return Step.from_numbers(self._numbers[at + 2 : at + 2 + self._numbers[at + 1]].tolist())

    def wait(self) -> None:
        """Come, and return when every other process has come; what `check` raises ends the waiting."""
        arrivals = self.count[0] + 1
        self.count[0] = self.own[0] = arrivals
        looks = 0
        for other in self.others:
            while other[0] < arrivals:
                looks += 1
                if looks > _LOOKS_BEFORE_SLEEP:
                    self.wait_asleep()

    def wait_asleep(self) -> None:
        """Wait for a process that has lost its core to somebody else: a core left idle is one that it can come to."""
        checked_at = time.monotonic()
        while any(other[0] < self.count[0] for other in self.others):
            time.sleep(_NAP_SECONDS)
            now = time.monotonic()
            if now - checked_at > _CHECK_SECONDS:
                self._check()
                checked_at = now
