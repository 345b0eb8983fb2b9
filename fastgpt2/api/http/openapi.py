"""The OpenAPI document of the endpoint: what each route takes and gives. The tests hold the code to it.

Requests and answers are described where they are read and built; what other rooms answer is described here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from fastgpt2 import __version__
from fastgpt2.api.client.enqueue import JobPlan
from fastgpt2.api.http.chat import ChatBody, ChatChunkBody
from fastgpt2.api.http.chat_request import ChatRequest
from fastgpt2.api.http.completion_request import CompletionRequest
from fastgpt2.api.http.completions import CompletionBody
from fastgpt2.api.http.generate import MISPLACED, AnswerParameters, ChoiceParameters, GeneratedBody, TokenEvent
from fastgpt2.api.http.jobs import (
    DEFAULT_LISTED,
    MAX_LISTED,
    MAX_WAIT_SECONDS,
    EndEvent,
    ErrorObject,
    JobBody,
    Progress,
    TextEvent,
)
from fastgpt2.api.http.models import ModelBody
from fastgpt2.api.http.monitoring import InfoBody
from fastgpt2.api.http.responses import is_openai
from fastgpt2.api.http.schemas import (
    body_schema,
    object_schema,
    record_schemas,
    reference,
    schema_of,
    with_named_objects,
)
from fastgpt2.api.pool.job_list import REALS, TEXTS, WHOLES
from fastgpt2.api.pool.job_pages import STATES
from fastgpt2.engine.decoding.records import Count, Prompt
from fastgpt2.fields import Schema, nullable

Object = dict[str, Any]

_DESCRIPTION = """GPT-2 text generation on CPUs: a pool of workers behind a Redis queue.

The likeliest token is taken, unless a request asks for another choice, for example by a temperature above 0. A text
that was drawn depends on the request and its seed alone, and the answer tells the seed. Log probabilities are the
model's own, before penalties and temperature. What cannot be done is refused by a sentence that says so.

