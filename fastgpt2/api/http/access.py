"""The check of who may use the HTTP endpoint: whoever has the token, and without a token this machine only."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastgpt2 import settings
from fastgpt2.errors import BadRequest, FastGPT2Error, ForbiddenOrigin, TokenMissing, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Receive, Scope, Send

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 1024
# Probes have no token, and neither has a browser that is led to a page. These routes tell that this process answers and
# whether the pool serves, and what every endpoint of this version tells: its page's frame, and which routes it has.
_OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")
OPEN_ROUTES = frozenset((method, path) for method in ("GET", "HEAD") for path in _OPEN_PATHS)


def read_token(file: str | None) -> str | None:
    """Return the token of `FASTGPT2_TOKEN` or of the first line of a file; None if there is neither.

    No option holds a token, since every user of the machine can read the arguments of a process.

    Raises:
        BadRequest: both are given, the file cannot be read, or the text cannot be a token. The message does not quote
            the token.
    """
    token = settings.TOKEN.resolve()
    source = settings.TOKEN.variable
    if file is not None:
        if token is not None:
            raise BadRequest(f"{source} and --token-file are both given; leave one out")
        source = file
        try:
            with Path(file).open(encoding="ascii") as lines:
                token = lines.readline(MAX_TOKEN_CHARACTERS + 2).rstrip("\r\n")
        except OSError as reason:
            raise BadRequest(f"--token-file {file}: cannot be read ({reason.strerror})") from None
        except UnicodeDecodeError:
            token = ""
    if token is None:
        return None
    if not MIN_TOKEN_CHARACTERS <= len(token) <= MAX_TOKEN_CHARACTERS or not re.fullmatch(r"[!-~]+", token):
        raise BadRequest(
            f"the token of {source} must be {MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_CHARACTERS} visible ASCII characters; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a socket that is bound to this address or name.

    Raises:
        BadRequest: the name is unknown.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as reason:
        raise BadRequest(f"cannot listen on {host!r} ({reason}); choose another --host") from None
    return all(_is_loopback_address(str(address)) for address in found)


def _is_loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def names_to_serve(host: str, host_name: str | None, public_url: str | None) -> list[str] | None:
    """Return the names by which the endpoint may be asked without a token; None if any name will do.

    Args:
        host: where it listens.
    """
    listens_here_only = is_loopback(host)
    if host_name is None and not listens_here_only:
        return None
    public = urlsplit(public_url or "").hostname
    return [name for name in (host if listens_here_only else None, host_name, public) if name is not None]


def refuse_exposure(host: str, token: str | None, insecure: bool) -> None:
    """Raise BadRequest if everybody who reaches the machine could use the endpoint, unless `insecure` allows it."""
    if token is None and not insecure and not is_loopback(host):
        raise BadRequest(
            f"{host} can be reached from other machines, and there is no token: set FASTGPT2_TOKEN or --token-file, "
            "listen on --host 127.0.0.1, or give --insecure if something else keeps strangers out"
        )


class Access:
    """Middleware that refuses a request before its body is read.

    Args:
        token: the token that every request must bear, except those for the page's frame and those of probes.
        names: where there is no token, the names and addresses by which this machine is asked; None if any name will
            do. Only requests to these names, or to another of this machine's names, are then served. Otherwise a web
            page could have its own name lead here (DNS rebinding), and would pass for the endpoint's own page.
        refuse: makes the response for an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        names: Collection[str] | None,
        refuse: Callable[[FastGPT2Error, Scope], ASGIApp],
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode("ascii")
        own_names = ("localhost", socket.gethostname())
        self._own_names = None if names is None else {name.lower() for name in (*names, *own_names)}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._find_objection(scope) if scope["type"] == "http" else None
        answer = self._app if error is None else self._refuse(error, scope)
        await answer(scope, receive, send)

    def _find_objection(self, scope: Scope) -> FastGPT2Error | None:
        if (scope["method"], scope["path"]) in OPEN_ROUTES:
            return None
        if self._token is not None:
            return _find_fault(scope, self._token)
        host = _single_header(scope, b"host").decode("latin-1")
        if self._own_names is not None and not _is_host_of(host, self._own_names):
            return ForbiddenOrigin(
                f"this endpoint serves its own machine only, and {host[:100]!r} is not its name: ask 127.0.0.1 or "
                "localhost, or start it with a token or another --host-name"
            )
        return None


def _find_fault(scope: Scope, expected: bytes) -> Unauthorized | None:
    """Return what is wrong with a request's token; None if it is the expected one.

    Of what was sent nothing is quoted. Every wrong token is told the same, after the same time: whoever guesses learns
    nothing from how near a guess came.
    """
    send = "send the header Authorization: Bearer TOKEN"
    values = _header_values(scope, b"authorization")
    if not values:
        return TokenMissing(f"this endpoint asks for a token: {send}")
    if len(values) > 1:
        return TokenMissing(f"the request has {len(values)} Authorization headers; leave one: {send}")
    scheme, _, token = values[0].strip().partition(b" ")
    # The scheme is case-insensitive (RFC 9110, 11.1).
    if scheme.lower() != b"bearer":
        return TokenMissing(f"the Authorization header does not begin with Bearer: {send}")
    if not token:
        return TokenMissing(f"no token follows Bearer in the Authorization header: {send}")
    # The whole token is compared, however early a difference comes.
    if not hmac.compare_digest(token.strip(), expected):
        return Unauthorized(
            "the token is not the one of this endpoint: send the one of its FASTGPT2_TOKEN or --token-file"
        )
    return None


def _header_values(scope: Any, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _single_header(scope: Any, name: bytes) -> bytes:
    """Return the value of a header; nothing if the request has none of that name, or more than one."""
    values = _header_values(scope, name)
    return values[0] if len(values) == 1 else b""


def _is_host_of(host: str, names: set[str]) -> bool:
    """Tell whether a Host header, with or without a port, holds one of the names or a loopback address."""
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", host)
    if found is None:
        return False
    name = (found[1] or found[2]).lower()
    return name in names or _is_loopback_address(name)
