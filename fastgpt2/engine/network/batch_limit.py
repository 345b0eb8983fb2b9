"""The batch limit: how many sequences are decoded together, as many as pay.

What was measured when the model was first loaded (`step_times.py`) is where it begins. From then on the steps of the
jobs themselves tell, as long as there are enough of them:

- **In a round of looks** some steps take a half or a quarter of the sequences, in turn with whole steps. A sequence
  that is left out has its turn in one of the next steps. So a limit that is too high is found without waiting for fewer
  jobs, at the price of some shorter steps, and a neighbour's load meets all sizes alike.
- **In a trial** the limit is doubled, or made four times as high, for some time. If jobs fill it, a round of looks
  tells whether it stays.

All times are those of steps, added up: nothing here looks at a clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from fastgpt2.engine.network.gpt2 import GPT2

log = logging.getLogger("fastgpt2.engine")
T = TypeVar("T")

# A batch is worth its size if it gives this many times the tokens a second of the best smaller one.
LEAST_BATCH_GAIN = 1.15

# Steps of each size in a round of looks; and the seconds of steps within which they must come, to be of one situation.
_LOOKS, _ROUND_SECONDS = 7, 10.0

# Which of them counts, the shortest being 0. What disturbs a step only ever adds; one alone may have been lucky.
_COUNTED_LOOK = 1

# Seconds of steps before the first round; between rounds, doubled as long as nothing changes.
_FIRST_ROUND_SECONDS, _LEAST_BETWEEN_ROUNDS, _MOST_BETWEEN_ROUNDS = 1.0, 30.0, 600.0

# Fewer sequences than the limit are looked at only from this number on. Of two or three, little can be told: a BLAS may
# have a kernel for one row, and another for many, whose overhead two rows do not earn.
_LEAST_LOOKED_AT = 4

# Seconds of steps that a trial waits to be filled; between trials, doubled each time that a higher limit does not pay.
_TRIAL_SECONDS, _LEAST_BETWEEN_TRIALS, _MOST_BETWEEN_TRIALS = 20.0, 10.0, 600.0


class Finding(NamedTuple):
    """How many sequences pay, by how far the looks of a size lay apart in the mean of sizes, and by how many looks."""

    sequences: int
    spread: float
    looks: int


class BatchLimit:
    """Sets how many slots of a network's cache are used, by what steps take.

    Args:
        network: its cache's `usable_slots`, a power of two, are where the limit begins; all its slots are the most that
            is tried.
        adapts: False to leave the limit as it is.

    Attributes:
        finding: what the steps have told last; None if nothing yet.
    """

    def __init__(self, network: GPT2, adapts: bool = True) -> None:
        self.finding: Finding | None = None
        self._network, self._adapts = network, adapts
        self._proven = network.cache.usable_slots
        self._seconds = 0.0
        self._next_round, self._between_rounds = _FIRST_ROUND_SECONDS, _LEAST_BETWEEN_ROUNDS
        self._next_trial, self._between_trials = 0.0, _LEAST_BETWEEN_TRIALS
        self._trial_ends: float | None = None
        self._trial_factor = 2
        # The seconds of the looks of each size in this round, when the round must be over, the size of the step that is
        # being looked at, and how many sequences have had their turn.
        self._looks: dict[int, list[float]] = {}
        self._round_ends = 0.0
        self._size = self._turn = 0

    def take(self, sequences: Sequence[T]) -> Sequence[T]:
        """Return those of the sequences that the next step advances, which reads no prompts; mostly all."""
        self._size = 0
        if not self._adapts:
            return sequences
        if self._looks and self._seconds > self._round_ends:
            self._looks = {}
        if not self._looks and self._is_round_due(len(sequences)):
            self._looks = {size: [] for size in _sizes(min(len(sequences), self._network.cache.usable_slots))}
            self._round_ends = self._seconds + _ROUND_SECONDS
        # Jobs come and go meanwhile.
        missing = [size for size, looks in self._looks.items() if len(looks) < _LOOKS and size <= len(sequences)]
        if not missing:
            return sequences
        self._size = min(missing, key=lambda size: (len(self._looks[size]), -size))
        begin, self._turn = self._turn % len(sequences), self._turn + self._size
        taken = {(begin + i) % len(sequences) for i in range(self._size)}
        return [sequence for i, sequence in enumerate(sequences) if i in taken]

    @property
    def is_looking(self) -> bool:
        """Tell whether the step that was taken last is a look: then it is to have one row for each sequence."""
        return self._size > 0

    def note(self, seconds: float) -> None:
        """Learn how long the step took."""
        if not self._adapts:
            return
        self._seconds += seconds
        if self._size:
            self._looks[self._size].append(seconds)
            self._size = 0
            if all(len(looks) == _LOOKS for looks in self._looks.values()):
                self._decide()
        if self._trial_ends is not None and self._seconds > self._trial_ends:
            self._end_trial()

    def _is_round_due(self, sequences: int) -> bool:
        limit = self._network.cache.usable_slots
        if self._trial_ends is not None:
            return sequences >= limit
        is_telling = sequences >= limit or sequences >= max(_LEAST_LOOKED_AT, limit // 2 + 1)
        return is_telling and self._seconds >= self._next_round

    def _decide(self) -> None:
        """End a round: set the limit by what its looks tell, and begin a trial of a higher one if that is due."""
        times = {size: sorted(looks)[_COUNTED_LOOK] for size, looks in self._looks.items()}
        spread = median(median(looks) / min(looks) - 1 for looks in self._looks.values())
        least, most, before = min(times), max(times), self._proven
        best = largest_that_pays(times.__getitem__, most, least)
        is_trial, self._trial_ends, self._looks = self._trial_ends is not None, None, {}
        # Where fewer sequences than the limit pay, nothing is known of more.
        if best < most or most >= self._network.cache.usable_slots:
            self._proven = self._network.cache.usable_slots = 1 << (best.bit_length() - 1)
            self.finding = Finding(self._proven, spread, _LOOKS)
        if self._proven != before:
            log.info("%d sequences at once pay now, %d did before; %s", self._proven, before, describe_steps(times))
        self._plan_trials(is_trial, paid=best == most, changed=self._proven != before)

    def _plan_trials(self, was_trial: bool, paid: bool, changed: bool) -> None:
        if changed:
            self._between_rounds = _LEAST_BETWEEN_ROUNDS
        self._next_round = self._seconds + self._between_rounds
        self._between_rounds = min(2 * self._between_rounds, _MOST_BETWEEN_ROUNDS)
        if paid:
            if was_trial:
                self._trial_factor, self._between_trials = 2, _LEAST_BETWEEN_TRIALS
                self._next_trial = self._seconds
            if self._seconds >= self._next_trial and self._proven < self._network.cache.n_slots:
                self._begin_trial()
            return
        # Twice as many may not pay, and four times as many may.
        tries_more = was_trial and self._trial_factor == 2 and 4 * self._proven <= self._network.cache.n_slots
        self._trial_factor = 4 if tries_more else 2
        if tries_more:
            self._begin_trial()
            return
        self._next_trial = self._seconds + self._between_trials
        self._between_trials = min(2 * self._between_trials, _MOST_BETWEEN_TRIALS)

    def _begin_trial(self) -> None:
        self._network.cache.usable_slots = min(self._network.cache.n_slots, self._trial_factor * self._proven)
        self._trial_ends = self._seconds + _TRIAL_SECONDS

    def _end_trial(self) -> None:
        """End a trial that nobody has filled."""
        self._trial_ends, self._looks = None, {}
        self._next_trial = self._seconds + self._between_trials
        self._network.cache.usable_slots = self._proven


def _sizes(sequences: int) -> list[int]:
    """Return the sizes to compare: all N sequences, or up to three fewer, a half and a quarter of them."""
    least = max(1, sequences >> 2)
    return [size for size in (least, 2 * least, 4 * least) if size <= sequences]


def largest_that_pays(step_seconds: Callable[[int], float], most: int, least: int = 1) -> int:
    """Return the largest size, up to `most`, whose batch is worth its size by `LEAST_BATCH_GAIN`.

    The sizes are `least`, twice as many, and so on. Two may be no faster than one and eight faster by far: a BLAS has a
    kernel for one row, and another for many, whose overhead two rows do not earn. So the search ends only when two
    sizes one after the other do not pay.
    """
    times = {least: step_seconds(least)}
    best, n = least, 2 * least
    while n <= most and n <= 4 * best:
        times[n] = step_seconds(n)
        if n / times[n] >= LEAST_BATCH_GAIN * best / times[best]:
            best = n
        n *= 2
    return best


def describe_steps(times: dict[int, float]) -> str:
    """Return what steps take as text: "a step takes, by sequences, 1: 17.0 ms, 2: 18.1 ms"."""
    steps = ", ".join(f"{sequences}: {seconds * 1e3:.1f} ms" for sequences, seconds in sorted(times.items()))
    return f"a step takes, by sequences, {steps}"
