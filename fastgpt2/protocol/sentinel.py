"""Connections to the master that Sentinels name, by redis-py's own Sentinel.

For each new connection the Sentinels are asked where the master is. What redis-py leaves open is added here: a Sentinel
that hangs is given up after a second; one that names a master of the past is asked last; a connection that broke is
made again to where the master is now, not to where it was; and as soon as another master is known, every connection to
the former one is cut, so that a subscription or a thread that waits there does not wait on.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import redis.asyncio as redis_async
from redis import Redis
from redis.asyncio import sentinel as async_sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoConnection
from redis.retry import Retry
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from fastgpt2.protocol.redis_url import SentinelGroup
from fastgpt2.protocol.server_check import greeted, greeted_async

# For the connecting, and for the answer.
SENTINEL_SECONDS = 1.0

# How errors begin by which a server says that it is no longer the master that takes writes, beside READONLY, of which
# the library knows: a blocked command on what became a replica, a replica without its master, a master cut off from its
# replicas (`min-replicas-to-write`), which perhaps have another one by now.
_DEMOTED = ("UNBLOCKED", "MASTERDOWN", "NOREPLICAS")


class NotMaster(NoConnection):
    """Raised if the server that a Sentinel names as the master says that it is a replica."""


def connect_by_sentinel(group: SentinelGroup, arguments: dict[str, Any], bounded: Callable[..., type[Any]]) -> Redis:
    """Return a connection pool for the master; nothing is sent yet.

    Args:
        arguments: redis-py's, for connections to the master.
        bounded: makes the subclass of a kind of connection that is to be used in its place.
    """
    sentinels = SentinelSet(group, Retry(NoBackoff(), 0))
    for one in sentinels.sentinels:
        one.connection_pool.connection_class = bounded(one.connection_pool.connection_class)
    kind = SecureMasterConnection if arguments.pop("ssl", False) else MasterConnection
    return Redis.from_pool(
        SentinelConnectionPool(group.master, sentinels, connection_class=bounded(greeted(kind)), **arguments)  # type: ignore[no-untyped-call]
    )


def connect_by_sentinel_async(group: SentinelGroup, arguments: dict[str, Any]) -> redis_async.Redis:
    """Return a connection pool for the master, for asyncio; see `connect_by_sentinel`."""
    sentinels = AsyncSentinelSet(group, AsyncRetry(NoBackoff(), 0))
    kind = AsyncSecureMasterConnection if arguments.pop("ssl", False) else AsyncMasterConnection
    pool = async_sentinel.SentinelConnectionPool(  # type: ignore[no-untyped-call]
        group.master, sentinels, connection_class=greeted_async(kind), **arguments
    )
    return redis_async.Redis.from_pool(pool)


class _Answers:
    """What the Sentinels have said about their master, one after the other; none of them knew it as alive."""

    def __init__(self, group: SentinelGroup) -> None:
        self._master = group.master
        self._said: list[str] = []
        self._kinds: set[str] = set()

    def note(self, sentinel: Any, answer: dict[str, Any] | Exception) -> None:
        kind, words = self._in_words(answer)
        kwargs = sentinel.connection_pool.connection_kwargs
        self._said.append(f"{kwargs['host']}:{kwargs['port']} {words}")
        self._kinds.add(kind)

    def _in_words(self, answer: dict[str, Any] | Exception) -> tuple[str, str]:
        if isinstance(answer, dict):
            if self._master in answer:
                return "down", "sees it down"
            return "unknown", f"knows {', '.join(sorted(answer)[:5]) or 'no master'}"
        if isinstance(answer, AuthenticationError | NoPermissionError):
            return "denied", "denies access"
        if isinstance(answer, ResponseError):
            return "other", "is no Sentinel" if "unknown command" in str(answer) else f"says {answer}"
        return "away", f"does not answer ({str(answer).rstrip('.')})"

    def error(self) -> MasterNotFoundError:
        """Return the error that says it. By its first words, `fastgpt2.protocol.connection` knows the remedy."""
        what = f"no Sentinel names a live master {self._master}"
        if self._kinds == {"unknown"}:
            what = f"the Sentinels know no master {self._master}"
        elif self._kinds == {"other"}:
            what = "the URL names no Sentinel"
        elif "denied" in self._kinds and self._kinds <= {"denied", "away"}:
            what = "the Sentinels deny access"
        return MasterNotFoundError(f"{what}: {'; '.join(self._said)}")


def _options(retry: Retry | AsyncRetry) -> dict[str, Any]:
    # The second version of the protocol needs no more rights than to authenticate and to ask.
    return {
        "socket_connect_timeout": SENTINEL_SECONDS,
        "socket_timeout": SENTINEL_SECONDS,
        "retry": retry,
        "protocol": 2,
    }


class _Order:
    """The order in which Sentinels are asked. Threads share them: their list is replaced, never changed."""

    sentinels: list[Any]
    check_master_state: Callable[[Any, str], bool]

    def _find_master(self, sentinel: Any, masters: Any, name: str) -> tuple[str, int] | None:
        """Return where the master is, from what a Sentinel says of all that it knows; None if it knows no live one.

        The Sentinel that knows is asked first from now on.
        """
        state = masters.get(name)
        if not state or not self.check_master_state(state, name):
            return None
        self.sentinels = [sentinel, *(one for one in self.sentinels if one is not sentinel)]
        return state["ip"], state["port"]

    def ask_another(self) -> None:
        """Ask the one that answered last after all others from now on."""
        self.sentinels = self.sentinels[1:] + self.sentinels[:1]


class SentinelSet(_Order, Sentinel):
    """The Sentinels of a URL. A connection to one of them lasts for one question.

    They know all connections to the master, also those of the pools that RQ makes for itself: else a subscription to a
    master that hangs would wait for ever, and each thread would have to find out for itself.
    """

    def __init__(self, group: SentinelGroup, retry: Retry) -> None:
        super().__init__(group.places, sentinel_kwargs={**_options(retry), **group.options})  # type: ignore[no-untyped-call]
        self.group = group
        self._opened: WeakSet[MasterConnection] = WeakSet()
        self._lock = threading.Lock()

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the address of the master.

        Raises:
            MasterNotFoundError: no Sentinel knows it as alive; the message holds what each says.
        """
        answers = _Answers(self.group)
        for sentinel in self.sentinels:
            try:
                masters: Any = sentinel.sentinel_masters()
            except (RedisError, OSError) as error:
                answers.note(sentinel, error)
                continue
            finally:
                sentinel.connection_pool.disconnect(inuse_connections=False)
            found = self._find_master(sentinel, masters, service_name)
            if found is not None:
                return found
            answers.note(sentinel, masters)
        raise answers.error()

    def note(self, connection: MasterConnection) -> None:
        """Note a connection that is being made."""
        with self._lock:
            self._opened.add(connection)

    def leave_others(self, connection: MasterConnection) -> None:
        """Cut all connections that lead elsewhere than this one, whose other end has said that it is the master."""
        with self._lock:
            opened = list(self._opened)
        for one in opened:
            # Its thread reads an end of file, and closes it: `disconnect` is for that thread only.
            if (one.host, one.port) != (connection.host, connection.port) and (used := one._sock) is not None:
                with suppress(OSError):
                    socket.socket.shutdown(used, socket.SHUT_RDWR)


