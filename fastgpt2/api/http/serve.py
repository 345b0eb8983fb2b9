"""The HTTP endpoint as a process, on uvicorn."""

from __future__ import annotations

import errno
import logging
import signal
import socket
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from fastgpt2.api.http.tokens import Tokens

log = logging.getLogger("fastgpt2.http")

# A last resort after the endpoint's own grace: uvicorn then cancels the requests that are left.
SHUTDOWN_SECONDS = 10
# The limit for connections, where the process may have files enough open. Each may hold a request that waits.
MAX_CONNECTIONS = 4000
# The limit for a request's line and headers.
MAX_HEAD_BYTES = 64 << 10

# The addresses that stand for all of them, and those by which this machine then reaches itself.
ANY_IPV6 = "::"
_OWN_ADDRESSES = {ANY_IPV6: "::1", "0.0.0.0": "127.0.0.1"}
_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


def serve(values: dict[str, Any]) -> None:
    """Serve until SIGINT or SIGTERM; `values` are the settings of `fastgpt2 api`.

    Raises:
        BadRequest: the address cannot be bound, or may not be without a token; or the Redis URL cannot be used.
        RedisUnfit: Redis cannot serve, and waiting would not help.
    """
    from fastgpt2.api.http.access import names_to_serve, refuse_exposure
    from fastgpt2.api.http.app import Web, create_app
    from fastgpt2.api.http.connections import BoundedServer, limit_connections
    from fastgpt2.api.http.service import Bounds
    from fastgpt2.api.http.tokens import read_tokens
    from fastgpt2.process import HangUp, raise_open_file_limit, set_up_logging
    from fastgpt2.protocol.server_check import refuse_unfit
    from fastgpt2.tracing import close_tracing, set_up_tracing

    set_up_logging(values["log_level"])
    set_up_tracing("fastgpt2-api", values["otlp_traces_endpoint"])
    hang_up = HangUp()
    if values["token_file"] is not None:
        hang_up.listen()  # before the file is read: no signal comes in vain
    tokens = read_tokens(values["token_file"], hang_up)
    refuse_exposure(values["host"], tokens is not None, values["insecure"])
    refuse_unfit(values["redis_url"], "endpoint", values["queue"])
    web = Web(
        names_to_serve(values["host"], values["host_name"], values["public_url"]),
        values["allow_origin"],
        values["public_url"],
        values["trusted_proxy"],
    )
    open_files = raise_open_file_limit()
    most = limit_connections(MAX_CONNECTIONS, open_files)
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
        tokens,
        web,
        most,
    )
    server = BoundedServer(_configure(app, values), most, app.state.request_metrics, open_files)
    bound = bind(values["host"], values["port"])
    if most < MAX_CONNECTIONS:
        log.warning("this process may have %d files open: it holds %d connections at most", open_files, most)
    log.info("endpoint on %s", url_of(bound))
    _tell_who_may_ask(values, bound, tokens)
    # A signal stops the server also before uvicorn listens for signals itself. And when uvicorn is done, it raises the
    # signal that stopped it once more: a clean stop would otherwise look like a death.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, server.handle_exit)
    try:
        server.run(sockets=[bound])
    finally:
        close_tracing()
    log.info("endpoint has stopped")


def _configure(app: ASGIApp, values: dict[str, Any]) -> uvicorn.Config:
    """Return the settings of uvicorn."""
    import uvicorn

    from fastgpt2.api.http.connections import ACCEPTED_AT_ONCE, Connection

    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_keep_alive=values["keep_alive"],
        server_header=False,
        proxy_headers=False,  # `TrustedProxies` reads them, and believes nobody who is not named
        # Whatever else is installed: this loop, whose way to accept is known, and this parser, which bounds heads.
        # And no web sockets: the endpoint has none, and they would pass by `Access`.
        loop="asyncio",
        http=Connection,
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def _tell_who_may_ask(values: dict[str, Any], bound: socket.socket, tokens: Tokens | None) -> None:
    """Write into the log where the endpoint listens, and who may use it."""
    from fastgpt2.api.http.access import is_loopback

    if not is_loopback(values["host"]):
        log.info("it listens on %s port %d", *bound.getsockname()[:2])
    if tokens is not None and tokens.names:
        log.info("tokens: %s", ", ".join(tokens.names))
    if tokens is None and not is_loopback(values["host"]):
        log.warning("everybody who can reach %s may use this endpoint (--insecure)", values["host"])
    if tokens is None and "*" in values["allow_origin"]:
        log.warning("every web page that a browser on this machine opens may use this endpoint (--allow-origin *)")


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. One on all addresses of IPv6 (`::`) listens on all those of IPv4 too.

    Raises:
        BadRequest: the address is taken, or is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and address[0] == ANY_IPV6 and socket.has_dualstack_ipv6()
        bound = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, UnicodeError) as reason:
        remedy = "choose another --host or --port"
        if ":" in host and getattr(reason, "errno", None) in _NO_SUCH_FAMILY:
            remedy = "if this machine has no IPv6, listen on --host 0.0.0.0 or 127.0.0.1"
        # Python says the address again behind the system's words.
        why = (getattr(reason, "strerror", None) or str(reason)).partition(" (while")[0]
        raise BadRequest(f"cannot listen on {host} port {port} ({why}); {remedy}") from None
    # Connections inherit the option. asyncio sets it only on sockets that name TCP as their protocol, which this one
    # does not. Without it the second part of an answer waits 40 ms for the client to acknowledge the first.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def url_of(bound: socket.socket) -> str:
    """Return a URL that leads to a listening socket; on this machine, if the socket listens on all addresses."""
    host, port = bound.getsockname()[:2]
    host = _OWN_ADDRESSES.get(host, host).replace("%", "%25")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
