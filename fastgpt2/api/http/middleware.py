"""Answers that come before the request has been read: they must reach a client that still sends it.

A server that answers and closes while data is on its way to it has the system reset the connection, and most clients
then never see the answer (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


# So much is read and passed over, and for so long.
MAX_PASSED_OVER_BYTES = 64 << 20
LINGER_SECONDS = 5.0
_SAY_THAT_THERE_IS_A_BODY = (b"content-length", b"transfer-encoding")


class Lingering:
    """ASGI middleware. Sends an answer whole, and only then, before it is said to be over, reads what was not read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not any(name in _SAY_THAT_THERE_IS_A_BODY for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        read = False

        async def noting() -> Message:
            nonlocal read
            message = await receive()
            read = read or not message.get("more_body", False)
            return message

        async def lingering(message: Message) -> None:
            over = message["type"] == "http.response.body" and not message.get("more_body", False)
            if read or not over:
                await send(message)
                return
            await send({**message, "more_body": True})
            left = MAX_PASSED_OVER_BYTES
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while not read and left > 0:
                        left -= len((await noting()).get("body", b""))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, noting, lingering)


# NOTE api.http.request_log: Each request has an id, in its answer and in the log, where it takes a line: what, how it
# went, how long it took.
log = logging.getLogger("fastgpt2.http")
REQUEST_ID = b"x-request-id"
JOB_ID = b"x-job-id"

# Asked for so often that lines of their success would be all there is to read.
_QUIET = frozenset({"/", "/health", "/ready", "/metrics", "/status", "/v1/jobs"})


class RequestLog:
    """ASGI middleware, the outermost. Takes over the id that a client or a proxy gives, if it is a plain word."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _given(scope) or uuid.uuid4().hex
        status, job_id, whole = 0, "", False

        async def noting(message: Message) -> None:
            nonlocal status, job_id, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                job_id = next((value.decode("latin-1") for name, value in headers if name == JOB_ID), "")
                message = {**message, "headers": [*headers, (REQUEST_ID, request_id.encode())]}
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            level = (
                logging.DEBUG
                if scope["path"] in _QUIET and status < 400 and scope["method"] != "POST"
                else logging.INFO
            )
            log.log(
                level,
                "%s %s %d in %.1f ms%s%s, request %s",
                *(scope["method"], ascii(scope["path"][:200])[1:-1], status, (time.perf_counter() - began) * 1e3),
                *("" if whole else ", cut short", f", job {job_id}" if job_id else "", request_id),
            )


def _given(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == REQUEST_ID]
    if len(values) != 1 or not re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", values[0]):
        return None
    found: str = values[0].decode()
    return found