If the endpoint has a token, each request must bear it, except those for `/health`, `/ready`, the page's frame and this
document. A client that hangs up cancels the jobs of its request, except those of `/v1/jobs`. A request that is sent
again with the same `Idempotency-Key` has the same answer. An error that will pass has `Retry-After`. An error with the
status 409, or with one from 500 on, that the same request would meet again has `x-should-retry: false`."""

_STATUSES = {
    400: "The request is malformed, or asks for what cannot be done.",
    401: "No token, or a wrong one; `WWW-Authenticate` has `invalid_token` then.",
    403: "A page of another site asked; or, without a token, by a name that is not this machine's.",
    404: "There is no such thing; or no worker serves the model that is named.",
    408: "The head or the body did not come in time.",
    409: "The job was cancelled; or, if it is to run again, it waits or runs still.",
    413: "The body is too large.",
    415: "The body is compressed; `Accept-Encoding` says what it may be.",
    422: "The idempotency key was used for another request.",
    429: "The queue is full, or the token has reached a limit; `Retry-After` says when to try again.",
    500: "A defect; the endpoint's log has the details.",
    502: "The job failed.",
    503: "Redis cannot be used or lost the job, too much waits already, or the endpoint is being stopped.",
    504: "Out of time; the job is cancelled.",
}
_WORDS = (
    "`validation`, `overloaded`, `generation` or `incomplete_generation`; another word where none of these is true."
)
_ANY = (401, 403, 500)
_REDIS = (503,)
_BODY = (400, 408, 413, 415)
_ENQUEUES = (*_BODY, 404, 422, 429, 503)
_RUNS = (*_ENQUEUES, 409, 502, 504)
_KEY: Object = {"type": "string", "minLength": 1, "maxLength": 255}
_PATH_PARAMETERS: dict[str, Object] = {
    "{model}": {"type": "string", "minLength": 1},
    "{job_id}": {"type": "string", "pattern": "^[^/]+$"},
}

_ANSWERS = (
    GeneratedBody, TokenEvent, CompletionBody, ChatBody, ChatChunkBody, ModelBody, JobBody, TextEvent, EndEvent,
    InfoBody, ErrorObject,
)  # fmt: skip

# A body that is taken as it stands, for each kind. Without one, the page of the routes begins with an empty body.
_EXAMPLES: dict[str, Object] = {
    "OriginalRequest": {"inputs": "My name is", "parameters": {"max_new_tokens": 20}},
    "GenerateRequest": {"inputs": "My name is", "parameters": {"max_new_tokens": 20, "details": True}},
    "CompletionRequest": {"prompt": "My name is", "max_tokens": 20, "temperature": 0, "stream": False},
    "ChatRequest": {"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 60, "stream": False},
    "JobRequest": {"prompt": "My name is", "max_new_tokens": 20, "stream": True},
}

# A job in the list of the jobs that run and of the latest that have ended, or of those in one state.
_LISTED_JOB: Object = {
    **dict.fromkeys((*TEXTS, "queue"), str | None),
    **dict.fromkeys((*WHOLES, "attempts"), int | None),
    **dict.fromkeys((*REALS, "enqueued_at", "started_at"), float | None),
    "message": Annotated[str | None, "The sentence of a failure, with `state`."],
    **dict.fromkeys(("id", "status"), str),
    "prompt": Annotated[str | list[Count] | None, "If the operator shows prompts."],
}


_PAGE: Object = {
    "data": {"type": "array", "items": reference("ListedJob")},
    "has_more": Annotated[bool, "With `state`: there is another page."],
    "next": Annotated[str | None, "With `state`: what the next page has as `after`."],
    "total": Annotated[Count, "With `state`: how many jobs have it."],
}


@dataclass(frozen=True, slots=True)
class _Operation:
    """A route with one method.

    Attributes:
        content: of the answer.
        errors: the statuses of errors, beside those that every route has.
        body: the schema of what is sent; an idempotency key may then come with it.
        status: of the answer.
        further: other parameters.
    """

    name: str
    summary: str
    content: Object
    errors: tuple[int, ...] = ()
    body: str | None = None
    parameter: Object | None = None
    status: int = 200
    further: tuple[Object, ...] = ()

    def describe(self, error: str) -> Object:
        """Return the operation as OpenAPI has it; `error` is the schema of its errors."""
        answers = {str(self.status): {"description": "Done.", "content": self.content}}
        for status in sorted({*self.errors, *_ANY}):
            answers[str(status)] = {"description": _STATUSES[status], "content": _json(error)}
        operation: Object = {"operationId": self.name, "summary": self.summary, "responses": answers}
        parameter = self.parameter
        if self.body is not None:
            content = _json(self.body)
            if self.body in _EXAMPLES:
                content["application/json"]["example"] = _EXAMPLES[self.body]
            operation["requestBody"] = {"required": True, "content": content}
            parameter = _parameter("Idempotency-Key", _KEY, "header")
        parameters = [*([] if parameter is None else [parameter]), *self.further]
        return {**operation, "parameters": parameters} if parameters else operation


@cache
def document() -> Object:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastgpt2", "version": __version__, "description": _DESCRIPTION, "license": {"name": "MIT"}},
        "paths": _paths(),
        "components": {"schemas": _schemas(), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _schemas() -> dict[str, Schema]:
    prompt, flag = schema_of(Prompt), schema_of(bool)
    parameters = body_schema(JobPlan, AnswerParameters, ChoiceParameters, required=(), without=MISPLACED)
    generate = {"inputs": prompt, "parameters": nullable(reference("GenerateParameters"))}
    list_head = {"object": Literal["list"]}
    status = {"version": str, "queue": reference("QueueState"), "jobs": dict[str, Count]}
    bodies = {
        "GenerateParameters": parameters,
        "OriginalRequest": object_schema({**generate, "stream": nullable(flag)}, ("inputs",), closed=True),
        "GenerateRequest": object_schema(generate, ("inputs",), closed=True),
        "CompletionRequest": body_schema(CompletionRequest, required=()),
        "ChatRequest": body_schema(ChatRequest, required=("messages",)),
        "JobRequest": body_schema(JobPlan, required=()),
    }
    return {
        **with_named_objects(bodies),
        **record_schemas(*_ANSWERS),
        "GeneratedList": {"type": "array", "items": reference("Generated"), "minItems": 1, "maxItems": 1},
        "ModelList": object_schema({**list_head, "data": list[ModelBody]}),
        "ListedJob": object_schema(_LISTED_JOB, ("id", "status")),
        "JobList": object_schema({**list_head, **_PAGE}, ("object", "data")),
        "Version": object_schema({"version": str}),
        "Api": object_schema({"object": Literal["api"], "version": str, "docs": str, "routes": list[dict[str, str]]}),
        "State": object_schema({"status": str}),
        "QueueState": object_schema({"name": str, "depth": Count}),
        "Status": object_schema({**status, "workers": list[dict[str, Any]]}),
        "Error": object_schema({"error": str, "error_type": Annotated[str, _WORDS]}),
        "OpenAIError": object_schema({"error": ErrorObject}),
    }


def _paths() -> Object:
    """Return the operations by path and method. Errors under `/v1/` have OpenAI's shape."""
    paths: Object = {}
    for route, operation in {**_generating(), **_jobs(), **_operating()}.items():
        method, path = route.split()
        error = "OpenAIError" if is_openai(path) else "Error"
        paths.setdefault(path, {})[method.lower()] = operation.describe(error)
        for part in path.split("/"):
            if part in _PATH_PARAMETERS:
                paths[path]["parameters"] = [_parameter(part.strip("{}"), _PATH_PARAMETERS[part], "path")]
    return paths


