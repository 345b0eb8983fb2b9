"""The ASGI middleware around all routes: plain paths, requests at once, their log, answers to clients that still send.

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
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastgpt2.api.http.access import OPEN_ROUTES
from fastgpt2.errors import FastGPT2Error, ServiceBusy

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """The middleware: it gives each request an id, in the answer and in the request's line of the log.

    The line says what was asked, how that went, and how long it took. An id that a client or a proxy gives is kept, if
    it is a plain word.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _LoggedAnswer(scope, send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            answer.write_line()


class _LoggedAnswer:
    """The answer to one request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._began = time.perf_counter()
        self._scope, self._send = scope, send
        self._request_id = _find_request_id(scope) or uuid.uuid4().hex
        self._status, self._job_id, self._is_whole = 0, "", False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", ()))
            self._job_id = next((value.decode("latin-1") for name, value in headers if name == JOB_ID), "")
            message = {**message, "headers": [*headers, (REQUEST_ID, self._request_id.encode())]}
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)
        await self._send(message)

    def write_line(self) -> None:
        method, path = self._scope["method"], self._scope["path"]
        is_quiet = path in _QUIET_PATHS and self._status < 400 and method != "POST"
        log.log(
            logging.DEBUG if is_quiet else logging.INFO,
            "%s %s %d in %.1f ms%s%s%s, request %s",
            method,
            ascii(path[:200])[1:-1],
            self._status,
            (time.perf_counter() - self._began) * 1e3,
            "" if self._is_whole else ", cut short",
            f", job {self._job_id}" if self._job_id else "",
            "".join(f", {name} {value}" for name, value in self._scope.get("log_fields", {}).items()),
            self._request_id,
        )


def _find_request_id(scope: Scope) -> str | None:
    """Return the id that the request brings; None if there is none, more than one, or one that is not a plain word."""
    values = [value for name, value in scope["headers"] if name == REQUEST_ID]
    if len(values) != 1 or not re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", values[0]):
        return None
    found: str = values[0].decode()
    return found
