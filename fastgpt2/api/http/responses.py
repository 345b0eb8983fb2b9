"""Answers: JSON, and errors in the shape that a route's clients know."""

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

from fastgpt2.api.http.requests import CallerGone
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    ForbiddenOrigin,
    JobNotFound,
    PromptTooLong,
    QueueFull,
    ServiceBusy,
    ServiceStopping,
    Unauthorized,
)
from fastgpt2.protocol.messages import Piece

log = logging.getLogger("fastgpt2.http")

# What a client is told to wait when the queue is full, or the endpoint busy.
RETRY_AFTER_SECONDS = 1

# Routes below are OpenAI's, or in their manner.
OPENAI_PREFIX = "/v1/"


class BadField(BadRequest):
    """A field that is wrong, by name: OpenAI's `param`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ModelUnknown(BadRequest):
    """A request for a model that no worker serves."""

    http_status = 404


class JSON(Response):
    """Compact JSON in UTF-8, as it is; what cannot be (a lone surrogate) is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def error_object(error: FastGPT2Error, openai: bool) -> dict[str, Any]:
    """The body that tells of an error: as OpenAI's API has it, or as the original's other routes do."""
    if not openai:
        return {"error": str(error), "error_type": type(error).__name__}
    kind, code = _kind_and_code(error)
    return {"error": {"message": str(error), "type": kind, "param": getattr(error, "param", None), "code": code}}


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
        case JobNotFound():
            return "invalid_request_error", name
        case ForbiddenOrigin():
            return "permission_error", name
        case BadRequest():
            return "invalid_request_error", None if type(error) in (BadRequest, BadField) else name
    return "server_error", name


def _snake_case(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def answer(error: FastGPT2Error, scope: Scope) -> Response:
    """The response of an error."""
    headers = {}
    if isinstance(error, QueueFull | ServiceBusy | ServiceStopping):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSON(error_object(error, is_openai(scope)), error.http_status, headers)


def is_openai(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith(OPENAI_PREFIX)


async def refuse(request: Request, error: Exception) -> Response:
    """Starlette's handler of our own errors."""
    assert isinstance(error, FastGPT2Error)
    if isinstance(error, CallerGone):
        return Response(status_code=error.http_status)
    return answer(error, request.scope)


async def refuse_route(request: Request, error: Exception) -> Response:
    """Starlette's handler of unknown routes and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return _other(request, error.status_code, "HTTPException", "invalid_request_error", message, error.headers)


async def own_fault(request: Request, error: Exception) -> Response:
    """Starlette's handler of what was not foreseen."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = "an unforeseen error; the endpoint's log has the details"
    return _other(request, 500, "InternalError", "server_error", message)


def _other(
    request: Request, status: int, kind: str, openai_kind: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    if is_openai(request.scope):
        body: dict[str, Any] = {"error": {"message": message, "type": openai_kind, "param": None, "code": None}}
    else:
        body = {"error": message, "error_type": kind}
    return JSON(body, status, headers)


# NOTE api.http.event_stream: A response of server-sent events, whose head waits a moment, so that what fails at once
# has its own status.
#
# Format: WHATWG HTML, "Server-sent events".

# A comment, which clients pass over.
KEEP_ALIVE = b": waiting\n\n"


def event(data: Any, name: str = "", event_id: str = "") -> bytes:
    """One event; its data as JSON, which has no line ends."""
    head = (f"event: {name}\n" if name else "") + (f"id: {event_id}\n" if event_id else "")
    return b"%sdata: %s\n\n" % (head.encode(), dumps(data))


class Appended:
    """Sees to it that the texts of a stream only grow, where its format has no way to take anything back."""

    def __init__(self) -> None:
        self._upto: dict[int, int] = {}

    def add(self, number: int, piece: Piece) -> None:
        """Raises FastGPT2Error for a piece that takes the place of some of its text."""
        if piece.at < self._upto.get(number, 0):
            raise FastGPT2Error(
                "the job was started again elsewhere and came out otherwise than what has been sent of it: ask again"
            )
        self._upto[number] = piece.at + len(piece.text)


class EventStream(Response):
    """Sends events as they come.

    Args:
        source: a context that gives the headers and the events, each as bytes. What is raised before the first of them
            is answered as the error of any request; what is raised later becomes an event.
        error_event: makes that event, and whatever ends a stream.
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
        except CallerGone as gone:
            if not begun:
                await Response(status_code=gone.http_status)(scope, receive, send)
            return
        except FastGPT2Error as error:
            if not begun:
                await answer(error, scope)(scope, receive, send)
                return
            await _send(send, self._error_event(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _head(headers: Mapping[str, str]) -> dict[str, Any]:
    both = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        # nginx would hold events back until it has a bufferful.
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
