"""The ASGI middleware around all routes: plain paths, requests at once, what is told of each, and how answers end.

An answer may come before its request has been read. If the server then closes while data is still coming, the system
resets the connection, and most clients never see the answer (RFC 9112, 9.6). `LingeringClose` prevents that.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastgpt2.api.http.access import OPEN_ROUTES
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.request_spans import end_request_span, request_span, trace_id_of
from fastgpt2.errors import FastGPT2Error, ServiceBusy
from fastgpt2.events import OF_REQUEST, about
from fastgpt2.protocol.request_context import HERE, RequestContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("fastgpt2.http")

# The limits for the rest of a request that is read and thrown away.
MAX_PASSED_OVER_BYTES = 64 << 20
LINGER_SECONDS = 5.0

# A request with one of these headers has a body.
_BODY_HEADERS = (b"content-length", b"transfer-encoding")

_SLASHES = re.compile(rb"//+")
_WRITTEN_SLASH = re.compile(rb"%2[Ff]")

REQUEST_ID = b"x-request-id"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
JOB_ID = b"x-job-id"

# These are asked for so often that lines of their success would fill the log.
_QUIET_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/status", "/info", "/v1/jobs"})


class PlainPath:
    """Middleware that passes over slashes too many in a path: `/v1//models/` is `/v1/models`.

    Clients put a path behind a base that ends with a slash, or does not. They are not redirected, as many follow no
    redirection, or lose the body on the way. A slash that is written `%2F` is part of a name, and stays. In the id of a
    job, which is one part of a path, the path keeps it so written.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: bytes = scope.get("raw_path", b"") if scope["type"] == "http" else b""
        if path.startswith(b"/"):
            plain = _SLASHES.sub(b"/", path).rstrip(b"/") or b"/"
            read = _WRITTEN_SLASH.sub(b"%252F", plain) if plain.startswith(b"/v1/jobs/") else plain
            if read != path:
                scope = {**scope, "raw_path": plain, "path": unquote(read.decode("ascii"))}
        await self._app(scope, receive, send)


class LingeringClose:
    """Middleware that sends a whole answer, and reads the rest of the request before it ends the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(name in _BODY_HEADERS for name, _ in scope["headers"]):
            exchange = _LingeringExchange(receive, send)
            receive, send = exchange.receive, exchange.send
        await self._app(scope, receive, send)


class _LingeringExchange:
    """One request with a body, and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._is_read = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._is_read or not is_last:
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await self._pass_over_rest()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_over_rest(self) -> None:
        left = MAX_PASSED_OVER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._is_read and left > 0:
                    left -= len((await self.receive()).get("body", b""))


class Crowd:
    """Middleware that serves a bounded number of requests at once, and refuses those beyond; probes are always served.

    Args:
        most: that number.
        refuse: makes the response for an error.
    """

    def __init__(self, app: ASGIApp, most: int, refuse: Callable[[FastGPT2Error, Scope], ASGIApp]) -> None:
        self._app, self._most, self._refuse = app, most, refuse
        self._served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) in OPEN_ROUTES:
            await self._app(scope, receive, send)
        elif self._served >= self._most:
            busy = ServiceBusy(f"this endpoint serves {self._most} requests at once, and no more: try again later")
            await self._refuse(busy, scope)(scope, receive, send)
        else:
            self._served += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._served -= 1


class RequestLog:
    """The middleware: it gives each request an id, and tells of the request: in the log, the metrics and its span.

    A line of the log says what was asked, how that went, and how long it took. An id that a client or a proxy gives is
    kept, if it is a plain word. The id stands in the answer, and with what the request enqueues.

    What stands within this middleware may put more for the line into the dictionary `scope["log_fields"]`.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _LoggedAnswer(scope, receive, send)
        self._metrics.begin()
        with request_span(scope, answer.is_of_quiet_path) as span:
            try:
                answer.set_context(span)
                await self._app(scope, answer.receive, answer.send)
            finally:
                route = self._metrics.find_route(scope)
                answer.write_line(route)
                self._metrics.end(scope, route, answer.status, answer.seconds)
                if span is not None:
                    end_request_span(span, scope, route, answer.status, answer.request_id)


class _LoggedAnswer:
    """The answer to one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._began = time.perf_counter()
        self._scope, self._receive, self._send = scope, receive, send
        brought = RequestContext.read(*(_single_header(scope, name) for name in (REQUEST_ID, *_TRACE_HEADERS)))
        self._context = brought if brought.request_id else replace(brought, request_id=uuid.uuid4().hex)
        self.request_id = self._context.request_id
        self._status, self._job_id, self._is_whole, self._is_client_gone = 0, "", False, False

    @property
    def is_of_quiet_path(self) -> bool:
        return self._scope["path"] in _QUIET_PATHS and self._scope["method"] != "POST"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def status(self) -> int:
        """The status, once the answer has ended: 499, as nginx has it, if the client left before it was whole.

        Without an answer, the request has met an error that nobody foresaw, and is answered further out.
        """
        if self._is_client_gone and not self._is_whole:
            return 499
        return self._status or 500

    def set_context(self, span: Span | None) -> None:
        """Have what is logged and enqueued for this request tell of it."""
        HERE.set(self._context)
        traced = {} if span is None else {"trace_id": trace_id_of(span)}
        OF_REQUEST.set({**self._context.log_fields, **traced})
        self._scope["log_fields"] = {}

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_client_gone = self._is_client_gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", ()))
            self._job_id = next((value.decode("latin-1") for name, value in headers if name == JOB_ID), "")
            message = {**message, "headers": [*headers, (REQUEST_ID, self.request_id.encode())]}
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
        await self._send(message)

    def write_line(self, route: str) -> None:
        method, path, more = self._scope["method"], ascii(self._scope["path"][:200])[1:-1], self._scope["log_fields"]
        seconds = self.seconds
        is_quiet = self.is_of_quiet_path and self.status < 400
        log.log(
            logging.DEBUG if is_quiet else logging.INFO,
            "%s %s %d in %.1f ms%s%s%s, request %s",
            method,
            path,
            self.status,
            seconds * 1e3,
            "" if self._is_whole else ", cut short",
            f", job {self._job_id}" if self._job_id else "",
            "".join(f", {name} {value}" for name, value in more.items()),
            self.request_id,
            extra=about(
                method=method,
                path=path,
                route=route,
                status=self.status,
                seconds=round(seconds, 6),
                **({} if self._is_whole else {"cut_short": True}),
                **({"job_id": self._job_id} if self._job_id else {}),
                **more,
            ),
        )


def _single_header(scope: Scope, name: bytes) -> str:
    """Return the value of a header; empty if the request has none of that name, or more than one."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""