class AsyncSentinelSet(_Order, async_sentinel.Sentinel):
    """See `SentinelSet`."""

    def __init__(self, group: SentinelGroup, retry: AsyncRetry) -> None:
        super().__init__(group.places, sentinel_kwargs={**_options(retry), **group.options})  # type: ignore[no-untyped-call]
        self.group = group
        self._opened: WeakSet[AsyncMasterConnection] = WeakSet()

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """See `SentinelSet.discover_master`."""
        answers = _Answers(self.group)
        for sentinel in self.sentinels:
            try:
                masters: Any = await sentinel.sentinel_masters()
            except (RedisError, OSError) as error:
                answers.note(sentinel, error)
                continue
            finally:
                await sentinel.connection_pool.disconnect(inuse_connections=False)
            found = self._find_master(sentinel, masters, service_name)
            if found is not None:
                return found
            answers.note(sentinel, masters)
        raise answers.error()

    def note(self, connection: AsyncMasterConnection) -> None:
        """See `SentinelSet.note`."""
        self._opened.add(connection)

    def leave_others(self, connection: AsyncMasterConnection) -> None:
        """See `SentinelSet.leave_others`."""
        for one in list(self._opened):
            if (one.host, one.port) != (connection.host, connection.port) and one._writer is not None:
                one._writer.transport.abort()


class MasterConnection(SentinelManagedConnection):
    """A connection that ends where its server is not the master, or no longer."""

    def connect(self) -> None:
        sentinels = self.connection_pool.sentinel_manager
        for _ in sentinels.sentinels[1:]:
            try:
                return super().connect()  # type: ignore[no-untyped-call, no-any-return]
            except NotMaster:
                sentinels.ask_another()
        return super().connect()  # type: ignore[no-untyped-call, no-any-return]

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            self.connect()  # the library's own way leads to the same server again, without a question
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        sentinels = self.connection_pool.sentinel_manager
        sentinels.note(self)
        super().on_connect_check_health(check_health)
        self.send_command("ROLE", check_health=False)  # type: ignore[no-untyped-call]
        try:
            role = self.read_response()
        except NoPermissionError:
            return
        _check_role(self, role)
        sentinels.leave_others(self)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not str(error).startswith(_DEMOTED):
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise NoConnection(str(error)) from None


class SecureMasterConnection(MasterConnection, SentinelManagedSSLConnection):
    """See `MasterConnection`."""


class AsyncMasterConnection(async_sentinel.SentinelManagedConnection):
    """See `MasterConnection`."""

    async def connect(self) -> None:
        sentinels = self.connection_pool.sentinel_manager
        for _ in sentinels.sentinels[1:]:
            try:
                return await super().connect()  # type: ignore[no-untyped-call, no-any-return]
            except NotMaster:
                sentinels.ask_another()
        return await super().connect()  # type: ignore[no-untyped-call, no-any-return]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect()
        await super().send_packed_command(command, check_health)

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        sentinels = self.connection_pool.sentinel_manager
        sentinels.note(self)
        await super().on_connect_check_health(check_health)
        await self.send_command("ROLE", check_health=False)
        try:
            role = await self.read_response()
        except NoPermissionError:
            return
        _check_role(self, role)
        sentinels.leave_others(self)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not str(error).startswith(_DEMOTED):
                raise
            await self.disconnect()
            raise NoConnection(str(error)) from None


class AsyncSecureMasterConnection(AsyncMasterConnection, async_sentinel.SentinelManagedSSLConnection):
    """See `MasterConnection`."""


def _check_role(connection: Any, role: Sequence[Any]) -> None:
    if role and role[0] != b"master":
        raise NotMaster(f"{connection.host}:{connection.port}, which a Sentinel names as the master, is a replica")
