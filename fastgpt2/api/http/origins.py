"""The web pages that may use the endpoint: its own one, and those of the origins that the operator allows (CORS).

A browser says of each request of a page from where that page is, its origin, and asks before it sends what no form
could send (a preflight). It shows a page the answers of another site only if these allow that. Source: WHATWG Fetch,
3.2 and 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgpt2.api.http.headers import values_of
from fastgpt2.errors import FastGPT2Error, ForbiddenOrigin

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"

# How long a browser may go by the answer to a preflight: long enough that a page which sends one request after the
# other asks once, short enough that a new --allow-origin counts soon.
PREFLIGHT_SECONDS = 600

# They change nothing, and pages from elsewhere cannot read their answers.
_HARMLESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """Which pages may use the endpoint.

    Args:
        allowed: the origins of `--allow-origin`.
        public: the origin of the endpoint's own page where a proxy shows it; None if nobody has told.
    """

    def __init__(self, allowed: Collection[str] = (), public: str | None = None) -> None:
        self.allowed = frozenset(origin.lower() for origin in allowed)
        self._public = public

    def is_allowed(self, origin: str) -> bool:
        """Tell whether pages of this origin may use the endpoint, and read its answers."""
        return ANY in self.allowed or origin.lower() in self.allowed

    def is_own(self, origin: str, host: str) -> bool:
        """Tell whether this is the origin of the endpoint's own page; `host` is what the request calls the endpoint.

        Pages of other schemes, such as `app://localhost` of a program with a browser in it, are not the endpoint's.
        """
        origin = origin.lower()
        scheme, _, name = origin.partition("://")
        if origin == self._public or scheme not in _DEFAULT_PORTS:
            return origin == self._public
        return bool(name) and name == host.lower().removesuffix(_DEFAULT_PORTS[scheme])


class SharedAnswers:
    """Middleware by whose headers browsers let pages of the allowed origins read answers, errors and streams too.

    It stands around everything, also around what answers an unforeseen error: without these headers a page sees no more
    of an error than that there was one.
    """

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app, self._origins = app, origins
        # What differs by the origin must not be kept by a cache for another one.
        self._varies = [] if ANY in origins.allowed else [(b"vary", b"Origin")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._origins.allowed:
            await self._app(scope, receive, send)
            return
        headers = self._headers_for(origin_of(scope))

        async def send_shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self._app(scope, receive, send_shared)

    def _headers_for(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None or not self._origins.is_allowed(origin):
            return self._varies
        told = ANY if ANY in self._origins.allowed else origin
        # Cookies count for nothing here, so none are asked for. Then * stands for all headers of an answer.
        return [
            (b"access-control-allow-origin", told.encode("latin-1")),
            (b"access-control-expose-headers", b"*"),
            *self._varies,
        ]


class OriginCheck:
    """Middleware that answers preflights, and refuses what pages from elsewhere want to have done.

    Args:
        asks_token: whether every request must bear a token. Whoever sends it may ask from anywhere: a browser adds none
            by itself, as it does with cookies, so a page from elsewhere that has no token can do nothing.
        refuse: makes the response for an error.
    """

    def __init__(
        self, app: ASGIApp, origins: Origins, asks_token: bool, refuse: Callable[[FastGPT2Error, Scope], ASGIApp]
    ) -> None:
        self._app, self._origins, self._asks_token, self._refuse = app, origins, asks_token, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = origin_of(scope) if scope["type"] == "http" else None
        answer = self._app if origin is None else self._answer(origin, scope)
        await answer(scope, receive, send)

    def _answer(self, origin: str, scope: Scope) -> ASGIApp:
        """Return what answers a request of a page."""
        if scope["method"] == "OPTIONS" and values_of(scope["headers"], b"access-control-request-method"):
            return _allow if self._origins.is_allowed(origin) else self._refuse(_objection(origin, scope), scope)
        if self._asks_token or scope["method"] in _HARMLESS_METHODS or self._origins.is_allowed(origin):
            return self._app
        if self._origins.is_own(origin, _host_of(scope)):
            return self._app
        return self._refuse(_objection(origin, scope), scope)


async def _allow(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer a preflight of an allowed page, which needs no token: what it wants to send may be sent.

    `SharedAnswers` adds for whom. A method that the route does not take is a 405 afterwards, which the page can read.
    """
    asked = {
        b"access-control-allow-methods": b"access-control-request-method",
        b"access-control-allow-headers": b"access-control-request-headers",
        b"access-control-allow-private-network": b"access-control-request-private-network",
    }
    headers = [(name, value) for name, request in asked.items() for value in values_of(scope["headers"], request)]
    headers += [
        (b"access-control-max-age", str(PREFLIGHT_SECONDS).encode()),
        (b"vary", b"Access-Control-Request-Method, Access-Control-Request-Headers"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _objection(origin: str, scope: Scope) -> ForbiddenOrigin:
    shown, host = repr(origin[:100]), _host_of(scope)[:100]
    return ForbiddenOrigin(
        f"pages of {shown} may not use this endpoint, which is asked by the name {host!r}: let them by --allow-origin "
        "ORIGIN; or, if a proxy shows the endpoint there, tell it so by --public-url URL"
    )


def origin_of(scope: Scope) -> str | None:
    """Return the origin of the page that sends a request; None if no page does.

    Of several such headers, which no browser sends, comes what is no origin.
    """
    values = values_of(scope["headers"], b"origin")
    return ", ".join(value.decode("latin-1") for value in values) if values else None


def _host_of(scope: Scope) -> str:
    return b"".join(values_of(scope["headers"], b"host")).decode("latin-1")
