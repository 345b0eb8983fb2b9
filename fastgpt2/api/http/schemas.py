"""JSON schemas of messages, made of the annotations that `fastgpt2.fields` checks and mypy holds the answers to.

A record, a TypedDict or a dataclass, is a component of the document, and is referred to by its name wherever it stands:
generators of clients then make one class of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from fastgpt2.fields import Field, Schema, field_of, fields_of, nullable


def reference(name: str) -> Schema:
    """Return the schema that stands for the component of this name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record_schemas(*records: Any) -> dict[str, Schema]:
    """Return the schemas of records, and of all records within them, by their names."""
    found: dict[str, Schema] = {}
    left = list(records)
    while left:
        record = left.pop()
        if _name_of(record) not in found:
            hints = get_type_hints(record, include_extras=True)
            always = [name for name, hint in hints.items() if get_origin(hint) is not NotRequired]
            found[_name_of(record)] = object_schema(hints, always)
            left += [within for hint in hints.values() for within in _records_in(hint)]
    return found


def _name_of(record: Any) -> str:
    """Return the name of a record's component: that of its class, where "Body" says no more than that it is sent."""
    name: str = record.__name__
    return name.removesuffix("Body")


def _is_record(hint: Any) -> bool:
    return is_typeddict(hint) or (isinstance(hint, type) and is_dataclass(hint))


def _records_in(hint: Any) -> Iterator[Any]:
    """Yield the records that stand in an annotation, also those that only describe what stands there."""
    if _is_record(hint):
        yield hint
    else:
        for part in get_args(hint):
            yield from _records_in(part)


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


def schema_of(hint: Any) -> Schema:
    """Return the schema of what an annotation describes in an answer. A schema stands for itself.

    A dictionary that is made of a record is annotated with that record: `Annotated[dict[str, Any], Usage]`.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if isinstance(hint, dict):
        return hint
    if _is_record(hint):
        return reference(_name_of(hint))
    if origin is NotRequired:
        return schema_of(parts[0])
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": True if parts[1] is Any else schema_of(parts[1])}
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(part) for part in parts]}
    if origin is Annotated and not any(isinstance(part, Field) for part in parts):
        described = [{"description": part} for part in parts if isinstance(part, str)]
        records = [part for part in parts if isinstance(part, type)]
        return {**schema_of([parts[0], *records][-1]), **(described[0] if described else {})}
    return {"type": "null"} if hint is NoneType else field_of(hint).schema


def with_named_objects(schemas: Mapping[str, Schema]) -> dict[str, Schema]:
    """Return components whose fields that are objects are components too, called as the field: `StreamOptions`.

    So are objects in a list, called as one of them: `Message`.

    Raises:
        ValueError: two fields of one name describe different objects.
    """
    named: dict[str, Schema] = {}
    for name, schema in schemas.items():
        named[name] = _name_fields(schema, named)
    return named


def _name_fields(schema: Schema, named: dict[str, Schema]) -> Schema:
    """Return the schema of an object with references for the objects that are its fields; add these to `named`."""
    fields = {field: _refer(part, field, named) for field, part in schema["properties"].items()}
    return {**schema, "properties": fields}


def _refer(schema: Schema, field: str, named: dict[str, Schema]) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [_refer(part, field, named) for part in schema["anyOf"]]}
    if "items" in schema:
        return {**schema, "items": _refer(schema["items"], field.removesuffix("s"), named)}
    if "properties" not in schema:
        return schema
    name = "".join(word.capitalize() for word in field.split("_"))
    found = _name_fields(schema, named)
    if named.setdefault(name, found) != found:
        raise ValueError(f"two fields {field!r} describe different objects")
    return reference(name)
