"""Connections to Redis, and its errors in words that a person understands. No message holds a password."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest, FastGPT2Error, QueueUnavailable, RedisAccessDenied, RedisUnfit

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

CONNECT_SECONDS = 5.0

# Longer than any blocking command here waits (readers for two seconds). A Redis that is silent for this long is away.
SOCKET_SECONDS = 5.0

# The moment on the monotonic clock until which the caller wants the answer, where that comes before `SOCKET_SECONDS`.
ANSWER_BY: ContextVar[float] = ContextVar("ANSWER_BY", default=math.inf)

# Everybody who waits for a result holds a connection. redis-py's own limit is 100, that of Redis 10,000.
MAX_CONNECTIONS = 2000
_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": CONNECT_SECONDS,
    "socket_timeout": SOCKET_SECONDS,
    "health_check_interval": 30,
    "max_connections": MAX_CONNECTIONS,
}


def connect(url: str) -> Redis:
    """Return a connection pool; nothing is sent yet.

    The library repeats no command by itself: a repeated LMOVE or RPUSH would take or add a job twice.

    Raises:
        BadRequest: the URL cannot be used.
    """
    from redis import Connection, ConnectionPool, Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from fastgpt2.protocol.redis_url import read_url
    from fastgpt2.protocol.server_check import greeted

    with _url_errors():
        found, sentinels = read_url(url)
        arguments = {**_OPTIONS, "retry": Retry(NoBackoff(), 0), **found}
        if sentinels is not None:
            from fastgpt2.protocol.sentinel import connect_by_sentinel

            client = connect_by_sentinel(sentinels, arguments, _keep_to_deadline)
        else:
            kind: Any = greeted(arguments.pop("connection_class", Connection))
            kind = _keep_to_deadline(kind)
            client = Redis.from_pool(ConnectionPool(kind, **arguments))
        client.connection_pool.make_connection()
    return client


@cache
def _keep_to_deadline(kind: type[Any]) -> type[Any]:
    """Return a subclass of this kind of connection that waits for no answer beyond `ANSWER_BY`.

    As without it, a connection closes itself when the time is over.
    """

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        left = ANSWER_BY.get() - time.monotonic()
        sock = self._sock
        if sock is None or left >= (self.socket_timeout or math.inf):
            return kind.read_response(self, *args, **kwargs)
        sock.settimeout(max(0.01, left))
        try:
            return kind.read_response(self, *args, **kwargs)
        finally:
            if self._sock is sock:
                sock.settimeout(self.socket_timeout)

    return type(f"Bounded{kind.__name__}", (kind,), {"read_response": read_response})


def connect_async(url: str) -> AsyncRedis:
    """Return a connection pool for asyncio, whose commands may be sent twice: one that fails is tried once more.

    After a restart of Redis a connection is dead without knowing, and the first command on it would fail. The scripts
    that enqueue and cancel a job may be repeated.

    Raises:
        BadRequest: the URL cannot be used.
    """
    from redis.asyncio import Connection, ConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from fastgpt2.protocol.redis_url import read_url
    from fastgpt2.protocol.server_check import greeted_async

    with _url_errors():
        found, sentinels = read_url(url)
        arguments = {**_OPTIONS, "retry": Retry(NoBackoff(), 1), **found}
        if sentinels is not None:
            from fastgpt2.protocol.sentinel import connect_by_sentinel_async

            client = connect_by_sentinel_async(sentinels, arguments)
        else:
            kind: Any = greeted_async(arguments.pop("connection_class", Connection))
            client = Redis.from_pool(ConnectionPool(kind, **arguments))
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client


@contextmanager
def _url_errors() -> Iterator[None]:
    """Replace what the library says of a URL, as that may quote the password in it."""
    try:
        yield
    except FastGPT2Error:
        raise
    except (ValueError, TypeError):
        raise BadRequest(
            "the Redis URL cannot be used; write redis://[user:password@]host:port/0, rediss://..., unix:///path or "
            "redis+sentinel://[user:password@]host:26379,host:26379/MASTER/0, "
            "percent-encode the characters / # ? @ [ ] of a password or give ?password_file=/path in its place"
        ) from None


def without_password(url: str) -> str:
    """Return the URL as it may be shown: without user, password and options."""
    scheme, _, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    place = place.partition("?")[0]
    return f"{scheme}://{'***@' if at and user else ''}{place}"


def holds_secret(url: str) -> bool:
    """Tell whether a URL that can be used has a password in it, so that it must not be shown as it is."""
    parts = url.partition("://")[2].partition("?")
    user = parts[0].rpartition("@")[0]
    return ":" in user or any(option.partition("=")[0].endswith("password") for option in parts[2].split("&"))


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn errors of the redis library into a QueueUnavailable that names the server and the remedy."""
    from redis.exceptions import RedisError

    try:
        yield
    except FastGPT2Error:  # ResultTimeout is an OSError too
        raise
    except (RedisError, OSError) as reason:
        raise in_words(url, reason) from None


