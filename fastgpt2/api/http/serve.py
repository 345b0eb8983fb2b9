"""Running the HTTP endpoint on uvicorn."""

from __future__ import annotations

import signal
import socket
from typing import Any

from fastgpt2.errors import BadRequest

# A backstop beyond the endpoint's own grace: uvicorn then cancels what is left.
SHUTDOWN_SECONDS = 10
# Beyond it a connection is answered 503. Each may hold a request that waits.
MAX_CONNECTIONS = 4000
# Of a request's line and headers.
MAX_HEAD_BYTES = 64 << 10


def serve(values: dict[str, Any]) -> None:
    """Serve until SIGINT or SIGTERM; `values` are the settings of `fastgpt2 api`.

    Raises:
        BadRequest: the address cannot be bound, or not without a token; or the Redis URL cannot be used.
    """
    import uvicorn

    from fastgpt2.api.http.access import is_loopback, read_token, refuse_exposure
    from fastgpt2.api.http.app import create_app
    from fastgpt2.api.http.service import Bounds, log
    from fastgpt2.process import set_up_logging

    set_up_logging(values["log_level"])
    token = read_token(values["token_file"])
    refuse_exposure(values["host"], token, values["insecure"])
    asked_as = values["host"] if is_loopback(values["host"]) else values["host_name"]
    app = create_app(
        values["redis_url"],
        values["queue"],
        Bounds(values["timeout"], values["body_timeout"], values["max_queue"], values["show_prompts"]),
        lambda: server.should_exit,
        token,
        asked_as,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            server_header=False,
            # Whatever else is installed: the other parsers know no bound of a head. And there are no web sockets here,
            # which would pass by `Access`.
            http="h11",
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )
    bound = bind(values["host"], values["port"])
    log.info("endpoint on %s", url_of(bound))
    if token is None and not is_loopback(values["host"]):
        log.warning("everybody who can reach %s may use this endpoint (--insecure)", values["host"])
    # uvicorn raises the signal that stopped it once more when it is done, which would make a clean stop look like a
    # death.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    server.run(sockets=[bound])
    log.info("endpoint has stopped")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BadRequest: the address is taken or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as reason:
        raise BadRequest(f"cannot listen on {host} port {port} ({reason}); choose another --host or --port") from None
    # Connections take it over. asyncio would set it only on sockets that say that they are TCP's, as this one does not,
    # and without it the second part of an answer waits for the client's acknowledgement of the first: 40 ms.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def url_of(bound: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
