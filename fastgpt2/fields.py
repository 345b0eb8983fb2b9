"""The fields of messages: one description of a field gives its check, its error message and its JSON schema.

A message is a dataclass or a TypedDict, and its annotations describe its fields: `bool`, `int`, `float`, `str`, a
`Literal`, another dataclass, or any of these `| None`. `Annotated` adds what a type cannot say: a field of this module,
such as `whole(0, 20)`, or a sentence for the schema. Types are strict: True is no number, and "5" is none either. But
4.0 is the whole number 4, as in JSON Schema: programs that keep numbers in tables write it so. Numbers, strings and
lists of other libraries (numpy, pandas, pyarrow, torch) are taken for what they are, and kept as Python's own.

Why not msgspec: its import takes 13 ms, 40% of what the records take, and its errors would have to be worded again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
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


# The types that a message keeps as they are.
_OWN_TYPES = frozenset({bool, int, float, str, NoneType, list, tuple, dict})

# Types with a length and items that are no list; a set has no order.
_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)

# Types of numpy that have a number and mean a time, whose unit would be lost.
_TIMES = ("m", "M")


def plain(value: Any) -> Any:
    """Return a number, a flag or a string of another library as Python's own, and anything else as it is."""
    if type(value) in _OWN_TYPES:
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration's own `str` is its name
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    dimensions = getattr(value, "ndim", None)
    if (dimensions or (dimensions is None and hasattr(value, "__len__"))) or _kind_of(value) in _TIMES:
        return value
    try:
        return _converted(value)
    except (ArithmeticError, TypeError, ValueError):
        return value


def _converted(value: Any) -> Any:
    """Return what a single value is, by the methods that types of numpy, pyarrow and Python have for that."""
    for method in ("tolist", "as_py"):
        if hasattr(value, method):
            found = getattr(value, method)()
            return found if type(found) in _OWN_TYPES else value
    if hasattr(value, "__index__"):
        return operator.index(value)
    return float(value) if hasattr(value, "__float__") else value


def _kind_of(value: Any) -> object:
    return getattr(getattr(value, "dtype", None), "kind", None)


def is_listed(value: Any) -> bool:
    """Tell whether a value holds other values in a row: a list, a tuple, or what another library has for a list."""
    if isinstance(value, list | tuple):
        return True
    if isinstance(value, _NO_LISTS) or getattr(value, "ndim", 1) != 1:
        return False
    return hasattr(value, "__len__") and hasattr(value, "__iter__")


def items_of(value: Any) -> list[Any] | tuple[Any, ...]:
    """Return the items of what `is_listed`. Bound its length first: an array's items take more memory than the array.

    The items of a pyarrow array and the like are still that library's: see `plain`.
    """
    if isinstance(value, list | tuple):
        return value
    found = value.tolist() if hasattr(value, "tolist") else None
    return found if isinstance(found, list) else list(value)


def refusal(name: str, expected: str, value: Any, of_type: bool = False) -> BadRequest:
    """Return the error for a value that a field does not take.

    Args:
        expected: what the field takes, to follow "must be".
        of_type: the type is wrong, so that the message names the type beside the value.
    """
    return BadRequest(f"{name} must be {expected}, not {described(value) if of_type else shown(value)}")


def shown(value: object) -> str:
    """Return a value as a message shows it, of bounded length."""
    if isinstance(value, str):
        return repr(value[:SHOWN_CHARACTERS])
    try:
        return str(value)[:SHOWN_CHARACTERS]
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def described(value: object) -> str:
    """Return a value as a message shows it where another type is wanted: `the string "5"`, `true`, `null`, `a list`."""
    found = plain(value)
    if found is None or isinstance(found, bool):
        return {None: "null", True: "true", False: "false"}[found]
    if isinstance(found, int | float):
        return shown(found)
    if isinstance(found, str):
        return f"the string {_quoted(found[:SHOWN_CHARACTERS])}"
    if is_listed(found):
        return "a list"
    return "an object" if isinstance(found, Mapping) else type(value).__name__


