"""A response of server-sent events, whose head waits a moment, so that what fails at once has its own status.

Format: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgpt2.api.http.answers import answer, dumps
from fastgpt2.api.http.caller import CallerGone
from fastgpt2.errors import FastGPT2Error
from fastgpt2.worker.stream import Piece

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
