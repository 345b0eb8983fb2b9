"""The names by which other APIs ask for a text of a given form, and what each means here: choices, a regex, a schema.

vLLM has `structured_outputs` and, before that, `guided_choice` and its like; OpenAI has `response_format`;
text-generation-inference has `grammar`. Each field's check returns the fields of a job that it comes to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

from fastgpt2.engine.decoding.options import GuidedChoices, JSONSchema, Regex
from fastgpt2.errors import BadRequest
from fastgpt2.fields import Field, Schema, field_of, flag, one_of, only, refusal, text
from fastgpt2.foreign_fields import find_unknown, take_known

# At most one of a job's `choices`, `regex` and `json_schema`, with its value.
Guide: TypeAlias = dict[str, Any]
OUR_GUIDES = ("choices", "regex", "json_schema")

ANY_OBJECT = '{"type": "object"}'
MAX_NAME_CHARACTERS = 256

_NO_GRAMMAR = "must be left out: a text is guided by choices, a regular expression or a JSON schema"
_NO_WHITESPACE_RULE = "must be left out: JSON is guided by its schema alone"


def find_guide(given: Mapping[str, Guide | None]) -> tuple[str, Guide]:
    """Return the one guide that the fields of a request have come to, with the name of its field; "" if there is none.

    Raises:
        BadRequest: there is more than one.
    """
    guides = {name: guide for name, guide in given.items() if guide}
    if len(guides) > 1:
        first, second = list(guides)[:2]
        raise BadRequest(f"{first} and {second} are both given; a text is guided by one: leave one out")
    return next(iter(guides.items()), ("", {}))


def name_as_given(message: str, name: str, guide: Guide) -> str:
    """Return a message that begins with a job's field for a form with the name of the field that came to it."""
    for ours in guide:
        message = re.sub(rf"^{ours}\b", name, message)
    return message


def _guided_by(ours: str, hint: Any) -> Field:
    """Describe a field that is another API's name for one of a job's."""
    field = field_of(hint)
    return Field(field.schema, partial(_check_same, ours, field.check))


def _check_same(ours: str, check: Any, name: str, value: Any) -> Guide:
    return {ours: check(name, value)}


def _check_any_object(name: str, value: Any) -> Guide:
    return {"json_schema": ANY_OBJECT} if flag().check(name, value) else {}


def _check_nothing(field: Field, name: str, value: Any) -> Guide:
    field.check(name, value)
    return {}


def _without_effect(field: Field) -> Field:
    """Describe a field that takes what another field describes, and guides nothing."""
    return Field(field.schema, partial(_check_nothing, field))


