"""What a command takes: options, each of which is a setting, and one argument without an option."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from fastgpt2.setting import Setting

# Options that have a letter as well.
LETTERS = {"output": "-o", "n": "-n"}


@dataclass(frozen=True, slots=True)
class Positional:
    """The argument that has no option.

    Attributes:
        optional: it may be left out. Its value is then that of the setting of the same name, or None if there is none.
        several: it may be given several times. Its value is then a list.
    """

    name: str
    help: str
    optional: bool = False
    choices: tuple[str, ...] | None = None
    several: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        runs: the function that runs it, as "module:function".
        details: more sentences for its own `--help`.
        tells_given: its values tell by "given" which options were given: one of them may mean more than its variable.
    """

    runs: str
    help: str
    settings: tuple[Setting[Any], ...]
    positional: Positional | None = None
    details: str = ""
    tells_given: bool = False

    def run(self, values: dict[str, Any]) -> int:
        function: Callable[[dict[str, Any]], int] = resolve_name(self.runs)
        return function(values)

    def usage(self, name: str) -> str:
        """Return the form of the command, with the name that it has."""
        positional = self.positional
        if positional is None:
            return f"fastgpt2 {name} [OPTIONS]"
        word = positional.name.upper() + ("..." if positional.several else "")
        return f"fastgpt2 {name} [OPTIONS] {f'[{word}]' if positional.optional else word}"


def options_of(command: Command) -> dict[str, tuple[Setting[Any], str | None]]:
    """Return each option of a command: its setting, and for a flag the text that it stands for."""
    options: dict[str, tuple[Setting[Any], str | None]] = {}
    for setting in command.settings:
        options[setting.option] = (setting, "yes" if setting.is_flag else None)
        if setting.is_flag:
            options[setting.no_option] = (setting, "no")
        if setting.name in LETTERS:
            options[LETTERS[setting.name]] = (setting, None)
    return options
