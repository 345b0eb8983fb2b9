"""What a chat template finds around it: jinja2's sandbox, as transformers sets it up.

Source: `_compile_jinja_template` in transformers 5, utils/chat_template_utils.py: its settings, its functions, its tag
`generation`. This module imports jinja2, and is for the process that renders chats alone (`template_renderer.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class RaisedByTemplate(TemplateError):
    """Raised by a template's own `raise_exception`, with its sentence."""


class GenerationTag(Extension):
    """The tag around what an assistant says, by which trainers know it. It writes what it holds."""

    tags = {"generation"}  # noqa: RUF012 - a set of each class, as jinja2 declares it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore, as those of Python's own workings do."""

    def __init__(*args: Any, **named: Any) -> None:
        # One of the names may be "self".
        self, *rest = args
        given = dict(*rest, **named)
        _refuse_underscore(given)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore([name])
        super().__setitem__(name, value)


def _refuse_underscore(names: Iterable[object]) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no name such as {name[:40]!r} here")


class DictMaker:
    """What templates call `dict`: not the type itself, which has more than they may use."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which templates are compiled and run."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=_format_now, dict=DictMaker(), namespace=PlainNamespace
    )
    return environment


def _raise(message: object) -> NoReturn:
    raise RaisedByTemplate(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON. jinja2's own filter of this name escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _format_now(form: str) -> str:
    return datetime.now().strftime(form)
