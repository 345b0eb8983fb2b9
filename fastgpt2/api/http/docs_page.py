"""The page of all routes, `GET /docs`, made of the OpenAPI document: what each takes and gives, and a form to try it.

The page needs no other file, and nothing from elsewhere. A route that the document tells of is on it without more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from typing import Any

from fastgpt2.api.http.openapi import document
from fastgpt2.api.page import docs
from fastgpt2.plurals import counted

Object = Mapping[str, Any]

# Pages are for a browser to open, and not for a form.
_NOT_TRIED = ("/", "/docs")

# How the names of bounds in a schema go on behind "min" and "max", and what these bounds count.
_BOUNDED = {"imum": "", "Length": " characters", "Items": " items"}

# A bound beyond this only says that numbers are stored in so many bits.
_MOST_TOLD = 1 << 30


@cache
def docs_page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers; it is made once in a process."""
    return docs("\n".join(_content(document())))


def _content(about: Object) -> Iterator[str]:
    operations = [
        (method.upper(), path, operation, operations.get("parameters", []))
        for path, operations in about["paths"].items()
        for method, operation in operations.items()
        if method != "parameters"
    ]
    schemas: Object = about["components"]["schemas"]
    info = about["info"]
    paragraphs = "</p><p>".join(_prose(info["description"]).split("\n\n"))
    yield f'<section id="about"><p>Version {escape(info["version"])}. {paragraphs}</p>'
    yield "<p>A field or a parameter with a * is always there, or must be.</p></section>"
    yield '<nav id="routes" aria-label="Routes"><ul>'
    for method, path, operation, _ in operations:
        yield f'<li><a href="#{operation["operationId"]}">{_title(method, path)}</a></li>'
    yield '<li><a href="#schemas">Objects</a></li></ul></nav><div>'
    for method, path, operation, parameters in operations:
        yield from _operation(method, path, operation, [*parameters, *operation.get("parameters", [])], schemas)
    yield '<h2 id="schemas" class="schema">Objects</h2>'
    for name, schema in schemas.items():
        yield f'<section class="schema" aria-labelledby="schema-{name}"><h3 id="schema-{name}">{name}</h3>'
        yield f"{_fields(schema, name) if schema.get('properties') else f'<p>{_type(schema)}</p>'}</section>"
    yield "</div>"


def _operation(method: str, path: str, operation: Object, parameters: list[Object], schemas: Object) -> Iterator[str]:
    """Yield the section of one route with one method."""
    name = operation["operationId"]
    yield f'<section class="operation" aria-labelledby="{name}"><h2 id="{name}">{_title(method, path)}</h2>'
    yield f'<p class="summary">{_prose(operation["summary"])}.</p><div>'
    if parameters:
        rows = (
            (one["name"], one["in"], one["required"], _type(one["schema"]), _prose(_description(one["schema"])))
            for one in parameters
        )
        body = "".join(
            _row(f"{escape(name)}{' *' if required else ''}", f'<span class="note">{where}</span> {kind}', note)
            for name, where, required, kind, note in rows
        )
        yield f"<h3>Parameters</h3>{_table(f'Parameters of {method} {path}', ('Name', 'What', ''), body)}"
    sent = _content_schema(operation.get("requestBody", {}))
    if sent is not None:
        reference = sent["$ref"].rpartition("/")[2]
        fields = schemas[reference]
        yield f"<h3>Body: {_type(sent)}</h3><details><summary>{counted(len(fields['properties']), 'field')}</summary>"
        yield f"{_fields(fields, f'{reference}, the body of {method} {path}')}</details>"
    yield "<h3>Answers</h3>"
    answers = "".join(
        _row(status, _gives(answer), _prose(answer["description"])) for status, answer in operation["responses"].items()
    )
    errors = counted(len(operation["responses"]) - 1, "error")
    yield f"<details><summary>{next(iter(operation['responses']))} <span>and {errors}</span></summary>"
    yield f"{_table(f'Answers of {method} {path}', ('Status', 'Gives', ''), answers)}</details></div>"
    if path not in _NOT_TRIED or method != "GET":
        yield from _form(method, path, operation, parameters)
    yield "</section>"