def _generating() -> dict[str, _Operation]:
    tokens, completion = _events("TokenEvent"), {**_json("Completion"), **_events("Completion")}
    chat = {**_json("Chat"), **_events("ChatChunk")}
    page = {**_text("text/plain"), **_text("text/html")}
    chatting = "Answer a chat, as OpenAI's API does, if the model has a chat template; with `stream`, as events"
    completing = "Continue prompts, as OpenAI's API does; with `stream`, as events that end with `[DONE]`"
    return {
        "GET /": _Operation("home", "`Ok` for a program; for a browser, a page that shows the pool", page),
        "POST /": _Operation(
            "original",
            "Continue a prompt, as Narsil's fast_gpt2 does",
            {**_json("GeneratedList"), **tokens},
            _RUNS,
            "OriginalRequest",
        ),
        "POST /generate": _Operation(
            "generate",
            "Continue a prompt, as text-generation-inference does",
            _json("Generated"),
            _RUNS,
            "GenerateRequest",
        ),
        "POST /generate_stream": _Operation(
            "generate_stream",
            "The same, an event a token; the last event has the whole text",
            tokens,
            _RUNS,
            "GenerateRequest",
        ),
        "POST /v1/completions": _Operation("create_completion", completing, completion, _RUNS, "CompletionRequest"),
        "POST /v1/chat/completions": _Operation("create_chat_completion", chatting, chat, _RUNS, "ChatRequest"),
        "GET /v1": _Operation("v1", "What there is below this path", _json("Api")),
        "GET /v1/models": _Operation("list_models", "The models that workers serve", _json("ModelList"), _REDIS),
        "GET /v1/models/{model}": _Operation("show_model", "One model that is served", _json("Model"), (404, *_REDIS)),
    }


