"""Who may use the HTTP endpoint: a bearer token, and without one this machine only."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2 import settings
from fastgpt2.errors import BadRequest, FastGPT2Error, ForbiddenOrigin, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 1024
# Probes have no token. None of these tells more than that this process answers and whether the pool serves.
_OPEN = frozenset((method, path) for method in ("GET", "HEAD") for path in ("/", "/health", "/ready"))


def read_token(file: str | None) -> str | None:
    """The token of `FASTGPT2_TOKEN`, or of the first line of a file; None if there is neither.

    There is no option for it: the arguments of a process can be read by every user of the machine.

    Raises:
        BadRequest: both are given, the file cannot be read, or it is no token; the message does not quote it.
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
    """Whether only this machine can reach what is bound to an address or a name.

    Raises:
        BadRequest: a name that nobody knows.
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


def refuse_exposure(host: str, token: str | None, insecure: bool) -> None:
    """Raise BadRequest where everybody who reaches the machine could use the endpoint, and nobody said so."""
    if token is None and not insecure and not is_loopback(host):
        raise BadRequest(
            f"{host} can be reached from other machines, and there is no token: set FASTGPT2_TOKEN or --token-file, "
            "bind to 127.0.0.1, or say --insecure if something else keeps strangers out"
        )


class Access:
    """ASGI middleware that refuses a request before its body is read.

    Args:
        token: what every request must bear, those for the page's frame and of probes apart.
        local: without a token, the name or address of this machine that it is asked by; None if any name will do. Only
            requests to that name, or another of this machine's, are then served: a web page could have its own name
            lead here (DNS rebinding), and would pass for one of ours.
        refuse: makes the answer of an error.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, local: str | None, refuse: Callable[[FastGPT2Error, Scope], ASGIApp]
    ) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode("ascii")
        self._own_names = None if local is None else {local.lower(), "localhost", socket.gethostname().lower()}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._objection(scope) if scope["type"] == "http" else None
        await (self._app if error is None else self._refuse(error, scope))(scope, receive, send)

    def _objection(self, scope: Scope) -> FastGPT2Error | None:
        if (scope["method"], scope["path"]) in _OPEN:
            return None
        if self._expected is not None:
            return (
                None
                if self._bears_token(scope)
                else Unauthorized("this endpoint asks for a token: send Authorization: Bearer TOKEN")
            )
        host = _only(scope, b"host").decode("latin-1")
        if self._own_names is not None and not _is_host_of(host, self._own_names):
            return ForbiddenOrigin(
                f"this endpoint serves its own machine only, and {host[:100]!r} is not its name: ask 127.0.0.1 or "
                "localhost, or start it with a token or another --host-name"
            )
        return None

    def _bears_token(self, scope: Scope) -> bool:
        assert self._expected is not None
        given = _only(scope, b"authorization")
        scheme, _, token = given.partition(b" ")
        # The scheme is case-insensitive (RFC 9110, 11.1). All of the token is compared, however early it differs.
        return hmac.compare_digest(scheme.capitalize() + b" " + token.strip(), self._expected)


def _only(scope: Any, name: bytes) -> bytes:
    """The value of a header; nothing if it is not there or there twice."""
    values: list[bytes] = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else b""


def _is_host_of(host: str, names: set[str]) -> bool:
    """Whether a Host header, with or without a port, has one of the names or a loopback address."""
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", host)
    if found is None:
        return False
    name = (found[1] or found[2]).lower()
    return name in names or _is_loopback_address(name)
