"""Answers: JSON, errors in the shape that a route's clients know, and streams of server-sent events.

The head of a stream waits for its first event, so that a request which fails at once gets a status of its own. The
format is that of WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgpt2.api.http.requests import ClientGone
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    ForbiddenOrigin,
    IdempotencyMismatch,
    JobCancelled,
    JobFailed,
    JobLost,
    JobNotEnded,
    JobNotFound,
    JobStopped,
    JobTimedOut,
    ModelError,
    ModelUnknown,
    NoChatTemplate,
    NotDurable,
    PoisonJob,
    PromptTooLong,
    QueueFull,
    QueueUnavailable,
    RedisAccessDenied,
    RedisUnfit,
    RequestTooLarge,
    RequestTooSlow,
    ResultTimeout,
    ServiceBusy,
    ServiceStopping,
    TextReplaced,
    TokenLimitReached,
    TokenMissing,
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
_FINAL = (JobFailed, JobNotEnded, ModelError, ResultTimeout, RedisUnfit)
_NO_RETRY = {"x-should-retry": "false"}

# RFC 6750, 3: a request without a token is told no error.
_TOKEN_REFUSED = 'Bearer error="invalid_token", error_description="the token is none of this endpoint"'

# The routes that begin so are OpenAI's, or speak in their manner; so does the path without the slash.
OPENAI_PREFIX = "/v1/"

# An empty line, which ends no event, and which readers of every kind pass over. Of comments, which the format has for
# this, some know nothing: SGLang's benchmark takes each line that is not empty for JSON.
KEEP_ALIVE = b"\n"


class BadField(BadRequest):
    """Raised if a field of the request is wrong.

    Attributes:
        param: the field's name, as in OpenAI's errors.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class NotReady(FastGPT2Error):
    """Raised if no worker can take a job now, or if the endpoint is being stopped."""

    http_status = 503


class Kind(NamedTuple):
    """What the two APIs call a kind of error.

    Attributes:
        type: of OpenAI's error objects, by which its clients and LiteLLM tell kinds apart.
        code: of the same; None where OpenAI gives none either.
        word: text-generation-inference's `error_type`, by which its client and huggingface_hub choose a class. It has
            "validation" for a wrong request, "overloaded" for one that can be made again later, "generation" for a
            failure, "incomplete_generation" for a text that was begun and is not whole, and "healthcheck". Where none
            of these is true, it is the code.
    """

    type: str
    code: str | None
    word: str


# A class that is not here has the kind of its base.
KINDS: dict[type[FastGPT2Error], Kind] = {
    FastGPT2Error: Kind("server_error", "internal_error", "generation"),
    BadRequest: Kind("invalid_request_error", None, "validation"),
    PromptTooLong: Kind("invalid_request_error", "context_length_exceeded", "validation"),
    NoChatTemplate: Kind("invalid_request_error", "no_chat_template", "validation"),
    ModelUnknown: Kind("invalid_request_error", "model_not_found", "validation"),
    RequestTooLarge: Kind("invalid_request_error", "request_too_large", "validation"),
    UnsupportedEncoding: Kind("invalid_request_error", "unsupported_encoding", "validation"),
    RequestTooSlow: Kind("invalid_request_error", "request_too_slow", "validation"),
    IdempotencyMismatch: Kind("invalid_request_error", "idempotency_mismatch", "validation"),
    Unauthorized: Kind("authentication_error", "invalid_api_key", "invalid_api_key"),
    TokenMissing: Kind("authentication_error", "missing_api_key", "missing_api_key"),
    ForbiddenOrigin: Kind("permission_error", "forbidden_origin", "forbidden_origin"),
    JobNotFound: Kind("invalid_request_error", "job_not_found", "job_not_found"),
    JobNotEnded: Kind("invalid_request_error", "job_not_ended", "job_not_ended"),
    JobLost: Kind("server_error", "job_lost", "incomplete_generation"),
    JobFailed: Kind("server_error", "job_failed", "generation"),
    JobCancelled: Kind("server_error", "job_cancelled", "incomplete_generation"),
    JobStopped: Kind("server_error", "job_stopped", "incomplete_generation"),
    JobTimedOut: Kind("server_error", "job_timed_out", "incomplete_generation"),
    PoisonJob: Kind("server_error", "poison_job", "generation"),
    ModelError: Kind("server_error", "model_error", "generation"),
    QueueFull: Kind("rate_limit_error", "queue_full", "overloaded"),
    QueueUnavailable: Kind("server_error", "queue_unavailable", "overloaded"),
    TokenLimitReached: Kind("rate_limit_error", "rate_limit_exceeded", "overloaded"),
    NotDurable: Kind("server_error", "not_durable", "overloaded"),
    RedisUnfit: Kind("server_error", "redis_unfit", "generation"),
    RedisAccessDenied: Kind("server_error", "redis_access_denied", "generation"),
    ResultTimeout: Kind("server_error", "result_timeout", "incomplete_generation"),
    ServiceBusy: Kind("server_error", "service_busy", "overloaded"),
    ServiceStopping: Kind("server_error", "service_stopping", "incomplete_generation"),
    TextReplaced: Kind("server_error", "text_replaced", "incomplete_generation"),
    NotReady: Kind("server_error", "not_ready", "healthcheck"),
}