def _jobs() -> dict[str, _Operation]:
    job, events = _json("Job"), _events("TextEvent", "EndEvent")
    limit = {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": DEFAULT_LISTED}
    wait = {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS, "default": 0}
    last = _parameter("Last-Event-ID", {"type": "string", "pattern": Progress.PATTERN}, "header")
    listing = "The jobs that workers run, and the latest that have ended; with `state`, all in that state, by pages"
    state = _parameter("state", {"type": "string", "enum": list(STATES)}, "query")
    after = _parameter("after", {"type": "string"}, "query")
    details = _parameter("details", {"type": "boolean", "default": False}, "query")
    repeating = (
        "Run it again: requeue it if it has failed, as RQ does; of another that has ended, enqueue a new job with the "
        "same request"
    )
    key = _parameter("Idempotency-Key", _KEY, "header")
    showing = "How a job is, or how it ended; with `wait`, once it has ended or that many seconds are over"
    following = "Its text as it comes, from the beginning; if it was not enqueued with `stream`, all of it at its end"
    return {
        "GET /v1/jobs": _Operation(
            "list_jobs",
            listing,
            _json("JobList"),
            (400, *_REDIS),
            parameter=_parameter("limit", limit, "query"),
            further=(state, after),
        ),
        "POST /v1/jobs": _Operation(
            "create_job", "Enqueue a job, and leave", job, (*_ENQUEUES, 404), "JobRequest", status=202
        ),
        "GET /v1/jobs/{job_id}": _Operation(
            "show_job",
            showing,
            job,
            (400, 404, *_REDIS),
            parameter=_parameter("wait", wait, "query"),
            further=(details,),
        ),
        "DELETE /v1/jobs/{job_id}": _Operation("cancel_job", "Cancel it, unless it has ended", job, (404, *_REDIS)),
        "POST /v1/jobs/{job_id}/requeue": _Operation(
            "requeue_job", repeating, job, (400, 404, 409, 422, 429, *_REDIS), parameter=key, status=202
        ),
        "GET /v1/jobs/{job_id}/stream": _Operation(
            "follow_job", following, events, (400, 404, 409, 502, *_REDIS, 504), parameter=last
        ),
    }


def _operating() -> dict[str, _Operation]:
    history = _parameter("history", {"type": "boolean", "default": False}, "query")
    reporting = "What the pool is doing; with `history`, and did in the last minutes"
    metrics = {**_text("text/plain"), **_text("application/openmetrics-text")}
    telling = "The served model and its limits, as text-generation-inference tells them"
    described = {"application/json": {"schema": {"type": "object", "additionalProperties": True}}}
    return {
        "GET /info": _Operation("info", telling, _json("Info"), _REDIS),
        "GET /health": _Operation("health", "This process is alive", _json("State")),
        "GET /ready": _Operation("ready", "A job that is sent now would be run", _json("State"), _REDIS),
        "GET /status": _Operation("status", reporting, _json("Status"), (400, *_REDIS), parameter=history),
        "GET /metrics": _Operation("metrics", "The same for Prometheus", metrics, _REDIS),
        "GET /version": _Operation("version", "The version of the endpoint", _json("Version")),
        "GET /docs": _Operation("docs", "This document as a page for a browser", _text("text/html")),
        "GET /openapi.json": _Operation("document", "This document", described),
    }


def _json(schema: str) -> Object:
    return {"application/json": {"schema": reference(schema)}}


def _events(*schemas: str) -> Object:
    """Return the content of a stream of events: a text as a whole, and what each event in it holds.

    The text is for generators of clients, which know of no events. The fields of an event are spelt as OpenAPI 3.2 does
    for each item. An event's data is JSON, but for the last of OpenAI's, `[DONE]`.
    """
    data: Object = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [reference(schema) for schema in (*schemas, "OpenAIError", "Error")]},
    }
    if {"Completion", "ChatChunk"}.intersection(schemas):
        data = {"anyOf": [{"type": "string", "const": "[DONE]"}, data]}
    fields = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    each = {"type": "object", "properties": fields}
    return {"text/event-stream": {"schema": {"anyOf": [{"type": "string"}, each]}}}


def _text(kind: str) -> Object:
    return {kind: {"schema": {"type": "string"}}}


def _parameter(name: str, schema: Object, where: str) -> Object:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}
