"""JSON schemas of messages, made of the annotations that `fastgpt2.fields` checks and mypy holds the answers to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from fastgpt2.fields import Field, Schema, field_of, fields_of


def object_schema(parts: Mapping[str, Any], required: Collection[str] | None = None, closed: bool = False) -> Schema:
    """Return the schema of an object.

    Args:
        parts: an annotation or a schema for each field.
        required: the fields that are always there; None means all.
        closed: there are no other fields.
    """
    properties = {name: schema_of(part) for name, part in parts.items()}
    schema = {"type": "object", "properties": properties, "required": list(parts if required is None else required)}
    return {**schema, "additionalProperties": False} if closed else schema


def body_schema(*messages: type, required: Collection[str], without: Collection[str] = ()) -> Schema:
    """Return the schema of an object with the fields of some dataclasses and no others; null stands for a default."""
    properties = {
        name: field.schema if name in required else nullable(field.schema)
        for message in messages
        for name, field in fields_of(message).items()
        if name not in without
    }
    return object_schema(properties, required, closed=True)


def nullable(schema: Schema) -> Schema:
    """Return the schema that takes null as well."""
    null = {"type": "null"}
    return schema if null in schema.get("anyOf", ()) else {"anyOf": [schema, null]}


def schema_of(hint: Any) -> Schema:
    """Return the schema of what an annotation describes in an answer. A schema stands for itself.

    A dictionary that is made of a record is annotated with that record: `Annotated[dict[str, Any], Usage]`.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, dict):
        return hint
    if is_dataclass(hint) or is_typeddict(hint):
        hints = get_type_hints(hint, include_extras=True)
        return object_schema(hints, [name for name, part in hints.items() if get_origin(part) is not NotRequired])
    if origin is NotRequired:
        return schema_of(parts[0])
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(parts[1])}
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(part) for part in parts]}
    if origin is Annotated and not any(isinstance(part, Field) for part in parts):
        described = [{"description": part} for part in parts if isinstance(part, str)]
        records = [part for part in parts if isinstance(part, type)]
        return {**schema_of([parts[0], *records][-1]), **(described[0] if described else {})}
    if hint is NoneType:
        return {"type": "null"}
    return {} if hint is Any else field_of(hint).schema