def _form(method: str, path: str, operation: Object, parameters: list[Object]) -> Iterator[str]:
    """Yield the form that sends a request, and where its answer is shown."""
    name = operation["operationId"]
    title = f"{method} {path}"
    yield f'<form class="try" data-method="{method}" data-path="{escape(path)}" aria-label="Try {escape(title)}">'
    for one in parameters:
        field = f"{name}-{one['name']}"
        yield f'<span class="parameter"><label for="{field}">{one["name"]}</label>'
        yield (
            f'<input id="{field}" name="{one["name"]}" data-in="{one["in"]}" autocomplete="off" spellcheck="false"'
            f"{' required' if one['required'] else ''}></span>"
        )
    if "requestBody" in operation:
        example = json.dumps(operation["requestBody"]["content"]["application/json"].get("example", {}), indent=2)
        yield f'<label for="{name}-body">Body</label>'
        yield f'<textarea id="{name}-body" autocomplete="off" spellcheck="false">{escape(example)}</textarea>'
    yield '<div class="controls"><button class="send" aria-disabled="false">Send</button>'
    yield '<button class="stop" type="button" aria-disabled="true">Stop</button></div>'
    yield '<p class="outcome" role="status"></p>'
    yield f'<pre class="answer" tabindex="0" role="region" aria-label="Answer of {escape(title)}"></pre>'
    yield '<details><summary>With curl</summary><pre><code class="curl"></code></pre></details></form>'


def _title(method: str, path: str) -> str:
    return f'<span class="method">{method}</span><span class="path">{escape(path)}</span>'


def _gives(answer: Object) -> str:
    """Return what an answer holds: its objects, with the form of what is not plain JSON."""
    parts = []
    for kind, content in answer.get("content", {}).items():
        if kind == "text/event-stream":
            parts.append(f"events: {' or '.join(_events(content['schema']))}")
        else:
            parts.append(_type(content["schema"]) if kind == "application/json" else escape(kind))
    return "; ".join(dict.fromkeys(parts))


def _events(schema: Object) -> Iterator[str]:
    """Yield the objects that stand in the data of a stream's events, but for errors, which all streams have."""
    found = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema))
    yield from (_link(name) for name in found if not name.endswith("Error"))


def _content_schema(body: Object) -> Object | None:
    schema: Object | None = body.get("content", {}).get("application/json", {}).get("schema")
    return schema


def _fields(schema: Object, caption: str) -> str:
    """Return the table of an object's fields."""
    required = schema.get("required", ())
    rows = (
        _row(f"{escape(name)}{' *' if name in required else ''}", _type(part), _prose(_description(part)))
        for name, part in schema["properties"].items()
    )
    return _table(f"Fields of {caption}", ("Field", "Type", ""), "".join(rows))


def _table(caption: str, titles: tuple[str, str, str], rows: str) -> str:
    heads = "".join(f'<th scope="col">{title or "<span class=unseen>Meaning</span>"}</th>' for title in titles)
    named = escape(caption)
    return (
        f'<div class="scroller" tabindex="0" role="group" aria-label="{named}"><table><caption class="unseen">{named}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(name: str, kind: str, note: str) -> str:
    return f'<tr><th scope="row"><code>{name}</code></th><td>{kind}</td><td>{note}</td></tr>'


def _type(schema: Object) -> str:
    """Return what a schema allows, in words, as HTML; that null stands for a default is not said again."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        parts = [_type(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts)) or "null"
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list{_bounds(schema)} of {_type(schema.get('items', {}))}"
    if kind == "object":
        values = schema.get("additionalProperties")
        of = f" of {_type(values)}" if isinstance(values, dict) else ""
        return f"object{of}"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Object) -> str:
    """Return the bounds of a number, of a text's characters or of a list's items, in words."""
    for name, unit in _BOUNDED.items():
        least, most = schema.get(f"min{name}"), schema.get(f"max{name}")
        least, most = (bound if bound is not None and abs(bound) <= _MOST_TOLD else None for bound in (least, most))
        if least is None and most is None:
            continue
        if None not in (least, most):
            said = f"{least:g} to {most:g}"
        else:
            said = f"at least {least:g}" if most is None else f"at most {most:g}"
        return f' <span class="note">({said}{unit})</span>'
    return ""


def _description(schema: Object) -> str:
    """Return what is said of a schema, or of the one that it allows beside null."""
    parts = [schema, *schema.get("anyOf", ())]
    return next((str(part["description"]) for part in parts if "description" in part), "")


def _link(name: str) -> str:
    return f'<a href="#schema-{name}">{name}</a>'


def _prose(text: str) -> str:
    """Return a text as HTML, with code where it has backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
