"""The connections of the endpoint, on uvicorn: how many there may be, and how long each may be open for nothing.

A process may have only so many files open, and each connection is one. Where that limit is met in `accept`, nobody is
served any more, not even a probe. So the endpoint keeps below it: at its own limit, a new connection takes the place of
the one that has waited longest without a request.
"""

from __future__ import annotations

import asyncio
import errno
import http
import json
import logging
import math
import socket
import time
from typing import TYPE_CHECKING, Any

from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fastgpt2.api.http.parser import Parser
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.responses import error_object, is_openai
from fastgpt2.errors import BadRequest, FastGPT2Error, RequestTooSlow

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("fastgpt2.http")

# The limit for the time in which a request's head must have come: from the start of the connection, or from the head's
# first byte on a connection that had a request before.
HEAD_SECONDS = 20.0

# A client that takes nothing of its answer for this long, while 64 KiB wait for it, has left without a word.
WRITE_SECONDS = 60.0

# How long a connection that was refused is still read from: if it were closed while data is on its way, the system
# would reset it, and the client would not see why (RFC 9112, 9.6).
LINGER_SECONDS = 2.0

# Connections that are accepted at once, before the first of them counts. asyncio takes the backlog for that, which is
# set to its own size again afterwards.
ACCEPTED_AT_ONCE = 4
BACKLOG = 2048

# What else is open: standard streams, the event loop, the listener, modules, and connections just accepted or closed.
OTHER_FILES = 64
LEAST_CONNECTIONS = 8

SAY_SECONDS = 60.0
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def limit_connections(most: int, open_files: int) -> int:
    """Return how many connections a process may have that may have so many open files; each may need one to Redis."""
    return max(LEAST_CONNECTIONS, min(most, (open_files - OTHER_FILES) // 2))


class RareWarning:
    """A warning that is logged once a minute, however often there is reason for it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._said_at = -math.inf

    def say(self, *values: object) -> None:
        """Log it, unless it was logged in the last minute."""
        now = time.monotonic()
        if now - self._said_at >= SAY_SECONDS:
            self._said_at = now
            log.warning(self._text, *values)


class Connections(ServerState):
    """All connections of one server.

    Args:
        limit: how many there may be.

    Attributes:
        metrics: where it is counted what could not be read as a request.
        waiting: those without a request, the one that has waited longest first.
    """

    def __init__(self, limit: int, metrics: RequestMetrics) -> None:
        super().__init__()
        self._limit = limit
        self.metrics = metrics
        self.waiting: dict[Connection, None] = {}
        self._full = RareWarning(
            "%d connections are open, as many as may be: those that have waited longest without a request are closed "
            "for new ones"
        )

    def make_room(self) -> None:
        """Close the connection that has waited longest, if there are too many."""
        if len(self.connections) > self._limit:
            self._full.say(self._limit)
            next(iter(self.waiting)).give_way()


class Connection(H11Protocol):
    """One connection.

    It waits from its start to the head of its first request, and between an answer and the next head.
    """

    conn: Parser
    server_state: Connections

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert config.h11_max_incomplete_event_size is not None
        self.conn = Parser(config.h11_max_incomplete_event_size)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._expect_head()
        self.server_state.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count this connection no more."""
        self._stop_waiting()
        self._stop_timer_of_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what follows a refusal is passed over."""
        if self._is_refused:
            return
        super().data_received(data)
        if self._has_request:
            self._stop_waiting()
        elif not self._is_refused:
            self._expect_head()

    def on_response_complete(self) -> None:
        """Wait for the next request, if it has not come yet."""
        super().on_response_complete()
        if self._has_request:
            self._stop_waiting()
        elif self.conn.is_in_midst and not self._is_refused:
            self._expect_head()
        else:
            self.server_state.waiting[self] = None  # for as long as uvicorn's own timer lets it

    def pause_writing(self) -> None:
        """Give the client some time to take what waits for it."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._give_up_writing)

    def resume_writing(self) -> None:
        """Go on: the client has taken some."""
        super().resume_writing()
        self._stop_timer_of_writing()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002, the parser has a better one
        """Answer what cannot be read as a request, for uvicorn, and close the connection."""
        status, sentence = self.conn.objection
        self._refuse(status, BadRequest(sentence))

    def shutdown(self) -> None:
        """Close this connection, as the server stops; at once, or after the answer to its request."""
        if self._is_refused:  # h11 does not know of the answer, and to it this would be no time to close
            self.transport.close()
        else:
            super().shutdown()

    def give_way(self) -> None:
        """Close this connection, which waits, at once."""
        self._stop_waiting()
        self.server_state.connections.discard(self)
        self.transport.abort()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self.server_state.waiting[self] = None
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up_head)

    def _stop_waiting(self) -> None:
        self.server_state.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_head(self) -> None:
        self._head_timer = None
        if self.cycle is None and self.conn.has_begun:
            self._refuse(408, RequestTooSlow(f"the head of the request did not come within {HEAD_SECONDS:g} s"))
        else:
            self.transport.abort()

    def _give_up_writing(self) -> None:
        log.info("a client took nothing of its answer for %g s: its connection is closed", WRITE_SECONDS)
        self.transport.abort()

    def _refuse(self, status: int, error: FastGPT2Error) -> None:
        """Answer with an error, read no request any more, and close a little later."""
        self._is_refused = True
        self._unset_keepalive_if_required()
        self._stop_waiting()
        self.server_state.waiting[self] = None
        if self._has_request:  # a request whose body is wrong: nobody reads what its handler answers
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()
        if not self._has_request or not self.cycle.response_started:
            if not self._has_request:
                self.server_state.metrics.count_refusal(status)
            openai = is_openai(self.conn.target.partition(b"?")[0].decode("latin-1"))
            self.transport.write(_answer(status, json.dumps(error_object(error, openai)).encode()))
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _stop_timer_of_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _answer(status: int, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


class BoundedServer(Server):
    """uvicorn's server with such connections.

    Args:
        limit: how many there may be.
        metrics: see `Connections`.
        open_files: how many files this process may have open.
    """

    def __init__(self, config: Config, limit: int, metrics: RequestMetrics, open_files: int) -> None:
        super().__init__(config)
        self.server_state = Connections(limit, metrics)
        self._open_files = open_files
        self._out_of_files = RareWarning(
            "no connection can be accepted (%s): this process may have %d files open, raise that limit (`ulimit -n`); "
            "trying again every second"
        )

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Listen."""
        asyncio.get_running_loop().set_exception_handler(self._handle_exception)
        await super().startup(None if sockets is None else list(sockets))
        for bound in sockets or ():
            bound.listen(BACKLOG)

    def _handle_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES and "accept" in context["message"]:
            self._out_of_files.say(error.strerror, self._open_files)
        else:
            loop.default_exception_handler(context)