def in_words(url: str, reason: Exception) -> QueueUnavailable:
    """Return the error that a person should see for one of the library's; RedisUnfit if waiting cannot help."""
    from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError

    from fastgpt2.protocol.server_check import ServerUnfit

    # Redis quotes an unknown command with its arguments, which may be a prompt.
    where, text = f"Redis at {without_password(url)}", str(reason).partition(", with args")[0]
    if isinstance(reason, ServerUnfit):
        return RedisUnfit(f"{where} cannot serve: {text}")
    is_denial = isinstance(reason, AuthenticationError | AuthorizationError | NoPermissionError)
    denials = ("NOAUTH", "WRONGPASS", "NOPERM", "Authentication required", "ACL failure in script")
    if is_denial or any(word in text for word in denials):
        return RedisAccessDenied(
            f"{where} denied access ({text}); check the user and password in FASTGPT2_REDIS_URL, and the user's rights "
            "(deploy/redis.acl lists them)"
        )
    if text.startswith("the Sentinels deny access"):
        return RedisAccessDenied(
            f"{where}: {text}; check sentinel_user and sentinel_password_file in FASTGPT2_REDIS_URL, and that they "
            "allow SENTINEL MASTERS"
        )
    unfit = _remedy(text, _UNFIT)
    if unfit is not None:
        return RedisUnfit(f"{where} cannot serve ({text}); {unfit}")
    remedy = _remedy(text, _REMEDIES)
    if remedy == _NO_ANSWER and url.startswith("rediss"):
        remedy += ", and whether it speaks TLS on that port"
    return QueueUnavailable(f"{where} cannot be used ({type(reason).__name__}: {text}); {remedy or _way_out(url)}")


def _way_out(url: str) -> str:
    """Return what to do about a Redis that is not there."""
    if "+sentinel:" in url:
        return "wait until a replica is promoted, or let the Sentinels name an address that can be reached from here"
    if os.environ.get("FASTGPT2_REDIS_URL") == url:  # perhaps left in the shell from another day
        return f"FASTGPT2_REDIS_URL names it: start it, or mend or unset the variable; {UP_STARTS_ONE}"
    return f"start it, or name another one in FASTGPT2_REDIS_URL; {UP_STARTS_ONE}"


def _remedy(text: str, remedies: Iterable[tuple[tuple[str, ...], str]]) -> str | None:
    return next((remedy for words, remedy in remedies if any(word in text for word in words)), None)


UP_STARTS_ONE = "`fastgpt2 up` starts a Redis with workers"
_NO_ANSWER = "it does not answer: check whether it hangs, or a firewall drops what is sent"

CLUSTER_REFUSED = (
    "it is a Cluster, where the keys of one job would lie on several nodes: use a single Redis, or one that Sentinels "
    "watch (redis+sentinel://)"
)

# Words in an error of Redis or of the library that waiting does not mend, and what helps.
_UNFIT = (
    (
        ("CROSSSLOT", "MOVED ", "SELECT is not allowed in cluster", "CLUSTERDOWN"),
        CLUSTER_REFUSED,
    ),
    (
        ("DB index is out of range", "invalid DB index"),
        "it has no database of this number: write a smaller one in the URL, or raise its setting `databases`",
    ),
    (("unknown command", "Unknown Redis command"), "Redis 6.2 or newer is needed, or valkey, with no command disabled"),
    (
        ("the Sentinels know no master",),
        "write the name that follows `sentinel monitor` in their configuration",
    ),
    (("the URL names no Sentinel",), "write redis://host:port/0 for it, or name the Sentinels' port, which is 26379"),
)

# The same for what passes.
_REMEDIES = (
    (("CERTIFICATE_VERIFY_FAILED", "certificate verify failed"), "name its authority: rediss://...?ssl_ca_certs=FILE"),
    (("SSL", "WRONG_VERSION_NUMBER"), "it may not speak TLS there: use redis:// instead of rediss://, or another port"),
    (("no Sentinel names a live master",), "wait until a replica is promoted, or start its servers and Sentinels"),
    (("NOREPLICAS",), "too few replicas follow it: start them, or lower its min-replicas-to-write"),
    (("maxmemory",), "its memory is full: raise maxmemory, or wait until results expire"),
    (("read only replica", "READONLY"), "it is a replica: name the primary in FASTGPT2_REDIS_URL"),
    (
        ("WRONGTYPE",),
        "another program has written to a key of the queue or the job: delete that key, or take other names",
    ),
    (("loading the dataset",), "it has just started: wait until it has read its data"),
    (("MISCONF",), "it cannot save its data: make room on its disk"),
    (("Too many connections",), "this program uses all that its URL allows: raise max_connections there"),
    (("max number of clients",), "it has too many clients: raise its maxclients"),
    (("Timeout", "timed out"), _NO_ANSWER),
)


def address_of(connection: Redis) -> str:
    """Return where a connection leads, as a URL without secrets."""
    sentinels = getattr(connection.connection_pool, "sentinel_manager", None)
    if sentinels is not None:
        shown: str = sentinels.group.shown
        return shown
    kwargs = connection.connection_pool.connection_kwargs
    if "path" in kwargs:
        return f"unix://{kwargs['path']}"
    return f"redis://{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}/{kwargs.get('db', 0)}"
