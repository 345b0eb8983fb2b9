"""Answers: JSON, errors in the shape that a route's clients know, and streams of server-sent events.

The head of a stream waits for its first event, so that a request which fails at once gets a status of its own. The
format is that of WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgpt2.api.http.requests import ClientGone
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    ForbiddenOrigin,
    JobFailed,
    JobLost,
    JobNotFound,
    ModelError,
    PromptTooLong,
    QueueFull,
    QueueUnavailable,
    RedisUnfit,
    ResultTimeout,
    ServiceBusy,
    ServiceStopping,
    Unauthorized,
    UnsupportedEncoding,
)

log = logging.getLogger("fastgpt2.http")

# What passes, so that a client is advised to ask again, after this wait.
_PASSING = (QueueFull, QueueUnavailable, JobLost, ServiceBusy, ServiceStopping)
RETRY_AFTER_SECONDS = 1

# What the same request would meet again: its job has ended, was cancelled as its time was up, or Redis cannot serve.
# OpenAI's clients repeat whatever has the status 408, 409, 429 or one from 500 on, unless a header tells them not to:
# one job that kills its workers would then kill three times as many.
_FINAL = (JobFailed, ModelError, ResultTimeout, RedisUnfit)
_NO_RETRY = {"x-should-retry": "false"}

# The routes that begin so are OpenAI's, or speak in their manner.
OPENAI_PREFIX = "/v1/"

# A comment, which clients pass over.
KEEP_ALIVE = b": waiting\n\n"


class BadField(BadRequest):
    """Raised if a field of the request is wrong.

    Attributes:
        param: the field's name, as in OpenAI's errors.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ModelUnknown(BadRequest):
    """Raised if the request names a model that no worker serves."""

    http_status = 404


class JSON(Response):
    """An answer of compact JSON in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def encode_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8; all that is not ASCII is escaped if the value holds a lone surrogate."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def error_object(error: FastGPT2Error, openai: bool) -> dict[str, Any]:
    """Return the body that tells of an error, as OpenAI's API has it or as the original's routes do."""
    kind, code = _kind_and_code(error)
    return _error_body(openai, str(error), type(error).__name__, kind, getattr(error, "param", None), code)


def _error_body(
    openai: bool, message: str, name: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    if openai:
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return {"error": message, "error_type": name}


def _kind_and_code(error: FastGPT2Error) -> tuple[str, str | None]:
    name = _snake_case(type(error).__name__)
    match error:
        case Unauthorized():
            return "authentication_error", "invalid_api_key"
        case PromptTooLong():
            return "invalid_request_error", "context_length_exceeded"
        case ModelUnknown():
            return "invalid_request_error", "model_not_found"
        case QueueFull():
            return "rate_limit_error", name
        case JobLost():
            return "server_error", name
        case JobNotFound():
            return "invalid_request_error", name
        case ForbiddenOrigin():
            return "permission_error", name
        case BadRequest():
            return "invalid_request_error", None if type(error) in (BadRequest, BadField) else name
    return "server_error", name


def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def respond(error: FastGPT2Error, scope: Scope) -> Response:
    """Return the response to a request that ends with an error."""
    headers = {}
    if isinstance(error, _FINAL) or error.http_status == FastGPT2Error.http_status:
        headers.update(_NO_RETRY)
    elif isinstance(error, _PASSING):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(error, UnsupportedEncoding):
        headers["accept-encoding"] = "identity"
    return JSON(error_object(error, scope["path"].startswith(OPENAI_PREFIX)), error.http_status, headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """Answer with one of our own errors, for Starlette."""
    assert isinstance(error, FastGPT2Error)
    if isinstance(error, ClientGone):
        return Response(status_code=error.http_status)
    return respond(error, request.scope)


async def handle_unknown_route(request: Request, error: Exception) -> Response:
    """Answer a request for a route or a method that does not exist, for Starlette."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    openai = request.url.path.startswith(OPENAI_PREFIX)
    body = _error_body(openai, message, "HTTPException", "invalid_request_error")
    return JSON(body, error.status_code, error.headers)


async def handle_unforeseen(request: Request, error: Exception) -> Response:
    """Log an error that nobody foresaw, and answer with one that says no more, for Starlette."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = "an unforeseen error; the endpoint's log has the details"
    openai = request.url.path.startswith(OPENAI_PREFIX)
    return JSON(_error_body(openai, message, "InternalError", "server_error"), 500, _NO_RETRY)


def event(data: Any, name: str = "", event_id: str = "") -> bytes:
    """Return one event. Its data is JSON, which has no line ends."""
    head = (f"event: {name}\n" if name else "") + (f"id: {event_id}\n" if event_id else "")
    return b"%sdata: %s\n\n" % (head.encode(), encode_json(data))


class EventStream(Response):
    """A response that sends events as they come.

    Args:
        source: a context that gives the headers, and the events, each as bytes. An error before the first event is
            answered like the error of any request; a later one becomes an event.
        error_event: makes that event, and what the format has at the end of a stream.
    """

    def __init__(
        self,
        source: AbstractAsyncContextManager[tuple[Mapping[str, str], AsyncIterator[bytes]]],
        error_event: Callable[[FastGPT2Error], bytes],
    ) -> None:
        super().__init__()
        self._source = source
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with self._source as (headers, events):
                async for body in events:
                    if not begun:
                        await send(_head(headers))
                        begun = True
                    await _send(send, body)
                if not begun:
                    await send(_head(headers))
        except ClientGone as gone:
            if not begun:
                await Response(status_code=gone.http_status)(scope, receive, send)
            return
        except FastGPT2Error as error:
            if not begun:
                await respond(error, scope)(scope, receive, send)
                return
            await _send(send, self._error_event(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _head(headers: Mapping[str, str]) -> dict[str, Any]:
    both = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        # Without this, nginx would hold events back until its buffer is full.
        "x-accel-buffering": "no",
        **headers,
    }
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in both.items()],
    }


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
