"""The words of a command line: what a command takes, and which words are options, values, or the one argument.

argparse writes the help, but does not read the words. It takes a text that begins with a dash for an option, it names
words that are right beside the one that it does not know, and to import it takes longer than to read the words.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from fastgpt2.errors import BadRequest
from fastgpt2.settings import Setting

# Options that have a letter as well.
LETTERS = {"output": "-o", "n": "-n"}

HELP = ("--help", "-h")

# What looks like an option, known or not. A text with a space before any "=", a number and a rule such as --- do not.
_OPTION = re.compile(r"--?[A-Za-z][^\s=]*(=.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Positional:
    """The argument that has no option.

    Attributes:
        optional: it may be left out. Its value is then that of the setting of the same name, or None if there is none.
    """

    name: str
    help: str
    optional: bool = False
    choices: tuple[str, ...] | None = None


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
        word = positional.name.upper()
        return f"fastgpt2 {name} [OPTIONS] {f'[{word}]' if positional.optional else word}"


@dataclass(slots=True)
class Arguments:
    """What the words after a command give.

    Attributes:
        texts: the texts of each option, by its setting's name, in their order; "yes" or "no" for a flag.
        positional: the argument without an option.
        asks_for_help: only the command's help is wanted.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    positional: str | None = None
    asks_for_help: bool = False


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


def read_arguments(name: str, commands: Mapping[str, Command], words: Sequence[str]) -> Arguments:
    """Read the words that follow the name of a command.

    An option's value follows it, or stands behind "=". After "--", no word is an option.

    Raises:
        BadRequest: an option is unknown, or lacks its value; or there are too many words, or too few.
    """
    command = commands[name]
    options = options_of(command)
    found = Arguments()
    others: list[str] = []
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word == "--":
            others += rest
            break
        if word in HELP:
            found.asks_for_help = True
            return found
        if not _OPTION.fullmatch(word):
            others.append(word)
            continue
        option, value = _split(word, options)
        if option not in options:
            from fastgpt2.commands.suggestions import about_option

            raise BadRequest(about_option(option, name, commands))
        setting, stands_for = options[option]
        if stands_for is not None:
            if value is not None:
                raise BadRequest(f"{option} takes no value; write {setting.option}, or {setting.no_option}")
            value = stands_for
        elif value is None:
            value = _next_value(option, setting, rest, options)
        found.texts.setdefault(setting.name, []).append(value)
    found.positional = _one_of(others, name, command, words)
    return found


def _split(word: str, options: Mapping[str, tuple[Setting[Any], str | None]]) -> tuple[str, str | None]:
    """Return the option that a word names, and the value that the word gives it, if it does."""
    option, equals, value = word.partition("=")
    letter, attached = word[:2], word[2:]
    # -n3 and -oFILE. A word such as -nice is none, nor is -output, which lacks a dash.
    is_letter = letter in options and option not in options and f"-{option}" not in options
    if attached and is_letter and (letter != LETTERS["n"] or attached.isdigit()):
        return letter, attached
    return option, value if equals else None


def _next_value(
    option: str, setting: Setting[Any], rest: deque[str], options: Mapping[str, tuple[Setting[Any], str | None]]
) -> str:
    """Take the value that follows an option. A text that begins with one dash is a value, unless it is an option."""
    if not rest:
        raise BadRequest(f"{option} needs a value: {option} {setting.metavar}")
    word = rest[0]
    if word in ("--", *HELP) or _split(word, options)[0] in options or re.match("--[A-Za-z]", word):
        raise BadRequest(
            f"{option} needs a value: {option} {setting.metavar}; {word} behind it counts as an option. "
            f"As a value, that is written {option}={word}"
        )
    return rest.popleft()


def _one_of(others: Sequence[str], name: str, command: Command, words: Sequence[str]) -> str | None:
    """Return the argument that has no option, which is the only word that is left.

    Raises:
        BadRequest: it is missing, or none of its choices, or there are more.
    """
    positional = command.positional
    if len(others) > (positional is not None):
        from fastgpt2.commands.suggestions import about_extra_words

        raise BadRequest(about_extra_words(others, words, name, command))
    if positional is None:
        return None
    if not others:
        if positional.optional:
            return None
        raise BadRequest(f"{positional.name.upper()} is missing: {command.usage(name)}")
    if not others[0] and positional.name != "prompt" and not positional.optional:
        raise BadRequest(f"{positional.name.upper()} is empty: {command.usage(name)}")
    if positional.choices is not None and others[0] not in positional.choices:
        raise BadRequest(f"{positional.name.upper()}: {others[0]!r} is not one of {', '.join(positional.choices)}")
    return others[0]
