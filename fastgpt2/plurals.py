"""Numbers of things in messages that people read: "1 job waits", "2 jobs wait"."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number and the words for this number of things: "1 job", "2 jobs", "0 jobs".

    Args:
        one: the words for one thing, such as "job" or "job waits".
        many: the words for none or several, such as "jobs wait"; `one` with an "s" if there are none.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"
