"""Proxies in front of the endpoint: what those that are trusted say was asked for, and the path that they add."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastgpt2.api.http.headers import values_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from ipaddress import IPv4Address

    from starlette.types import ASGIApp, Receive, Scope, Send

    from fastgpt2.api.http.headers import Headers

# One pair of a `Forwarded` header, and the character behind it: a comma ends what one proxy says (RFC 7239, 4).
_PAIR = re.compile(r'\s*([\w!#$%&\'*+.^`|~-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s",;]*))\s*([,;]|$)')


class TrustedProxies:
    """Middleware that puts the host that was asked for in place of that by which a trusted proxy asks.

    Behind it nothing needs to know of proxies. What proxies that are not trusted say is passed over.

    Args:
        trusted: addresses and networks.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str]) -> None:
        self._app = app
        self._trusted = [ip_network(text) for text in trusted]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._trusted and scope["type"] == "http" and self._is_trusted((scope["client"] or ("",))[0]):
            host = self._find_host(scope["headers"])
            if host:
                kept = [(name, value) for name, value in scope["headers"] if name != b"host"]
                scope = {**scope, "headers": [(b"host", host.encode("latin-1")), *kept]}
        await self._app(scope, receive, send)

    def _find_host(self, headers: Headers) -> str:
        """Return the host that the farthest trusted proxy was asked for; empty if none tells."""
        said = list(_parse_forwarded(_joined(headers, b"forwarded")))
        if said:
            return self._farthest([one.get("for", "") for one in said], [one.get("host", "") for one in said])
        clients, hosts = (_items(headers, name) for name in (b"x-forwarded-for", b"x-forwarded-host"))
        host = self._farthest(clients, hosts)
        (port,) = _items(headers, b"x-forwarded-port")[-1:] or [""]
        has_port = re.search(r":\d*$", host) is not None
        return f"{host}:{port}" if host and port.isdecimal() and not has_port else host

    def _farthest(self, clients: list[str], hosts: list[str]) -> str:
        """Return the first host among those that trusted proxies have added.

        Args:
            clients: whom each proxy was asked by, the nearest proxy last. As long as these are proxies that are
                trusted, what they have added is believed too. Whatever stands before may be anybody's invention.
            hosts: what each was asked for.
        """
        believed = 1
        for client in reversed(clients):
            if not self._is_trusted(client):
                break
            believed += 1
        return next(filter(None, hosts[-believed:]), "")

    def _is_trusted(self, text: str) -> bool:
        address = _read_address(text)
        return address is not None and any(address in network for network in self._trusted)


def _read_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an address that may have a port behind it, such as 192.0.2.1:80 or [::1]:80; None if it is a name."""
    found = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*):\d*", text)
    try:
        address = ip_address((found[1] or found[2] or "") if found else text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _parse_forwarded(text: str) -> Iterator[dict[str, str]]:
    """Yield what each proxy says in a `Forwarded` header, up to what cannot be read."""
    said: dict[str, str] = {}
    at = 0
    while at < len(text) and (pair := _PAIR.match(text, at)) is not None:
        quoted, plain = pair[2], pair[3]
        said[pair[1].lower()] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        at = pair.end()
        if pair[4] != ";":
            yield said
            said = {}


def _joined(headers: Headers, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for value in values_of(headers, name))


def _items(headers: Headers, name: bytes) -> list[str]:
    return [part.strip() for part in _joined(headers, name).split(",") if part.strip()]


class PublicPath:
    """Middleware that takes the path of `--public-url` off the front of requests, where the proxy has left it on.

    Args:
        prefix: that path, without a slash at its end; empty if there is none.
        routes: the paths of routes. What is one of them as it stands is left as it is.
    """

    def __init__(self, app: ASGIApp, prefix: str, routes: Collection[str]) -> None:
        self._app, self._prefix, self._routes = app, prefix.encode("ascii"), routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: bytes = scope.get("raw_path", b"") if self._prefix and scope["type"] == "http" else b""
        is_below = bool(path) and (path + b"/").startswith(self._prefix + b"/")
        if not is_below or scope["path"] in self._routes:
            await self._app(scope, receive, send)
        elif path == self._prefix and scope["method"] in ("GET", "HEAD"):
            # The page asks for what stands beside it, so its own path must end with a slash.
            await send({"type": "http.response.start", "status": 308, "headers": [(b"location", path + b"/")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            inner = path[len(self._prefix) :] or b"/"
            await self._app({**scope, "raw_path": inner, "path": unquote(inner.decode("ascii"))}, receive, send)
