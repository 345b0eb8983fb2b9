"""The OpenAPI document of the endpoint: what each route takes and gives. The tests hold the code to it.

Requests and answers are described where they are read and built; what other rooms answer is described here.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.client.enqueue import JobPlan
from fastgpt2.api.http.completions import CompletionBody, CompletionRequest, ModelBody
from fastgpt2.api.http.generate import AnswerParameters, GeneratedBody, NeutralParameters, TokenEvent
from fastgpt2.api.http.jobs import (
    DEFAULT_LISTED,
    MAX_LISTED,
    MAX_WAIT_SECONDS,
    EndEvent,
    JobBody,
    OpenAIError,
    TextEvent,
)
from fastgpt2.api.http.responses import JSON
from fastgpt2.api.http.schemas import body_schema, nullable, object_schema, schema_of
from fastgpt2.engine.decoding.records import Count, Prompt
from fastgpt2.fields import Schema

Object = dict[str, Any]

_DESCRIPTION = """GPT-2 text generation on CPUs: a pool of workers behind a Redis queue. Decoding is greedy: the
likeliest token, always; what asks for anything else is refused. With a token set, every request but those of probes
and of the page's frame bears it. A client that hangs up cancels the jobs of its request, `/v1/jobs` apart. An
`Idempotency-Key` makes a request that is sent again the same one."""

_STATUSES = {
    400: "The request is malformed, or asks for what cannot be done.",
    401: "No token, or a wrong one.",
    403: "A page of another site asked; or, without a token, by a name that is not this machine's.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "The job was cancelled.",
    413: "The body is too large.",
    422: "The idempotency key was used for another request.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "A defect; the endpoint's log has the details.",
    502: "The job failed.",
    503: "Redis cannot be used, too much waits already, or the endpoint is being stopped.",
    504: "Out of time; the job is cancelled.",
}
_ANY = (401, 403, 500)
_REDIS = (503,)
_BODY = (400, 408, 413)
_ENQUEUES = (*_BODY, 422, 429, 503)
_RUNS = (*_ENQUEUES, 409, 502, 504)


# A job in the list of the jobs that run and of the latest that have ended.
_LISTED_JOB: dict[str, Any] = {
    "id": str,
    "status": str,
    **dict.fromkeys(("finish_reason", "error", "worker"), str | None),
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), int | None),
    **dict.fromkeys(("steps", "drafted", "accepted"), int | None),
    **dict.fromkeys(("queue_seconds", "prefill_seconds", "decode_seconds", "ended_at"), float | None),
    "prompt": Annotated[str | list[Count] | None, "If the operator shows prompts."],
}


async def show_document(_request: Request) -> Response:
    """Answer `GET /openapi.json`."""
    return JSON(document())


@cache
def document() -> Object:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastgpt2", "version": __version__, "description": _DESCRIPTION, "license": {"name": "MIT"}},
        "paths": {**_original_paths(), **_openai_paths(), **_job_paths(), **_operating_paths()},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _schemas() -> dict[str, Schema]:
    prompt, flag, generated = schema_of(Prompt), schema_of(bool), schema_of(GeneratedBody)
    parameters = body_schema(JobPlan, AnswerParameters, NeutralParameters, required=(), without=("prompt", "stream"))
    generate = {"inputs": prompt, "parameters": nullable(parameters)}
    listed_job = object_schema(_LISTED_JOB, ("id", "status"))
    of_list, queue = {"object": Literal["list"]}, object_schema({"name": str, "depth": Count})
    status = {"version": str, "queue": queue, "jobs": dict[str, Count], "workers": list[dict[str, Any]]}
    return {
        "OriginalRequest": object_schema({**generate, "stream": flag}, ("inputs",), closed=True),
        "GenerateRequest": object_schema(generate, ("inputs",), closed=True),
        "Generated": generated,
        "GeneratedList": {"type": "array", "items": generated, "minItems": 1, "maxItems": 1},
        "TokenEvent": schema_of(TokenEvent),
        "CompletionRequest": body_schema(CompletionRequest, required=()),
        "Completion": schema_of(CompletionBody),
        "Model": schema_of(ModelBody),
        "ModelList": object_schema({**of_list, "data": list[ModelBody]}),
        "JobRequest": body_schema(JobPlan, required=("prompt",)),
        "Job": schema_of(JobBody),
        "JobList": object_schema({**of_list, "data": {"type": "array", "items": listed_job}}),
        "TextEvent": schema_of(TextEvent),
        "EndEvent": schema_of(EndEvent),
        "State": object_schema({"status": str}),
        "Status": object_schema(status),
        "Error": object_schema({"error": str, "error_type": str}),
        "OpenAIError": object_schema({"error": OpenAIError}),
    }


def _original_paths() -> Object:
    generated, streamed = _json("Generated"), _events("TokenEvent")
    return {
        "/": {
            "get": _operation(
                "home",
                "`Ok` for a program; for a browser, a page that shows the pool",
                {**_text("text/plain"), **_text("text/html")},
            ),
            "post": _operation(
                "original",
                "Continue a prompt, as Narsil's fast_gpt2 does",
                {**_json("GeneratedList"), **streamed},
                _RUNS,
                "OriginalRequest",
            ),
        },
        "/generate": {
            "post": _operation(
                "generate", "Continue a prompt, as text-generation-inference does", generated, _RUNS, "GenerateRequest"
            )
        },
        "/generate_stream": {
            "post": _operation(
                "generate_stream",
                "The same, an event a token; the last event has the whole text",
                streamed,
                _RUNS,
                "GenerateRequest",
            )
        },
    }


def _openai_paths() -> Object:
    return {
        "/v1/completions": {
            "post": _operation(
                "create_completion",
                "Continue prompts, as OpenAI's API does; with `stream`, as events that end with `[DONE]`",
                {**_json("Completion"), **_events("Completion")},
                (*_RUNS, 404),
                "CompletionRequest",
                openai=True,
            )
        },
        "/v1/models": {
            "get": _operation("list_models", "The models that workers serve", _json("ModelList"), _REDIS, openai=True)
        },
        "/v1/models/{model}": {
            "parameters": [_path("model", {"type": "string", "minLength": 1})],
            "get": _operation("show_model", "One of them", _json("Model"), (404, *_REDIS), openai=True),
        },
    }


def _job_paths() -> Object:
    job_id = _path("job_id", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"})
    limit = {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": DEFAULT_LISTED}
    wait = {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS, "default": 0}
    known = {"type": "string", "pattern": "^[0-9]{1,9}$"}
    created = _operation("create_job", "Enqueue a job, and leave", _json("Job"), _ENQUEUES, "JobRequest", openai=True)
    created["responses"]["202"] = created["responses"].pop("200")
    return {
        "/v1/jobs": {
            "get": _operation(
                "list_jobs",
                "The jobs that workers run, and the latest that have ended",
                _json("JobList"),
                (400, *_REDIS),
                openai=True,
                parameters=[_query("limit", limit)],
            ),
            "post": created,
        },
        "/v1/jobs/{job_id}": {
            "parameters": [job_id],
            "get": _operation(
                "show_job",
                "How a job is, or how it ended; with `wait`, once it has ended or that many seconds are over",
                _json("Job"),
                (400, 404, *_REDIS),
                openai=True,
                parameters=[_query("wait", wait)],
            ),
            "delete": _operation(
                "cancel_job", "Cancel it, unless it has ended", _json("Job"), (404, *_REDIS), openai=True
            ),
        },
        "/v1/jobs/{job_id}/stream": {
            "parameters": [job_id],
            "get": _operation(
                "follow_job",
                "Its text as it comes, from the beginning; if it was not enqueued with `stream`, all of it at its end",
                _events("TextEvent", "EndEvent"),
                (400, 404, 409, 502, *_REDIS, 504),
                openai=True,
                parameters=[{"name": "Last-Event-ID", "in": "header", "required": False, "schema": known}],
            ),
        },
    }


def _operating_paths() -> Object:
    flag = {"type": "boolean", "default": False}
    return {
        "/health": {"get": _operation("health", "This process is alive", _json("State"))},
        "/ready": {"get": _operation("ready", "A job that is sent now would be run", _json("State"), _REDIS)},
        "/status": {
            "get": _operation(
                "status",
                "What the pool is doing; with `history`, and did in the last minutes",
                _json("Status"),
                (400, *_REDIS),
                parameters=[_query("history", flag)],
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "The same for Prometheus",
                {**_text("text/plain"), **_text("application/openmetrics-text")},
                _REDIS,
            )
        },
        "/openapi.json": {
            "get": _operation("document", "This document", {"application/json": {"schema": {"type": "object"}}})
        },
    }


def _operation(
    name: str,
    summary: str,
    content: Object,
    errors: tuple[int, ...] = (),
    body: str | None = None,
    openai: bool = False,
    parameters: list[Object] | None = None,
) -> Object:
    error = _json("OpenAIError" if openai else "Error")
    operation: Object = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": content},
            **{
                str(status): {"description": _STATUSES[status], "content": error} for status in sorted({*errors, *_ANY})
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
        key = {"type": "string", "minLength": 1, "maxLength": 255}
        parameters = [{"name": "Idempotency-Key", "in": "header", "required": False, "schema": key}]
    if parameters:
        operation["parameters"] = parameters
    return operation


def _json(schema: str) -> Object:
    return {"application/json": {"schema": _reference(schema)}}


def _events(*schemas: str) -> Object:
    """Return the content of a stream of events, whose fields are spelt as OpenAPI 3.2 does for each item.

    An event's data is JSON, but for OpenAI's `[DONE]`.
    """
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(schema) for schema in (*schemas, "OpenAIError", "Error")]},
    }
    fields = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    return {"text/event-stream": {"schema": {"type": "object", "properties": fields}}}


def _reference(schema: str) -> Object:
    return {"$ref": f"#/components/schemas/{schema}"}


def _text(kind: str) -> Object:
    return {kind: {"schema": {"type": "string"}}}


def _path(name: str, schema: Object) -> Object:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Object) -> Object:
    return {"name": name, "in": "query", "required": False, "schema": schema}
