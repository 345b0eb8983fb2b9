"""What a Redis URL says: which server, or which master that Sentinels know, and with which options.

Besides redis-py's own forms this knows `redis+sentinel://[user:password@]host:port,host:port/MASTER[/DB]`, and
`rediss+sentinel://`: user and password are the master's, the hosts are those of Sentinels, which say where it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from fastgpt2.errors import BadRequest
from fastgpt2.protocol.password_file import PasswordFile, without_password_file
from fastgpt2.protocol.redis_options import check_options

SENTINEL_PORT = 26379
MAX_SENTINELS = 32

_SENTINEL_URL = re.compile(
    r"(rediss?)\+sentinel://(?:(?P<user>[^/?#]*)@)?(?P<hosts>[^/?#@]*)/?(?P<master>[^/?#]*)(?:/(?P<db>[^/?#]*))?"
    r"(?:\?(?P<options>[^#]*))?"
)
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+(?:%25[\w.-]+)?)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")
_SENTINEL_OPTIONS = ("sentinel_user", "sentinel_password", "sentinel_password_file")
_SENTINEL_FORM = "redis+sentinel://[user:password@]host:26379,host:26379/MASTER[/0]"


@dataclass(frozen=True)
class SentinelGroup:
    """The Sentinels that a URL names, and the master that they are asked for.

    Attributes:
        places: the host and the port of each.
        options: redis-py's arguments for connections to them.
        shown: all of it as a URL without secrets.
    """

    places: tuple[tuple[str, int], ...]
    master: str
    options: dict[str, Any]
    shown: str


def read_url(url: str) -> tuple[dict[str, Any], SentinelGroup | None]:
    """Return redis-py's arguments for a pool of connections to the server, and the Sentinels that know the server.

    Raises:
        BadRequest: the URL has an option that cannot be used, more than one password or database, or a password file
            that cannot be read; or it names Sentinels in another form than the one above.
        ValueError: the text is no such URL.
    """
    if "+sentinel:" not in url.partition("//")[0]:
        return _read_plain_url(url), None
    found = _SENTINEL_URL.fullmatch(url)
    if found is None or not found["hosts"] or not found["master"] or not (found["db"] or "0").isdecimal():
        raise BadRequest(f"the Redis URL names Sentinels in a form that is not known; write {_SENTINEL_FORM}")
    options = parse_qsl(found["options"] or "", keep_blank_values=True)
    own = {name: value for name, value in options if name.startswith("sentinel_")}
    others = urlencode([(name, value) for name, value in options if name not in own])
    user = f"{found['user']}@" if found["user"] else ""
    arguments = _read_plain_url(f"{found[1]}://{user}master/{found['db'] or ''}{'?' + others if others else ''}")
    del arguments["host"]
    for_sentinels = {name: value for name, value in arguments.items() if name.startswith("ssl_")}
    if arguments.pop("connection_class", None) is not None:
        arguments["ssl"] = for_sentinels["ssl"] = True
    return arguments, SentinelGroup(
        _places(found["hosts"]),
        unquote(found["master"]),
        {**for_sentinels, **_sentinel_credentials(own)},
        f"{found[1]}+sentinel://{found['hosts']}/{found['master']}/{arguments.get('db', 0)}",
    )


def _read_plain_url(url: str) -> dict[str, Any]:
    from redis.connection import parse_url

    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    if parts.scheme not in ("redis", "rediss", "unix") or parts.fragment or parts.port == 0:
        raise ValueError
    # An @ in what looks like options is perhaps that before the host, and they are a password.
    check_options(parts.scheme, options, quotable="@" not in parts.query)
    given = dict(options)
    if (parts.username and "username" in given) or (parts.password and "password" in given):
        raise BadRequest("the Redis URL has more than one user or password; leave one of them out")
    if "password" in given and "password_file" in given:
        raise BadRequest(
            "the Redis URL has more than one password; name one password_file, or give a password, not both"
        )
    if "," in parts.netloc.rpartition("@")[2]:
        raise BadRequest(f"the Redis URL names several hosts; for those of Sentinels write {_SENTINEL_FORM}")
    if parts.scheme != "unix":
        path = parts.path.removeprefix("/").removesuffix("/")
        if path and not re.fullmatch(r"[0-9]{1,6}", path):
            raise BadRequest(
                "the Redis URL has a path that is no number of a database; write redis://[user:password@]host:port/0, "
                "and percent-encode the characters / # ? @ [ ] of a password"
            )
        if path and int(given.get("db", path)) != int(path):
            raise BadRequest(f"the Redis URL names two databases, {path} and db={given['db']}; leave one of them out")
    bare, credentials = without_password_file(url)
    arguments: dict[str, Any] = parse_url(bare)  # type: ignore[no-untyped-call]
    return {**credentials, **arguments}


def _places(hosts: str) -> tuple[tuple[str, int], ...]:
    places = []
    for text in hosts.split(","):
        found = _HOST.fullmatch(text)
        port = int(found["port"] or SENTINEL_PORT) if found else 0
        if found is None or not 0 < port < 65536:
            raise BadRequest(
                f"the Redis URL names a Sentinel {text[:80]!r}, which is no host:port; write {_SENTINEL_FORM}, an IPv6 "
                "address in brackets"
            )
        places.append((unquote(found["address"] or found["name"]), port))
    if len(places) > MAX_SENTINELS:
        raise BadRequest(f"the Redis URL names {len(places)} Sentinels; the limit is {MAX_SENTINELS}, 3 are enough")
    return tuple(places)


def _sentinel_credentials(options: dict[str, str]) -> dict[str, Any]:
    unknown = next((name for name in options if name not in _SENTINEL_OPTIONS), None)
    if unknown is not None:
        raise BadRequest(f"the Redis URL has an unknown option {unknown[:40]}; write {', '.join(_SENTINEL_OPTIONS)}")
    user, password = options.get("sentinel_user") or None, options.get("sentinel_password") or None
    file = options.get("sentinel_password_file")
    if file is None:
        if user and not password:
            raise BadRequest(
                "the Redis URL has a sentinel_user and no password for it; add sentinel_password_file=FILE"
            )
        return {"username": user, "password": password} if password else {}
    if password is not None:
        raise BadRequest(
            "the Redis URL has two passwords for the Sentinels; give sentinel_password_file or sentinel_password"
        )
    return {"credential_provider": PasswordFile(file, user, "sentinel_password_file")}
