"""Tables and figures as the pages of results write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#1b6ca8", "#e07b39", "#4f9d69", "#8a5a9e", "#c23b4b", "#7f7f7f")
# Draws a picture, given its name, its title and what fills it, and returns the Markdown that shows it.
Draw = Callable[[str, str, Callable[[Any], None]], str]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, the first column aligned to the left and the others to the right."""
    lines = [headers, ["---", *["--:"] * (len(headers) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def spread(stat: dict[str, float], digits: int = 2) -> str:
    """Return median and quartiles as text."""
    return f"{stat['median']:.{digits}f} ({stat['q1']:.{digits}f}-{stat['q3']:.{digits}f})"


def yes_no(value: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if value else "no"


def slug(model: str) -> str:
    """Return a model's name, or the last part of its folder's, as part of a file's name."""
    return "".join(c if c.isalnum() or c == "-" else "-" for c in Path(model).name)
