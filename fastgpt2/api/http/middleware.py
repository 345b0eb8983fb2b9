"""The ASGI middleware around all routes: plain paths, how many requests at once, and how answers end.

An answer may come before its request has been read. If the server then closes while data is still coming, the system
resets the connection, and most clients never see the answer (RFC 9112, 9.6). `LingeringClose` prevents that.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastgpt2.api.http.access import OPEN_ROUTES
from fastgpt2.errors import FastGPT2Error, ServiceBusy
from fastgpt2.plurals import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The limits for the rest of a request that is read and thrown away.
MAX_PASSED_OVER_BYTES = 64 << 20
LINGER_SECONDS = 5.0

# A request with one of these headers has a body.
_BODY_HEADERS = (b"content-length", b"transfer-encoding")

_SLASHES = re.compile(rb"//+")
_WRITTEN_SLASH = re.compile(rb"%2[Ff]")


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
            most = counted(self._most, "request")
            busy = ServiceBusy(f"this endpoint serves {most} at once, and no more: try again later")
            await self._refuse(busy, scope)(scope, receive, send)
        else:
            self._served += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._served -= 1
