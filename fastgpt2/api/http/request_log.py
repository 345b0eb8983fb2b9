"""What is told of each request: its id, its line in the log, its place in the metrics, and its span."""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from fastgpt2.api.http.headers import single_value
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.request_spans import end_request_span, request_span, trace_id_of
from fastgpt2.events import OF_REQUEST, about
from fastgpt2.protocol.request_context import HERE, RequestContext

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("fastgpt2.http")

REQUEST_ID = b"x-request-id"
_TRACE_HEADERS = (b"traceparent", b"tracestate")
JOB_ID = b"x-job-id"

# These are asked for so often that lines of their success would fill the log.
_QUIET_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/status", "/info", "/v1/jobs"})


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
        brought = RequestContext.read(*(single_value(scope["headers"], name) for name in (REQUEST_ID, *_TRACE_HEADERS)))
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
