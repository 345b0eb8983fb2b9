"""The HTTP endpoint as a process, on uvicorn."""

from __future__ import annotations

import signal
import socket
from typing import Any

from fastgpt2.errors import BadRequest

# A last resort after the endpoint's own grace: uvicorn then cancels the requests that are left.
SHUTDOWN_SECONDS = 10
# A further connection is answered with 503. Each connection may hold a request that waits.
MAX_CONNECTIONS = 4000
# The limit for a request's line and headers.
MAX_HEAD_BYTES = 64 << 10


def serve(values: dict[str, Any]) -> None:
    """Serve until SIGINT or SIGTERM; `values` are the settings of `fastgpt2 api`.

    Raises:
        BadRequest: the address cannot be bound, or may not be without a token; or the Redis URL cannot be used.
    """
    import uvicorn

    from fastgpt2.api.http.access import is_loopback, read_token, refuse_exposure
    from fastgpt2.api.http.app import create_app
    from fastgpt2.api.http.service import Bounds, log
    from fastgpt2.process import set_up_logging

    set_up_logging(values["log_level"])
    token = read_token(values["token_file"])
    refuse_exposure(values["host"], token, values["insecure"])
    own_name = values["host"] if is_loopback(values["host"]) else values["host_name"]
    app = create_app(
        values["redis_url"],
        values["queue"],
        Bounds(
            values["timeout"],
            values["body_timeout"],
            values["max_queue"],
            values["show_prompts"],
            values["durability"],
        ),
        lambda: server.should_exit,
        token,
        own_name,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            server_header=False,
            # This parser whatever else is installed: the others do not bound a request's head. And no web sockets: the
            # endpoint has none, and they would pass by `Access`.
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
    # When uvicorn is done, it raises the signal that stopped it once more. A clean stop would then look like a death.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    server.run(sockets=[bound])
    log.info("endpoint has stopped")


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        BadRequest: the address is taken, or is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as reason:
        raise BadRequest(f"cannot listen on {host} port {port} ({reason}); choose another --host or --port") from None
    # Connections inherit the option. asyncio sets it only on sockets that name TCP as their protocol, which this one
    # does not. Without it the second part of an answer waits 40 ms for the client to acknowledge the first.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
