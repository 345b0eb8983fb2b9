"""The options after the ? of a Redis URL: those that may be used, and why not the others.

redis-py takes every argument of its connections from there, with few checks. Some of them change what is read (text for
bytes), or repeat a command that took a job; others are found wrong only when a connection is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from fastgpt2.errors import BadRequest

# A blocking read waits for two seconds. A shorter patience would take it for a Redis that is away.
SHORTEST_TIMEOUT_SECONDS = 3.0
LONGEST_TIMEOUT_SECONDS = 600.0

# What a busy client or worker needs at once; the endpoint needs one for each request that waits.
FEWEST_CONNECTIONS = 16

_YES_OR_NO = ("true", "false", "yes", "no", "1", "0")

Check = Callable[[str], str | None]


def _number(low: float, high: float, whole: bool = True) -> Check:
    """Return a check that tells what the number should be, or None if it is right."""
    shape = r"[0-9]{1,9}" if whole else r"[0-9]{1,9}(\.[0-9]{1,9})?"

    def check(text: str) -> str | None:
        if re.fullmatch(shape, text) and low <= float(text) <= high:
            return None
        return f"takes a {'whole ' if whole else ''}number from {low:g} to {high:g}"

    return check


def _one_of(*values: str) -> Check:
    def check(text: str) -> str | None:
        return None if text.lower() in values else f"takes {', '.join(values[:-1])} or {values[-1]}"

    return check


def _cert_reqs(text: str) -> str | None:
    if text in ("none", "optional", "required"):
        return None
    return "takes none, optional or required (Python's CERT_NONE is none)"


def _readable(text: str) -> str | None:
    return None if os.access(text, os.R_OK) else "names a file or folder that cannot be read"


def _client_name(text: str) -> str | None:
    return None if re.fullmatch(r"[!-~]{1,100}", text) else "takes 1 to 100 characters of ASCII without spaces"


def _anything(_text: str) -> str | None:
    return None


_OF_ALL: dict[str, Check] = {
    "db": _number(0, 999_999),
    "username": _anything,
    "password": _anything,
    "password_file": _anything,  # looked at by `fastgpt2.protocol.password_file`
    "socket_timeout": _number(SHORTEST_TIMEOUT_SECONDS, LONGEST_TIMEOUT_SECONDS, whole=False),
    "socket_connect_timeout": _number(0.1, LONGEST_TIMEOUT_SECONDS, whole=False),
    "health_check_interval": _number(0, 3600),
    "max_connections": _number(FEWEST_CONNECTIONS, 1_000_000),
    "client_name": _client_name,
    "protocol": _one_of("2", "3"),
}
_OF_TCP: dict[str, Check] = {"socket_keepalive": _one_of(*_YES_OR_NO)}
_OF_TLS: dict[str, Check] = {
    "ssl_ca_certs": _readable,
    "ssl_ca_path": _readable,
    "ssl_certfile": _readable,
    "ssl_keyfile": _readable,
    "ssl_password": _anything,
    "ssl_cert_reqs": _cert_reqs,
    "ssl_check_hostname": _one_of(*_YES_OR_NO),
    "ssl_min_version": _one_of("771", "772"),
    "ssl_ciphers": _anything,
}

# redis-py knows these; here they would do harm, or nothing.
_REFUSED = {
    "decode_responses": "replies are read as bytes; leave it out",
    "encoding": "text is UTF-8; leave it out",
    "encoding_errors": "text is UTF-8; leave it out",
    "retry": "a repeated command would take or add a job twice; leave it out",
    "retry_on_timeout": "a repeated command would take or add a job twice; leave it out",
    "retry_on_error": "a repeated command would take or add a job twice; leave it out",
    "socket_read_size": "leave it out",
    "socket_keepalive_options": "write socket_keepalive=yes",
    "socket_type": "write a host's IPv4 address, or its IPv6 address in brackets",
    "single_connection_client": "threads need connections of their own; leave it out",
    "legacy_responses": "replies have the form that the library gives them; leave it out",
    "parser_class": "leave it out",
    "lib_name": "write client_name",
    "lib_version": "write client_name",
    "ssl_validate_ocsp": "write ssl_ca_certs",
    "ssl_validate_ocsp_stapled": "write ssl_ca_certs",
    "ssl_ca_data": "write ssl_ca_certs, with a file",
    "connection_class": "write rediss:// for TLS, and unix:///path for a socket",
    "ssl": "write rediss:// for TLS",
    "host": "write it before the path: redis://host:port/0",
    "port": "write it before the path: redis://host:port/0",
    "path": "write unix:///path for a socket",
    "timeout": "write socket_timeout",
    "sentinel_user": "write redis+sentinel://host:26379/MASTER/0 to name Sentinels",
    "sentinel_password": "write redis+sentinel://host:26379/MASTER/0 to name Sentinels",
    "sentinel_password_file": "write redis+sentinel://host:26379/MASTER/0 to name Sentinels",
}


def check_options(scheme: str, options: Sequence[tuple[str, str]], quotable: bool) -> None:
    """Refuse what may not be used.

    Args:
        scheme: of the URL: redis, rediss or unix.
        quotable: whether a value may appear in a message. What follows a ? that was not percent-encoded in a password
            may not.

    Raises:
        BadRequest: there is such an option, or one twice, or with a value that it cannot have.
    """
    known = {**_OF_ALL, **(_OF_TCP if scheme != "unix" else {}), **(_OF_TLS if scheme == "rediss" else {})}
    seen = set()
    for name, value in options:
        if name in _REFUSED:
            raise BadRequest(f"the Redis URL cannot have the option {name}: {_REFUSED[name]}")
        if name in _OF_TLS and name not in known:
            raise BadRequest(f"the Redis URL has the option {name}, which is for TLS; write rediss:// to use TLS")
        if name not in known:  # perhaps the end of a password, which is not to be shown
            near = get_close_matches(name, known, 1, 0.8)
            meant = f"perhaps {near[0]} was meant, " if near else ""
            raise BadRequest(
                f"the Redis URL cannot be used: it has an option that is not known; {meant}known are {', '.join(known)}"
            )
        if name in seen:
            raise BadRequest(f"the Redis URL has the option {name} twice; leave one of them out")
        seen.add(name)
        wrong = known[name](value)
        if wrong is not None:
            shown = f"={value}" if quotable and re.fullmatch(r"[\w./-]{0,80}", value) else ""
            raise BadRequest(f"the Redis URL has the option {name}{shown}, which cannot be: {name} {wrong}")