def _object(parts: Mapping[str, Field], required: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object whose parts may be null unless they are required."""
    properties = {
        name: part.schema if name in required else {"anyOf": [part.schema, {"type": "null"}]}
        for name, part in parts.items()
    }
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _parts(name: str, value: Any, known: Mapping[str, Field]) -> dict[str, Any]:
    """Return the parts of an object that ask for something; see `take_known`.

    Raises:
        BadRequest: it is no object, or a part is not known and asks for something.
    """
    if not isinstance(value, dict):
        raise refusal(name, "an object", value, of_type=True)
    if (unknown := find_unknown(value, known)) is not None:
        raise BadRequest(f"{name} has an unknown part {unknown[:100]!r}; known are {', '.join(known)}")
    return take_known(value, known)


def _check_structured_outputs(name: str, value: Any) -> Guide:
    parts = _parts(name, value, _STRUCTURED_PARTS)
    checked = {
        f"{name}.{part}": _STRUCTURED_PARTS[part].check(f"{name}.{part}", inner) for part, inner in parts.items()
    }
    return find_guide(checked)[1]


def _check_response_format(name: str, value: Any) -> Guide:
    parts = _parts(name, value, _FORMAT_PARTS)
    if "type" not in parts:
        raise BadRequest(f'{name} must have a type, such as {{"type": "json_object"}}')
    guides = {part: _FORMAT_PARTS[part].check(f"{name}.{part}", inner) for part, inner in parts.items()}
    if guides["type"] == "json_schema" and "json_schema" not in guides:
        raise BadRequest(f'{name} must have json_schema, an object: {{"name": ..., "schema": ...}}')
    forms: dict[str, Guide] = {"text": {}, "json_object": {"json_schema": ANY_OBJECT}}
    return forms[guides["type"]] if guides["type"] in forms else guides["json_schema"]


def _check_named_schema(name: str, value: Any) -> Guide:
    """Return the schema in OpenAI's object. Its `strict` changes nothing: a schema is always kept to."""
    parts = _parts(name, value, _NAMED_PARTS)
    if "schema" not in parts:
        raise BadRequest(f"{name} must have a schema")
    checked = {part: _NAMED_PARTS[part].check(f"{name}.{part}", inner) for part, inner in parts.items()}
    return {"json_schema": checked["schema"]}


def _check_grammar(name: str, value: Any) -> Guide:
    parts = _parts(name, value, _GRAMMAR_PARTS)
    if parts.keys() != _GRAMMAR_PARTS.keys():
        raise BadRequest(f'{name} must have a type and a value: {{"type": "regex", "value": "[a-z]+"}}')
    kind, inner = (_GRAMMAR_PARTS[part].check(f"{name}.{part}", parts[part]) for part in ("type", "value"))
    if kind == "json_schema" and isinstance(inner, dict) and "schema" in inner:
        return _check_named_schema(f"{name}.value", inner)
    guide: Guide = (GUIDED_REGEX if kind == "regex" else GUIDED_JSON).check(f"{name}.value", inner)
    return guide


def _check_schema_or_text(name: str, value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise refusal(name, "a regular expression or a JSON schema: a string or an object", value, of_type=True)
    return value


GUIDED_CHOICE = _guided_by("choices", GuidedChoices)
GUIDED_REGEX = _guided_by("regex", Regex)
GUIDED_JSON = _guided_by("json_schema", JSONSchema)
GUIDED_JSON_OBJECT = Field(flag().schema, _check_any_object)
NO_GRAMMAR = _without_effect(only(None, _NO_GRAMMAR))
NO_WHITESPACE_PATTERN = _without_effect(only(None, _NO_WHITESPACE_RULE))
# There is one library that guides; whatever another is called, a text that it would allow is allowed.
ANY_BACKEND = _without_effect(text(0, MAX_NAME_CHARACTERS))
_NOT_SET = _without_effect(only(False, "must be false or left out: JSON is guided by its schema alone"))

_STRUCTURED_PARTS = {
    "choice": GUIDED_CHOICE,
    "regex": GUIDED_REGEX,
    "json": GUIDED_JSON,
    "json_object": GUIDED_JSON_OBJECT,
    "grammar": NO_GRAMMAR,
    "structural_tag": NO_GRAMMAR,
    "whitespace_pattern": NO_WHITESPACE_PATTERN,
    "disable_any_whitespace": _NOT_SET,
    "disable_additional_properties": _NOT_SET,
}
_NAMED_PARTS = {
    "name": text(),
    "description": text(),
    "schema": field_of(JSONSchema),
    "strict": flag(),
}
_FORMAT_TYPE = one_of("text", "json_object", "json_schema")
_FORMAT_PARTS = {"type": _FORMAT_TYPE, "json_schema": Field(_object(_NAMED_PARTS, ("schema",)), _check_named_schema)}
_GRAMMAR_TYPE = one_of("json", "json_schema", "regex")
_GRAMMAR_PARTS = {
    "type": _GRAMMAR_TYPE,
    "value": Field(
        {"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "string", "minLength": 1}]},
        _check_schema_or_text,
    ),
}

STRUCTURED_OUTPUTS = Field(_object(_STRUCTURED_PARTS), _check_structured_outputs)
RESPONSE_FORMAT = Field(_object(_FORMAT_PARTS, ("type",)), _check_response_format)
GRAMMAR = Field(_object(_GRAMMAR_PARTS, ("type", "value")), _check_grammar)
