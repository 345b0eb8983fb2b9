"""Answers: JSON, and errors in the shape that a route's clients know."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from fastgpt2.api.http.caller import CallerGone
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
