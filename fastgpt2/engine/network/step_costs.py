"""Step costs: what a step takes by its number of rows, learnt from every step.

A measurement (`step_times.py`) is the first guess. It was taken once, perhaps beside other work. So each step corrects
what is expected of its kind. And where one step follows another of another size, the two tell how the sizes compare on
this machine, whatever else it has to do: that is kept for later, and written down for other processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import sqrt
from statistics import median
from typing import NamedTuple

# What a row beside another costs, as a share of the first row, where nothing was measured.
_ASSUMED_SHARE = 0.05

# How much one step counts for what is known of its kind. A quicker one counts more, as a disturbance only ever adds.
# One that takes `_DISTURBED` times as long as expected, or longer, was disturbed, and counts as that much.
_WEIGHT, _WEIGHT_IF_QUICKER, _DISTURBED = 0.15, 0.4, 3.0

# After this many steps, other numbers of rows tell more: something else may share the machine by then.
_STALE_STEPS = 300

# Less than a step takes, and more than nothing, by which nothing could be divided.
_LEAST_SECONDS = 1e-9

# The comparisons of a number of rows that count, the latest ones, and the least that tell anything: the first step of
# a size prepares what later ones use.
_MOST_COMPARISONS, _LEAST_COMPARISONS = 15, 3


class LearntCost(NamedTuple):
    """The seconds of a step, how far its comparisons lay apart in the mean, and their number: 0 if it was measured."""

    seconds: float
    spread: float
    looks: int


class StepCosts:
    """The seconds that a step takes by its number of rows, on this machine as it is now.

    What was seen lately counts, as it is. What was not seen lately is derived from the nearest number of rows that was,
    by how the two compared before: when steps of both followed each other, else when the machine was measured.

    Args:
        measured: seconds by rows of some steps when nothing else ran, if that is known; only their ratios count.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._measured = {rows: seconds for rows, seconds in sorted((measured or {}).items()) if seconds > 0}
        self._noted: dict[int, tuple[float, int]] = {}  # by rows: seconds, and the number of the step noted last
        # By rows: how many times as long steps took as was measured, all in one unit that is of no account; the middle
        # of these; and the numbers of rows of which there are enough of them.
        self._comparisons: dict[int, deque[float]] = {}
        self._factors: dict[int, float] = {}
        self._learnt: set[int] = set()
        self._last: tuple[int, float] | None = None
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """Learn how long a step of that many rows took."""
        self._steps += 1
        seconds = max(seconds, _LEAST_SECONDS)
        if self._last is not None and self._last[0] != rows:
            self._compare(rows, seconds, *self._last)
        self._last = rows, seconds
        expected, at = self._noted.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            weight = _WEIGHT_IF_QUICKER if seconds < expected else _WEIGHT
            seconds = expected + weight * (min(seconds, _DISTURBED * expected) - expected)
        self._noted[rows] = seconds, self._steps

    def _compare(self, rows: int, seconds: float, other: int, other_seconds: float) -> None:
        """Learn how a step's rows compare with those of the step before."""
        unit = other_seconds / (self._measured_cost(other) * self._factors.get(other, 1.0))
        comparisons = self._comparisons.setdefault(rows, deque(maxlen=_MOST_COMPARISONS))
        comparisons.append(seconds / (self._measured_cost(rows) * unit))
        before, self._factors[rows] = self._factors.get(rows, 1.0), median(comparisons)
        if rows in self._learnt and other in self._learnt:
            self._share_out((rows, other), before / self._factors[rows])
        elif len(comparisons) >= _LEAST_COMPARISONS:
            self._learnt.add(rows)

    def _share_out(self, pair: tuple[int, int], change: float) -> None:
        """Put half of the change of one of two factors on each of them, so that their product stays.

        Each factor is found by that of the step before. So all factors of what is seen would move together, step by
        step and without end: because the later one of two steps takes longer while texts grow, or by chance. And those
        of what is not seen for a while would stay behind, and compare with nothing any more.
        """
        half = sqrt(change)
        for rows in pair:
            comparisons = self._comparisons[rows]
            self._factors[rows] *= half
            for i in range(len(comparisons)):
                comparisons[i] *= half

    @property
    def known(self) -> bool:
        return bool(self._noted)

    def seconds(self, rows: int) -> float:
        """Return what a step of this many rows is expected to take, in seconds if any step has been noted."""
        seconds, at = self._noted.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            return seconds
        lately = [other for other, (_, at) in self._noted.items() if self._steps - at < _STALE_STEPS]
        if not lately:
            return self._relative_cost(rows)
        nearest = min(lately, key=lambda other: (abs(other - rows), other))
        return self._noted[nearest][0] * self._relative_cost(rows) / self._relative_cost(nearest)

    def learnt(self) -> dict[int, LearntCost]:
        """Return what is known of each number of rows that was measured or compared.

        All seconds are of the machine as it was at the last step, so that they can be compared.

        Returns:
            {} if nothing was compared; or if nothing was measured, as what others measure later could not be compared
            with it.
        """
        if self._last is None or not (self._learnt and self._measured):
            return {}
        scale = self.seconds(self._last[0]) / self._relative_cost(self._last[0])
        found = {}
        for rows in sorted(self._learnt.union(self._measured)):
            comparisons, middle = self._comparisons.get(rows, ()), self._factors.get(rows, 1.0)
            spread = median(abs(one - middle) for one in comparisons) / middle if comparisons else 0.0
            looks = len(comparisons) if rows in self._learnt else 0
            found[rows] = LearntCost(scale * self._relative_cost(rows), spread, looks)
        return found

    def _relative_cost(self, rows: int) -> float:
        """Return the cost as it was measured, corrected by what was learnt of the nearest number of rows."""
        if rows in self._learnt:
            return self._measured_cost(rows) * self._factors[rows]
        nearest = min(self._learnt, key=lambda other: (abs(other - rows), other), default=None)
        return self._measured_cost(rows) * (self._factors[nearest] if nearest is not None else 1.0)

    def _measured_cost(self, rows: int) -> float:
        """Return the relative cost as it was measured: on straight lines between measurements, in proportion beyond."""
        known = self._measured
        if rows in known:
            return known[rows]
        below = max((n for n in known if n < rows), default=None)
        above = min((n for n in known if n > rows), default=None)
        if below is None:
            return known[above] if above is not None else 1 + _ASSUMED_SHARE * (rows - 1)
        if above is None:
            return known[below] * rows / below
        share = (rows - below) / (above - below)
        return known[below] + share * (known[above] - known[below])