def _quoted(text: str) -> str:
    """Return a string as JSON has it; characters that cannot be printed as their escapes."""
    import json

    return json.dumps(text, ensure_ascii=not text.isprintable())


def why_no_json(reason: Exception) -> str:
    """Return what Python says of a text that it reads no JSON from, but for what it says of Python."""
    if isinstance(reason, RecursionError):
        return "its lists and objects are nested too deeply"
    text = str(reason)
    return "a number in it has thousands of digits" if "integer string conversion" in text else text


@dataclass(frozen=True, slots=True, eq=False)
class _InBounds:
    """The check of a value's type, and of its size: a number's value, a string's length.

    Attributes:
        kinds: the types.
        expected_kind, expected: what the field takes, for a value of a wrong type and for one out of bounds.
    """

    kinds: tuple[type, ...]
    expected_kind: str
    expected: str
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, name: str, value: Any) -> Any:
        kept = value
        if type(value) not in self.kinds:
            kept = plain(value)
            if type(kept) is float and self.kinds == _WHOLE and kept.is_integer():
                kept = int(kept)
            if type(kept) not in self.kinds:
                raise refusal(name, self.expected_kind, value, of_type=True)
        if not self.low <= (len(kept) if self.kinds == _TEXT else kept) <= self.high:
            raise refusal(name, self.expected, plain(value))
        return kept


_WHOLE, _TEXT = (int,), (str,)


def flag() -> Field:
    """Describe a field that is true or false."""
    return Field({"type": "boolean"}, _InBounds((bool,), "true or false", ""))


def whole(low: float = -math.inf, high: float = math.inf, unit: str = "") -> Field:
    """Describe a whole number from `low` to `high`, of a `unit` that the message names."""
    in_full = f"a whole number of {unit} from {low} to {high}"
    words = (in_full, in_full) if unit else ("a whole number", f"between {low} and {high}")
    schema = {"type": "integer", **_bounds(minimum=low, maximum=high)}
    return Field(schema, _InBounds(_WHOLE, *words, low, high))


def number(above: float = -math.inf, most: float = math.inf, unit: str = "") -> Field:
    """Describe a number of more than `above` and at most `most`, of a `unit` that the message names. NaN is none."""
    words = f"a number of {unit}" if unit else "a number", f"more than {above} and at most {most:.0f} {unit}"
    schema = {"type": "number", **_bounds(exclusiveMinimum=above, maximum=most)}
    return Field(schema, _InBounds((float, int), *words, math.nextafter(above, math.inf), most))


def real(low: float, high: float) -> Field:
    """Describe a number from `low` to `high`. NaN is none."""
    schema = {"type": "number", "minimum": low, "maximum": high}
    return Field(schema, _InBounds((float, int), "a number", f"between {low:g} and {high:g}", low, high))


def text(least: int = 0, most: float = math.inf) -> Field:
    """Describe a string of `least` to `most` characters."""
    expected = f"a string of {least} to {most} characters" if least else "a string"
    bounds = {"minLength": least, **_bounds(maxLength=most)} if least else {}
    return Field({"type": "string", **bounds}, _InBounds(_TEXT, expected, expected, least, most))


def one_of(*values: str) -> Field:
    """Describe a field that has one of a few values, all of them strings."""
    schema = {"type": "string", "enum": list(values)} if len(values) > 1 else _schema_of_value(values[0])
    return Field(schema, partial(_check_one_of, values))


def _check_one_of(values: tuple[str, ...], name: str, value: Any) -> Any:
    kept = plain(value)
    if not any(is_same(kept, one) for one in values):
        raise refusal(name, f"one of {', '.join(values)}", value, of_type=not isinstance(kept, str))
    return kept


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
    if not is_same(plain(value), allowed):
        raise BadRequest(f"{name} {rule}")
    return allowed


def is_same(value: Any, other: Any) -> bool:
    """Tell whether a value of a type of Python's own equals another; a flag is no number."""
    return type(value) in _OWN_TYPES and isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


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
