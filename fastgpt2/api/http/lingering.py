"""Answers that come before the request has been read: they must reach a client that still sends it.

A server that answers and closes while data is on its way to it has the system reset the connection, and most clients
then never see the answer (RFC 9112, 9.6).
"""

from __future__ import annotations

import asyncio
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
