"""Clients that programs make of the OpenAPI document: whole, with types, and they work.

openapi-python-client makes one here. What it and openapi-typescript stumble over is looked for in the document as well.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.api.http.openapi import document
from fastgpt2.system.up import System

pytestmark = pytest.mark.processes
OPERATIONS = {
    about["operationId"]: about
    for methods in document()["paths"].values()
    for method, about in methods.items()
    if method != "parameters"
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a package that was made of the document, which can be imported."""
    folder, name = tmp_path_factory.mktemp("made"), "client_of_fastgpt2"
    (folder / "openapi.json").write_text(json.dumps(document()))
    (folder / "config.yml").write_text("post_hooks: []\n")  # they would only make it pretty
    done = subprocess.run(
        [
            sys.executable, "-m", "openapi_python_client", "generate", "--path", folder / "openapi.json", "--config",
            folder / "config.yml", "--meta", "none", "--output-path", folder / name, "--fail-on-warning",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arning" not in done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield name
    sys.path.remove(str(folder))


def module_of(made: str, operation: str) -> Any:
    return import_module(f"{made}.api.default.{operation}")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_route_is_there_with_types(made: str, operation: str) -> None:
    module = module_of(made, operation)
    text = Path(module.__file__).read_text("utf-8")
    assert "cast(Any" not in text, "an answer without a type"
    (body,) = re.findall(r"\n    body: (.*),\n", text)[:1] or [""]
    if "requestBody" in OPERATIONS[operation]:
        assert body in {"OriginalRequest", "GenerateRequest", "CompletionRequest", "ChatRequest", "JobRequest"}
        model = getattr(import_module(f"{made}.models"), body)
        assert len(model.__annotations__) >= 2
    else:
        assert body == ""


def test_such_a_client_is_served(made: str, system: System) -> None:
    models = import_module(f"{made}.models")
    client = import_module(f"{made}.client").Client(
        base_url=system.http_url, raise_on_unexpected_status=True, httpx_args={"trust_env": False}
    )
    completion = module_of(made, "create_completion").sync(
        client=client, body=models.CompletionRequest(prompt="My name is", max_tokens=5, seed=None, temperature=0.0)
    )
    assert (type(completion), completion.object_) == (models.Completion, "text_completion")
    assert completion.usage.completion_tokens == 5
    assert completion.choices[0].finish_reason in ("length", "stop")

    parameters = models.GenerateParameters(max_new_tokens=5, details=True, watermark=False, grammar=None)
    generated = module_of(made, "generate").sync(
        client=client, body=models.GenerateRequest(inputs="My name is", parameters=parameters)
    )
    assert generated.generated_text == completion.choices[0].text
    assert [token.text for token in generated.details.tokens]
    (original,) = module_of(made, "original").sync(client=client, body=models.OriginalRequest(inputs="My name is"))
    assert original.generated_text.startswith("My name is")
    events = module_of(made, "generate_stream").sync(client=client, body=models.GenerateRequest(inputs="My name is"))
    assert events.startswith("data: {")

    job = module_of(made, "create_job").sync(client=client, body=models.JobRequest(prompt="a", max_new_tokens=1))
    ended = module_of(made, "show_job").sync(job.id, client=client, wait=60)
    assert (ended.status.value, ended.error, ended.result.usage.completion_tokens) == ("finished", None, 1)
    assert module_of(made, "list_jobs").sync(client=client, limit=1).data[0].status
    assert module_of(made, "follow_job").sync(job.id, client=client).count("event: end") == 1
    assert module_of(made, "info").sync(client=client).model_id == "demo"
    assert module_of(made, "list_models").sync(client=client).data[0].id == "demo"
    assert module_of(made, "status").sync(client=client).queue.name == "fastgpt2"
    assert module_of(made, "home").sync(client=client) == "Ok"

    refused = module_of(made, "create_completion").sync(client=client, body=models.CompletionRequest(prompt=[5] * 600))
    assert (type(refused), refused.error.code) == (models.OpenAIError, "context_length_exceeded")
    wrong = module_of(made, "generate").sync(client=client, body=models.GenerateRequest(inputs=[5] * 600))
    assert (type(wrong), wrong.error_type) == (models.Error, "validation")


def test_no_schema_is_without_a_type_or_of_mixed_ones() -> None:
    """openapi-typescript makes `unknown` of a schema without a type, and generators differ on mixed enums."""
    for schema in _schemas_in(document()):
        values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())]
        kinds = {type(value) for value in values}
        assert len(kinds) <= 1, schema
        assert None not in values, schema
        assert schema.keys() & {"$ref", "type", "anyOf"}, schema
        if schema.get("type") == "object":
            # Without either, openapi-typescript makes an object of it that may hold nothing.
            assert schema.keys() & {"properties", "additionalProperties"}, schema
    for name, schema in document()["components"]["schemas"].items():
        # An object within another one has a name of its own.
        for field, part in schema.get("properties", {}).items():
            within = [part, *part.get("anyOf", ()), part.get("items", {})]
            assert not any("properties" in one for one in within), (name, field)


def _schemas_in(value: Any, is_schema: bool = False) -> Iterator[dict[str, Any]]:
    """Yield all schemas within a part of the document."""
    if isinstance(value, list):
        for part in value:
            yield from _schemas_in(part, is_schema)
    elif isinstance(value, dict):
        if is_schema:
            yield value
        for key, part in value.items():
            if key in ("properties", "schemas"):
                yield from (schema for one in part.values() for schema in _schemas_in(one, True))
            elif key in ("schema", "items", "anyOf", "additionalProperties", "contentSchema"):
                yield from _schemas_in(part, True)
            elif key not in ("enum", "required"):
                yield from _schemas_in(part)
