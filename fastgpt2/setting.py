"""One setting: its option, its environment variable, its default and how its text is read.

An option wins over the environment, and that over the default. The setting `max_new_tokens` has the option
`--max-new-tokens` and the variable `FASTGPT2_MAX_NEW_TOKENS`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeAlias, TypeVar

from fastgpt2.errors import BadRequest
from fastgpt2.setting_values import one_text, seconds, yes_or_no

T = TypeVar("T")

SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One setting.

    Attributes:
        parse: reads the value from a text; raises ValueError with the rest of a sentence that begins with the text.
        shown: the default as `--help` shows it, where that is not the value itself.
        join: joins the values of an option that may be given several times; None if only one counts.
        field: the request's field that the setting gives, where its name is another.
        variable_of: what the variable is named after, where that is not the name: a variable of the name means
            something else.
    """

    name: str
    metavar: str
    parse: Callable[[str], T]
    default: T
    help: str
    shown: str = ""
    join: Callable[[T, T], T] | None = None
    field: str = ""
    variable_of: str = ""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def no_option(self) -> str:
        """Return the option that says no, of a flag."""
        return "--no-" + self.option.removeprefix("--")

    @property
    def variable(self) -> str:
        return "FASTGPT2_" + (self.variable_of or self.name).upper()

    @property
    def is_flag(self) -> bool:
        # One without a default can be left open, and given as no by --no-NAME.
        return self.parse is yes_or_no

    def resolve(self, given: str | Sequence[str] | None = None) -> T:
        """Return the value of the option if it is `given`, else that of the environment, else the default.

        Args:
            given: what the option gives. Of several texts, the values are joined, or the last one counts.

        Raises:
            BadRequest: the text cannot be read; the message names the option or the variable.
        """
        if given is not None:
            texts = [given] if isinstance(given, str) else given
            read = [self._read(text, self.option) for text in texts]
            return reduce(self.join, read) if self.join else read[-1]
        # A compose file passes on a variable that is not set as an empty one.
        text = os.environ.get(self.variable)
        return self._read(text, self.variable) if text else self.default

    def source(self, given: object) -> str:
        """Return what names the setting's value in a message: the option if it is given, else the variable."""
        return self.variable if given is None else self.option

    def _read(self, text: str, source: str) -> T:
        if text == "":
            raise BadRequest(f"{source} is empty; leave it out for the default")
        try:
            return self.parse(text)
        except ValueError as reason:
            # A secret (the Redis URL) gets into no message: it is read by `str`, which never fails, and checked where
            # it is used.
            shown = repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")
            raise BadRequest(f"{source}: {shown} {reason}") from None


Settings: TypeAlias = tuple[Setting[Any], ...]


def flag(name: str, purpose: str) -> Setting[bool]:
    """Return a setting that is yes or no, and no by default."""
    return Setting(name, "", yes_or_no, False, purpose)


def choosing(
    name: str,
    metavar: str,
    parse: Callable[[str], T],
    purpose: str,
    shown: str = "the model's own, or none",
    join: Callable[[Any, Any], Any] | None = None,
) -> Setting[T | None]:
    """Return a setting of how tokens are chosen. Its bounds are those of the request's field of the same name."""
    return Setting(name, metavar, parse, None, purpose, shown, join)


def texts(name: str, purpose: str, field: str = "") -> Setting[tuple[str, ...]]:
    """Return a setting whose option gives one text, and may be given several times."""
    return Setting(name, "TEXT", one_text, (), purpose, "none", join=operator.add, field=field)


def duration(name: str, default: float, purpose: str) -> Setting[float]:
    """Return a setting in seconds."""
    return Setting(name, "SECONDS", seconds, default, purpose, f"{default:g} seconds")
