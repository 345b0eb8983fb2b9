"""What a step costs by its number of rows, on this machine as it is now."""

from __future__ import annotations

from collections.abc import Mapping

# Where nothing was measured: a row beside another costs so much of the first.
_ASSUMED_SHARE = 0.05
# How much a step counts for what is known of its kind: one that is quicker for more, as what disturbs only ever adds.
# One that takes so many times as long as expected was disturbed.
_WEIGHT, _WEIGHT_IF_QUICKER, _DISTURBED = 0.15, 0.4, 3.0
# After so many steps, others tell more: something else may share the machine by then.
_STALE_STEPS = 300


class StepCosts:
    """Seconds of a step by its rows.

    What was seen lately counts, as it is. What was not is derived from the nearest number of rows that was, by how the
    two compared when the machine was measured.

    Args:
        measured: seconds by rows of some steps when nothing else ran, if that is known; ratios are all that counts.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._measured = dict(sorted((measured or {}).items()))
        self._seen: dict[int, tuple[float, int]] = {}  # seconds, and at which step
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        known, at = self._seen.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            weight = _WEIGHT_IF_QUICKER if seconds < known else _WEIGHT
            seconds = known + weight * (min(seconds, _DISTURBED * known) - known)
        self._seen[rows] = seconds, self._steps

    @property
    def seen(self) -> bool:
        """Whether any step was."""
        return bool(self._seen)

    def of(self, rows: int) -> float:
        """What a step of so many rows is expected to take. Seconds, if any step was seen yet."""
        seconds, at = self._seen.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            return seconds
        lately = [seen for seen, (_, at) in self._seen.items() if self._steps - at < _STALE_STEPS]
        if not lately:
            return self._shape(rows)
        nearest = min(lately, key=lambda seen: (abs(seen - rows), seen))
        return self._seen[nearest][0] * self._shape(rows) / self._shape(nearest)

    def _shape(self, rows: int) -> float:
        """The relative cost as it was measured, with straight lines between, and on in proportion beyond."""
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
