"""A figure: a whole number that was measured, with what tells how far to believe it.

What is measured once is not believed for ever. A machine may have been busy when it was measured, and it changes: its
memory, its host, its kernel. So a figure is a first guess, with its spread and its date, and after some time whoever
needs it measures it again (`machine.Measurements`). Nothing heavy is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

# A figure whose looks lie further apart than this was measured on a machine that had other work. On one that has none
# they lie 0.02 to 0.1 apart.
TRUSTED_SPREAD = 0.25

# For how long a figure is believed, one that is to be trusted and one that is not. What kept a machine busy is over
# after an hour, or will not be.
BELIEVED_SECONDS = 30 * 86400.0
DOUBTFUL_SECONDS = 3600.0

# What a file tells is within these.
_MAX_NUMBER = 1 << 31
_MAX_SPREAD = 1000.0
_MAX_DATE_CHARACTERS = 40

# A shorter measurement does not tell how busy the machine was.
_LEAST_TELLING_SECONDS = 0.01

# Figures of before this moment are measured again; see `measuring_again`.
_measured_again_at = 0.0


class Figure(int):
    """A whole number that was measured, with what tells how far to believe it.

    Attributes:
        spread: how far its looks lay apart: by which part the middle one took longer than the shortest could have
            taken. None if that is not known.
        looks: how often the machine was looked at.
        date: when, in seconds since 1970; 0 if that is not known.
        tried_at: when it was last measured in vain, since the machine was too busy; 0 if never.
    """

    spread: float | None
    looks: int
    date: float
    tried_at: float

    def __new__(
        cls, value: int, spread: float | None = None, looks: int = 1, date: float | None = None, tried_at: float = 0.0
    ) -> Self:
        """Return the figure; without a date it is of now."""
        figure = super().__new__(cls, value)
        figure.spread = None if spread is None else min(max(0.0, spread), _MAX_SPREAD)
        figure.looks, figure.tried_at = looks, tried_at
        figure.date = time.time() if date is None else date
        return figure

    @property
    def is_trusted(self) -> bool:
        """Tell whether the machine had nothing else to do when it was measured, as far as that is known."""
        return self.date > 0 and self.spread is not None and self.spread <= TRUSTED_SPREAD

    @property
    def is_asked_for(self) -> bool:
        """Tell whether it is from before what `measuring_again` asks for."""
        return self.date < _measured_again_at

    @property
    def is_due(self) -> bool:
        """Tell whether it is to be measured again."""
        last = max(self.date, self.tried_at)
        if not last or self.is_asked_for:
            return True
        doubtful = not self.date or (self.spread is not None and self.spread > TRUSTED_SPREAD)
        # A date that is to come is of a clock that was wrong.
        return not -86400 < time.time() - last < (DOUBTFUL_SECONDS if doubtful else BELIEVED_SECONDS)

    def describe(self) -> str:
        """Return the number, its spread and its looks as text: "64 (spread 4%, 5 looks)"."""
        spread = "spread not known" if self.spread is None else f"spread {self.spread:.0%}"
        return f"{int(self)} ({spread}, {self.looks} look{'' if self.looks == 1 else 's'})"

    def as_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"value": int(self), "looks": self.looks, "date": _date_text(self.date)}
        if self.spread is not None:
            fields["spread"] = round(self.spread, 4)
        if self.tried_at:
            fields["tried"] = _date_text(self.tried_at)
        return fields

    @classmethod
    def from_json(cls, fields: Any) -> Figure | None:
        """Return the figure that a file tells; None if it is none. Old versions wrote the number alone."""
        if _is_count(fields):
            return cls(fields, date=0.0)
        if not isinstance(fields, dict) or not (_is_count(fields.get("value")) and _is_count(fields.get("looks"))):
            return None
        spread, date, tried_at = fields.get("spread"), _date_of(fields.get("date")), _date_of(fields.get("tried", ""))
        is_spread = spread is None or (type(spread) in (int, float) and 0 <= spread <= _MAX_SPREAD)
        if not is_spread or date is None or tried_at is None:
            return None
        return cls(fields["value"], spread, fields["looks"], date, tried_at)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _date_text(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else ""


def _date_of(text: Any) -> float | None:
    """Return the seconds since 1970 of a date; 0 for no date, None for what is no date."""
    from datetime import UTC, datetime

    if not isinstance(text, str) or len(text) > _MAX_DATE_CHARACTERS:
        return None
    try:
        date = datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError, OSError):
        return None


@contextmanager
def measuring_again() -> Iterator[float]:
    """Have this process measure again, meanwhile, whatever was measured before. Yields the moment that divides them."""
    global _measured_again_at
    # Files keep milliseconds.
    _measured_again_at = time.time() - 0.001
    try:
        yield _measured_again_at
    finally:
        _measured_again_at = 0.0


def measured(measure: Callable[[], int]) -> Figure:
    """Return what a measurement finds, with the share of its time that it waited for a processor as the spread."""
    began, cpu_began = time.perf_counter(), time.thread_time()
    found = measure()
    if isinstance(found, Figure):
        return found
    seconds, cpu_seconds = time.perf_counter() - began, time.thread_time() - cpu_began
    is_telling = seconds > _LEAST_TELLING_SECONDS
    return Figure(found, seconds / max(cpu_seconds, seconds / _MAX_SPREAD) - 1 if is_telling else None)


def better_of(known: Figure | None, found: Figure) -> Figure:
    """Return what to keep of two figures of a name: what is found now, unless only what was known before may be right.

    What is found on a busy machine replaces neither what was found on a calm one, nor what an old version has left.
    """
    is_doubtful = found.spread is not None and found.spread > TRUSTED_SPREAD
    if known is None or known.is_asked_for or not is_doubtful or not (known.is_trusted or not known.date):
        return found
    return Figure(int(known), known.spread, known.looks, known.date, tried_at=found.date)
