"""The fields of messages: one description of a field gives its check, its error message and its JSON schema.

A message is a dataclass or a TypedDict, and its annotations describe its fields: `bool`, `int`, `float`, `str`, a
`Literal`, another dataclass, or any of these `| None`. `Annotated` adds what a type cannot say: a field of this module,
such as `whole(0, 20)`, or a sentence for the schema. Types are strict: True is no number, and "5" is none either.

Why not msgspec: its import takes 13 ms, 40% of what the records take, and its errors would have to be worded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from inspect import get_annotations
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fastgpt2.errors import BadRequest

Schema = dict[str, Any]
SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """A field of a message.

    Attributes:
        schema: the JSON schema of the field's values.
        check: takes the field's name and a value, and returns the value as the message keeps it, or raises BadRequest.
    """

    schema: Schema
    check: Callable[[str, Any], Any]


def refusal(name: str, expected: str, value: Any, of_type: bool = False) -> BadRequest:
    """Return the error for a value that a field does not take.

    Args:
        expected: what the field takes, to follow "must be".
        of_type: the type is wrong, so that the message names the type instead of the value.
    """
    return BadRequest(f"{name} must be {expected}, not {type_name(value) if of_type else shown(value)}")


def shown(value: object) -> str:
    """Return a value as a message shows it, of bounded length."""
    if isinstance(value, str):
        return repr(value[:SHOWN_CHARACTERS])
    try:
        return str(value)[:SHOWN_CHARACTERS]
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def why_no_json(reason: Exception) -> str:
    """Return what Python says of a text that it reads no JSON from, but for what it says of Python."""
    if isinstance(reason, RecursionError):
        return "its lists and objects are nested too deeply"
    text = str(reason)
    return "a number in it has thousands of digits" if "integer string conversion" in text else text


def type_name(value: object) -> str:
    """Return the name of a value's type, as messages have it: that of None is "null", as in JSON."""
    return "null" if value is None else type(value).__name__


@dataclass(frozen=True, slots=True, eq=False)
class _InBounds:
    """The check of a value's type, and of its size: a number's value, a string's length.

    Attributes:
        kind: the type, as `isinstance` takes it.
        expected_kind, expected: what the field takes, for a value of a wrong type and for one out of bounds.
    """

    kind: Any
    expected_kind: str
    expected: str
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise refusal(name, self.expected_kind, value, of_type=True)
        if not self.low <= (len(value) if self.kind is str else value) <= self.high:
            raise refusal(name, self.expected, value)
        return value


def flag() -> Field:
    """Describe a field that is true or false."""
    return Field({"type": "boolean"}, _InBounds(bool, "true or false", ""))


def whole(low: float = -math.inf, high: float = math.inf, unit: str = "") -> Field:
    """Describe a whole number from `low` to `high`, of a `unit` that the message names."""
    in_full = f"a whole number of {unit} from {low} to {high}"
    words = (in_full, in_full) if unit else ("a whole number", f"between {low} and {high}")
    schema = {"type": "integer", **_bounds(minimum=low, maximum=high)}
    return Field(schema, _InBounds(int, *words, low, high))


def number(above: float = -math.inf, most: float = math.inf, unit: str = "") -> Field:
    """Describe a number of more than `above` and at most `most`, of a `unit` that the message names. NaN is none."""
    words = f"a number of {unit}" if unit else "a number", f"more than {above} and at most {most:.0f} {unit}"
    schema = {"type": "number", **_bounds(exclusiveMinimum=above, maximum=most)}
    return Field(schema, _InBounds(int | float, *words, math.nextafter(above, math.inf), most))


def real(low: float, high: float) -> Field:
    """Describe a number from `low` to `high`. NaN is none."""
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Field(schema, _InBounds(int | float, "a number", f"between {low:g} and {high:g}", low, high))


def text(least: int = 0, most: float = math.inf) -> Field:
    """Describe a string of `least` to `most` characters."""
    expected = f"a string of {least} to {most} characters" if least else "a string"
    bounds = {"minLength": least, **_bounds(maxLength=most)} if least else {}
    return Field({"type": "string", **bounds}, _InBounds(str, expected, expected, least, most))


def one_of(*values: str) -> Field:
    """Describe a field that has one of a few values, all of them strings."""
    schema = {"type": "string", "enum": list(values)} if len(values) > 1 else _schema_of_value(values[0])
    return Field(schema, partial(_check_one_of, values))


def _check_one_of(values: tuple[str, ...], name: str, value: Any) -> Any:
    if value not in values:
        raise refusal(name, f"one of {', '.join(values)}", value)
    return value


def only(allowed: Any, rule: str = "") -> Field:
    """Describe a field that takes one value; the `rule` is what the message says if another comes."""
    return Field(_schema_of_value(allowed), partial(_check_only, allowed, rule or f"must be {allowed}"))


def _schema_of_value(value: Any) -> Schema:
    """Return the schema of one value, by its type: generators of clients take no list of values of mixed types."""
    match value:
        case None:
            return {"type": "null"}
        case bool():
            return {"type": "boolean", "enum": [value]}
        case str():
            return {"type": "string", "const": value}
    return {"type": "number", "const": value}


def _check_only(allowed: Any, rule: str, name: str, value: Any) -> Any:
    if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
        raise BadRequest(f"{name} {rule}")
    return value


def optional(field: Field) -> Field:
    """Describe a field that may be None as well."""
    return Field(nullable(field.schema), partial(_check_optional, field.check))


def nullable(schema: Schema) -> Schema:
    """Return the schema that takes null as well."""
    null = {"type": "null"}
    return schema if schema == null or null in schema.get("anyOf", ()) else {"anyOf": [schema, null]}


def _check_optional(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    return None if value is None else check(name, value)


def _bounds(**bounds: float) -> Schema:
    return {name: bound for name, bound in bounds.items() if math.isfinite(bound)}


@cache
def fields_of(message: Any) -> dict[str, Field]:
    """Return the fields of a message by their names: its own, then those that it inherits.

    The fields of a dataclass within the message stand beside its own.
    """
    known: dict[str, Field] = {}
    hints = get_type_hints(message, include_extras=True)
    for name in get_annotations(message) | hints:
        hint = hints[name]
        within = is_dataclass(hint)
        known.update(fields_of(hint) if within else {name: field_of(hint)})
    return known


_PLAIN = {bool: flag(), int: whole(), float: number(), str: text()}


def field_of(hint: Any) -> Field:
    """Return the field that an annotation describes."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        field = next((part for part in parts if isinstance(part, Field)), None) or field_of(parts[0])
        described = [("description", part) for part in parts if isinstance(part, str)]
        return Field({**field.schema, **dict(described)}, field.check)
    if get_origin(hint) is Literal:
        return one_of(*parts)
    if NoneType in parts:
        return optional(field_of(parts[0]))
    return _PLAIN[hint]


def check_fields(record: Any) -> None:
    """Check the fields of a dataclass when it is made, and put each value there as the message keeps it.

    Raises:
        BadRequest: a field does not take its value.
    """
    for name, default, check in _checks(record.__class__):
        value = getattr(record, name)
        if value is default:
            continue  # most fields of a request are
        kept = check(name, value)
        if kept is not value:
            object.__setattr__(record, name, kept)


@cache
def _checks(message: Any) -> list[tuple[str, Any, Callable[[str, Any], Any]]]:
    known = fields_of(message)
    return [(field.name, field.default, known[field.name].check) for field in fields(message) if field.name in known]
