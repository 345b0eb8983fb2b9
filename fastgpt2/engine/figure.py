"""A figure: a whole number that was measured, with what tells how far to believe it.

What is measured once is not believed for ever. A machine may have been busy when it was measured, and it changes: its
memory, its host, its kernel. So a figure is a first guess, with its spread and its date, and after some time whoever
needs it measures it again (`machine.Measurements`). Nothing heavy is imported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from fastgpt2.plurals import counted

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
# Further ahead than this is the date of a clock that was wrong.
_MOST_AHEAD_SECONDS = 3600.0

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
    def is_doubtful(self) -> bool:
        """Tell whether the machine had other work when it was measured."""
        return self.spread is not None and self.spread > TRUSTED_SPREAD

    @property
    def looked_at(self) -> float:
        """Return when it was measured last, in vain or not; 0 if that is not known."""
        return max(self.date, self.tried_at)

    @property
    def is_asked_for(self) -> bool:
        """Tell whether it is from before what `measuring_again` asks for."""
        return self.looked_at < _measured_again_at

    @property
    def is_due(self) -> bool:
        """Tell whether it is to be measured again."""
        if not self.looked_at or self.is_asked_for:
            return True
        for_seconds = DOUBTFUL_SECONDS if self.is_doubtful or not self.date else BELIEVED_SECONDS
        return time.time() - self.looked_at > for_seconds

    def describe(self) -> str:
        """Return the number, its spread and its looks as text: "64 (spread 4%, 5 looks)"."""
        spread = "spread not known" if self.spread is None else f"spread {self.spread:.0%}"
        day = f", of {_date_text(self.date)[:10]}" if self.tried_at > self.date else ""
        return f"{int(self)} ({spread}, {counted(self.looks, 'look')}{day})"

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
    """Return the seconds since 1970 of a date; 0 for no date, or one of a wrong clock; None for what is no date."""
    from datetime import UTC, datetime

    if not isinstance(text, str) or len(text) > _MAX_DATE_CHARACTERS:
        return None
    try:
        date = datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        return seconds if 0 <= seconds < time.time() + _MOST_AHEAD_SECONDS else 0.0
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


def better_of(known: Mapping[str, Figure], found: Mapping[str, Figure]) -> dict[str, Figure]:
    """Return what to keep of figures that belong together: what is found now, unless what was known may be better.

    What is found on a busy machine does not replace what was found on a calm one; nor what an old version has left, of
    which nobody knows, unless that is asked for.
    """
    if not any(name in known and _may_be_better(known[name], figure) for name, figure in found.items()):
        return dict(found)
    stay = {name: known[name] for name in found if name in known}
    tried = {name: Figure(int(k), k.spread, k.looks, k.date, found[name].date) for name, k in stay.items()}
    return {**found, **tried}


def _may_be_better(known: Figure, found: Figure) -> bool:
    return found.is_doubtful and not known.is_doubtful and (known.date > 0 or not known.is_asked_for)