# Characters that end a line where Python splits one, and which JSON may hold as they are. httpx, and so
# huggingface_hub, splits streams by them, and would take one event for two.
_LINE_ENDS = {character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class JSON(Response):
    """An answer of compact JSON in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def encode_json(value: Any) -> bytes:
    """Return a value as one line of JSON in UTF-8.

    What ends a line is escaped, and all that is not ASCII if the value holds a lone surrogate.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in _LINE_ENDS.items():
        text = text.replace(character, escaped)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def error_object(error: FastGPT2Error, openai: bool) -> dict[str, Any]:
    """Return the body that tells of an error, as OpenAI's API has it or as text-generation-inference has it."""
    message = _begin_as_openai(str(error)) if isinstance(error, PromptTooLong) else str(error)
    return error_body(openai, message, kind_of(error), getattr(error, "param", None))


def _begin_as_openai(message: str) -> str:
    """Return the sentence on a prompt that is too long, begun as OpenAI's.

    LiteLLM, LangChain, CrewAI and others know by this beginning that a prompt must be cut, whatever the code says.
    Workers of earlier releases write sentences too, so the limit is taken from the sentence.
    """
    limit = re.search(r"model's (\d+) positions", message)
    return f"This model's maximum context length is {f'{limit[1]} tokens' if limit else 'exceeded'}: {message}"


def kind_of(error: FastGPT2Error) -> Kind:
    """Return what an error is called."""
    return next(KINDS[base] for base in type(error).__mro__ if base in KINDS)


def is_openai(path: str) -> bool:
    """Tell whether a path is of OpenAI's API, so that errors have its shape."""
    return f"{path}/".startswith(OPENAI_PREFIX)


def error_body(openai: bool, message: str, kind: Kind, param: str | None = None) -> dict[str, Any]:
    """Return the body that tells of an error, in OpenAI's shape or in text-generation-inference's."""
    if openai:
        return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}
    return {"error": message, "error_type": kind.word}


def respond(error: FastGPT2Error, scope: Scope) -> Response:
    """Return the response to a request that ends with an error."""
    headers = {}
    if isinstance(error, _FINAL) or error.http_status == FastGPT2Error.http_status:
        headers.update(_NO_RETRY)
    elif isinstance(error, TokenLimitReached):
        headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, _PASSING):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer" if isinstance(error, TokenMissing) else _TOKEN_REFUSED
    elif isinstance(error, UnsupportedEncoding):
        headers["accept-encoding"] = "identity"
    return JSON(error_object(error, is_openai(scope["path"])), error.http_status, headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """Answer with one of our own errors, for Starlette."""
    assert isinstance(error, FastGPT2Error)
    if isinstance(error, ClientGone):
        return Response(status_code=error.http_status)
    return respond(error, request.scope)


async def handle_unforeseen(request: Request, error: Exception) -> Response:
    """Log an error that nobody foresaw, and answer with one that says no more, for Starlette."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    message = "an unforeseen error; the endpoint's log has the details"
    return JSON(error_body(is_openai(request.url.path), message, KINDS[FastGPT2Error]), 500, _NO_RETRY)


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
