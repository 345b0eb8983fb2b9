"""The check of who may use the HTTP endpoint: whoever has the token, and without a token this machine only."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastgpt2.api.http.headers import single_value, values_of
from fastgpt2.errors import BadRequest, FastGPT2Error, ForbiddenOrigin, TokenMissing, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from fastgpt2.api.http.tokens import Token, Tokens

# In the state of a request's scope: the token that it bears, if that has a name; and the headers that its answer gets,
# which tell of the token's limits.
TOKEN_STATE = "token"
LIMITS_STATE = "token_limits"

# Probes have no token, and neither has a browser that is led to a page. These routes tell that this process answers and
# whether the pool serves, and what every endpoint of this version tells: its page's frame, and which routes it has.
_OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")
OPEN_ROUTES = frozenset((method, path) for method in ("GET", "HEAD") for path in _OPEN_PATHS)


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


def refuse_exposure(host: str, has_tokens: bool, insecure: bool) -> None:
    """Raise BadRequest if everybody who reaches the machine could use the endpoint, unless `insecure` allows it."""
    if not has_tokens and not insecure and not is_loopback(host):
        raise BadRequest(
            f"{host} can be reached from other machines, and there is no token: set FASTGPT2_TOKEN or --token-file, "
            "listen on --host 127.0.0.1, or give --insecure if something else keeps strangers out"
        )


class Access:
    """Middleware that refuses a request before its body is read, and counts those of each token that has a name.

    Args:
        tokens: every request must bear one of them, except those for the page's frame and those of probes. None if
            there are none.
        names: where there is no token, the names and addresses by which this machine is asked; None if any name will
            do. Only requests to these names, or to another of this machine's names, are then served. Otherwise a web
            page could have its own name lead here (DNS rebinding), and would pass for the endpoint's own page.
        refuse: makes the response for an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens | None,
        names: Collection[str] | None,
        refuse: Callable[[FastGPT2Error, Scope], ASGIApp],
    ) -> None:
        self._app = app
        self._tokens = tokens
        own_names = ("localhost", socket.gethostname())
        self._own_names = None if names is None else {name.lower() for name in (*names, *own_names)}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            token = self._admit(scope)
        except FastGPT2Error as error:
            await self._refuse(error, scope)(scope, receive, send)
            return
        if token is not None and token.name is not None:
            assert self._tokens is not None
            scope.setdefault("state", {})[TOKEN_STATE] = token
            scope.setdefault("log_fields", {})["token"] = token.name
            send = _CountedAnswer(scope, send, token.name, self._tokens).send
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Token | None:
        """Return the token that a request bears; None if it needs none.

        Raises:
            Unauthorized: it bears none of these.
            ForbiddenOrigin: there are none, and it was made to another machine by name.
        """
        if (scope["method"], scope["path"]) in OPEN_ROUTES:
            return None
        if self._tokens is not None:
            return _find_token(scope, self._tokens)
        host = single_value(scope["headers"], b"host")
        if self._own_names is not None and not _is_host_of(host, self._own_names):
            raise ForbiddenOrigin(
                f"this endpoint serves its own machine only, and {host[:100]!r} is not its name: ask 127.0.0.1 or "
                "localhost, or start it with a token or another --host-name"
            )
        return None


class _CountedAnswer:
    """The answer to a request that bears a token with a name: it is counted, and tells of the token's limits."""

    def __init__(self, scope: Scope, send: Send, name: str, tokens: Tokens) -> None:
        self._scope, self._send, self._name, self._tokens = scope, send, name, tokens

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._tokens.requests[self._name, message["status"]] += 1
            limits: dict[str, str] = self._scope["state"].get(LIMITS_STATE, {})
            told = [(name.encode(), value.encode()) for name, value in limits.items()]
            message = {**message, "headers": [*message.get("headers", ()), *told]}
        await self._send(message)


def _find_token(scope: Scope, tokens: Tokens) -> Token:
    """Return the token that a request bears.

    Of what was sent nothing is quoted. Every wrong token is told the same, after the same time: whoever guesses learns
    nothing from how near a guess came.

    Raises:
        TokenMissing: it bears none, or more than one.
        Unauthorized: it is none of these.
    """
    send = "send the header Authorization: Bearer TOKEN"
    values = values_of(scope["headers"], b"authorization")
    if not values:
        raise TokenMissing(f"this endpoint asks for a token: {send}")
    if len(values) > 1:
        raise TokenMissing(f"the request has {len(values)} Authorization headers; leave one: {send}")
    scheme, _, presented = values[0].strip().partition(b" ")
    # The scheme is case-insensitive (RFC 9110, 11.1).
    if scheme.lower() != b"bearer":
        raise TokenMissing(f"the Authorization header does not begin with Bearer: {send}")
    if not presented:
        raise TokenMissing(f"no token follows Bearer in the Authorization header: {send}")
    token = tokens.find(presented.strip())
    if token is None:
        raise Unauthorized(
            "the token is not the one of this endpoint: send the one of its FASTGPT2_TOKEN or --token-file"
            if len(tokens) == 1
            else "the token is none of this endpoint's: send one of those of its --token-file"
        )
    return token


def _is_host_of(host: str, names: set[str]) -> bool:
    """Tell whether a Host header, with or without a port, holds one of the names or a loopback address."""
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", host)
    if found is None:
        return False
    name = (found[1] or found[2]).lower()
    return name in names or _is_loopback_address(name)
