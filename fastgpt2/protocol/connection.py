"""Connections to Redis, and its errors in words. No password appears in any message."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest, FastGPT2Error, QueueUnavailable, RedisAccessDenied

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

CONNECT_SECONDS = 5.0

# Longer than any blocking command here waits (readers for two seconds). A Redis that says nothing for so long is away.
SOCKET_SECONDS = 5.0

# Until when, on the monotonic clock, whoever asks just now wants the answer, if sooner.
ANSWER_BY: ContextVar[float] = ContextVar("ANSWER_BY", default=math.inf)

# Whoever waits for a result holds a connection; redis-py's own limit is 100. Redis itself stops at 10,000.
MAX_CONNECTIONS = 2000


def connect(url: str) -> Redis:
    """A lazy connection pool: nothing is sent yet.

    No command is retried behind the caller's back: a repeated LMOVE or RPUSH takes or adds a job twice.

    Raises:
        BadRequest: not a Redis URL.
    """
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from fastgpt2.protocol.password_file import without_password_file

    with _url_errors():
        bare, credentials = without_password_file(url)
        client = Redis.from_url(bare, retry=Retry(NoBackoff(), 0), **_options(), **credentials)
        pool: Any = client.connection_pool
        pool.connection_class = _bounded(pool.connection_class)
        pool.make_connection()
    return client


@cache
def _bounded(kind: type[Any]) -> type[Any]:
    """The kind of connection that keeps to `ANSWER_BY`. It closes itself when the time is over, as ever."""

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        left = ANSWER_BY.get() - time.monotonic()
        sock = self._sock
        if sock is None or left >= SOCKET_SECONDS:
            return kind.read_response(self, *args, **kwargs)
        sock.settimeout(max(0.01, left))
        try:
            return kind.read_response(self, *args, **kwargs)
        finally:
            if self._sock is sock:
                sock.settimeout(self.socket_timeout)

    return type(f"Bounded{kind.__name__}", (kind,), {"read_response": read_response})


def connect_async(url: str) -> AsyncRedis:
    """A connection pool for asyncio, for what may be said twice: a command that fails is tried once more.

    So that the first one after a restart of Redis, on a connection that is dead without knowing, succeeds. The scripts
    that enqueue and cancel a job may be repeated.

    Raises:
        BadRequest: not a Redis URL.
    """
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from fastgpt2.protocol.password_file import without_password_file

    with _url_errors():
        bare, credentials = without_password_file(url)
        client = Redis.from_url(bare, retry=Retry(NoBackoff(), 1), **_options(), **credentials)
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    return client


def _options() -> dict[str, Any]:
    return {
        "socket_connect_timeout": CONNECT_SECONDS,
        "socket_timeout": SOCKET_SECONDS,
        "health_check_interval": 30,
        "max_connections": MAX_CONNECTIONS,
    }


@contextmanager
def _url_errors() -> Iterator[None]:
    """What the library says of a URL may quote the password in it, so its words are not passed on."""
    try:
        yield
    except FastGPT2Error:
        raise
    except (ValueError, TypeError):
        raise BadRequest(
            "the Redis URL cannot be used; it reads redis://[user:password@]host:port/0, rediss://... or unix:///path, "
            "with the characters / # ? @ [ ] of a password percent-encoded, perhaps ?password_file=/path in place of "
            "the password, and no options that redis-py does not know"
        ) from None


def without_password(url: str) -> str:
    """The URL as it may be shown: without user, password and options."""
    scheme, _, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    place = place.partition("?")[0]
    return f"{scheme}://{'***@' if at and user else ''}{place}"


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn what the redis library raises into a QueueUnavailable that names the server and the remedy."""
    from redis.exceptions import RedisError

    try:
        yield
    except FastGPT2Error:  # one of them, ResultTimeout, is an OSError too
        raise
    except (RedisError, OSError) as reason:
        raise in_words(url, reason) from None


def in_words(url: str, reason: Exception) -> QueueUnavailable:
    """The error that a person should see for one of the redis library's: RedisAccessDenied when waiting cannot help."""
    from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError

    where, text = f"Redis at {without_password(url)}", str(reason)
    denied = isinstance(reason, AuthenticationError | AuthorizationError | NoPermissionError)
    if denied or any(word in text for word in ("NOAUTH", "WRONGPASS", "NOPERM", "Authentication required")):
        return RedisAccessDenied(
            f"{where} denied access ({text}); check the user and password in FASTGPT2_REDIS_URL, and the user's rights"
        )
    remedy = next((remedy for words, remedy in _REMEDIES if any(word in text for word in words)), None)
    if remedy == _NO_ANSWER and url.startswith("rediss:"):
        remedy += ", and whether it speaks TLS on that port"
    return QueueUnavailable(
        f"{where} cannot be used ({type(reason).__name__}: {text}); {remedy or 'start it, or mend FASTGPT2_REDIS_URL'}"
    )


_NO_ANSWER = "it does not answer: see whether it hangs, or something between drops what is sent"

# What Redis, or the library, says; and what helps.
_REMEDIES = (
    (("maxmemory",), "its memory is full: raise maxmemory, or wait until results expire"),
    (("read only replica", "READONLY"), "it is a replica: name the primary in FASTGPT2_REDIS_URL"),
    (("loading the dataset",), "it has just started: wait until it has read its data"),
    (("MISCONF",), "it cannot save its data: make room on its disk"),
    (("max number of clients",), "it has too many clients: raise its maxclients"),
    (("CERTIFICATE_VERIFY_FAILED", "certificate verify failed"), "name its authority: rediss://...?ssl_ca_certs=FILE"),
    (("SSL", "WRONG_VERSION_NUMBER"), "it may not speak TLS there: redis:// instead of rediss://, or another port"),
    (("Timeout", "timed out"), _NO_ANSWER),
)


def address_of(connection: Redis) -> str:
    """Where a connection leads, as a URL without secrets."""
    kwargs = connection.connection_pool.connection_kwargs
    if "path" in kwargs:
        return f"unix://{kwargs['path']}"
    return f"redis://{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}/{kwargs.get('db', 0)}"
