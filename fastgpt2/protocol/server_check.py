"""Whether a server can be served from: its version, what kind of server it is, and the rights of the user.

What a server is it says in its greeting (HELLO), which costs nothing more: every connection of this package is refused
by itself if that is none to work with. The rights are tried out by the programs that claim or read jobs, when they
start (`check_server`). Between MULTI and DISCARD nothing is run, and yet Redis tells of each command whether this user
may run it on these keys: it is one round trip, and changes nothing.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.utils import check_protocol_version

from fastgpt2.errors import QueueUnavailable, RedisAccessDenied, RedisUnfit
from fastgpt2.protocol import keys
from fastgpt2.protocol.connection import CLUSTER_REFUSED, connect, in_words, without_password

if TYPE_CHECKING:
    from redis import Redis

Rights = Literal["client", "worker", "endpoint"]

# For BLMOVE and LMOVE, and much of what the scripts use.
NEEDED_VERSION = (6, 2)

# How many denied commands a message names.
MOST_NAMED = 5

_SENTINEL = "it is a Sentinel: write redis+sentinel://host:26379/MASTER/0 with the name of the master"
_TOO_OLD = "Redis 6.2 or newer is needed, or valkey"

# What a script does counts as its caller's, so here is what scripts call as well. EVALSHA is not needed where EVAL is
# allowed (`fastgpt2.protocol.scripts`).
_OF_CLIENTS = """
    TIME
    EVAL return(1) 0
    EXISTS JOB
    EXPIRE JOB 1
    HGET JOB status
    HMGET JOB status
    HSET JOB status x
    LLEN QUEUE
    RPUSH QUEUE x
    LREM QUEUE 1 x
    SADD rq:queues QUEUE
    SCARD WORKERS
    SMEMBERS WORKERS
    ZADD CANCELED 1 x
    ZREM DEFERRED x
    ZRANGE STARTED 0 1
    ZRANGEBYSCORE STARTED 0 1
    XREAD STREAMS STREAM 0
    XREVRANGE RESULTS + - COUNT 1
    HINCRBY TOTALS refused 1
"""
_COMMANDS: dict[Rights, str] = {
    "client": _OF_CLIENTS,
    "endpoint": f"""{_OF_CLIENTS}
    HSTRLEN JOB data
    LINDEX QUEUE 0
    SRANDMEMBER WORKERS 1
    ZCARD STARTED
    TYPE WORKER
    XADD WAKE * a b
    ZRANGE MODELS 0 1
    LRANGE LATEST 0 1
    HMGET TOKEN-TOTALS x
    EXISTS ACCOUNT
    EXPIRE ACCOUNT 1
    HGET ACCOUNT x
    HMGET ACCOUNT x
    HSET ACCOUNT x y
    HDEL ACCOUNT x
    HINCRBY ACCOUNT x 1
    ZADD ACCOUNT 1 x
    ZREM ACCOUNT x
    ZCARD ACCOUNT
    ZRANGE ACCOUNT 0 1
    XADD ACCOUNT * a b
    XRANGE ACCOUNT - +
    XTRIM ACCOUNT MAXLEN 0
    """,
    "worker": """
    TIME
    EVAL return(1) 0
    SCRIPT LOAD return(1)
    CLIENT ID
    CLIENT UNBLOCK 1
    SUBSCRIBE CHANNEL
    EXISTS JOB
    TYPE JOB
    DEL JOB
    EXPIRE JOB 1
    PERSIST JOB
    GET rq:suspended
    SET LOCK x
    HGET JOB status
    HMGET JOB status
    HGETALL JOB
    HKEYS JOB
    HSTRLEN JOB data
    HEXISTS JOB status
    HSET JOB status x
    HDEL JOB status
    HINCRBY TOTALS jobs 1
    HINCRBYFLOAT WORKER total_working_time 1
    BLMOVE QUEUE CLAIMED LEFT RIGHT 1
    LMOVE QUEUE CLAIMED LEFT RIGHT
    LINDEX QUEUE 0
    LLEN QUEUE
    LPOS QUEUE x
    LRANGE CLAIMED 0 1
    LPUSH QUEUE x
    RPUSH QUEUE x
    LREM QUEUE 1 x
    LTRIM LATEST 0 1
    SADD WORKERS x
    SREM WORKERS x
    SMEMBERS WORKERS
    SISMEMBER WORKERS x
    SCARD WORKERS
    ZADD STARTED 1 x
    ZREM STARTED x
    ZSCORE STARTED x
    ZCARD STARTED
    ZRANGE STARTED 0 1
    ZRANGEBYSCORE STARTED 0 1
    ZREMRANGEBYSCORE STARTED 0 1
    ZCOUNT LEASES 0 1
    ZADD MODELS 1 x
    XADD STREAM * a b
    XTRIM RESULTS MAXLEN 1
    XREVRANGE RESULTS + - COUNT 1
    """,
}


class ServerUnfit(ResponseError):
    """Raised by a connection that has found out that its server cannot be worked with."""


@cache
def greeted(kind: type[Any]) -> type[Any]:
    """Return a subclass of this kind of connection that ends if the server's greeting says that it is unfit."""

    def on_connect_check_health(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            kind.on_connect_check_health(self, *args, **kwargs)
        except ResponseError as error:
            _refuse_no_greeting(error)
            raise
        _check_greeting(self.handshake_metadata)

    return type(f"Greeted{kind.__name__}", (kind,), {"on_connect_check_health": on_connect_check_health})


@cache
def greeted_async(kind: type[Any]) -> type[Any]:
    """Return the same for a kind of connection of asyncio's, of which the library does not keep the greeting."""

    async def on_connect_check_health(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await kind.on_connect_check_health(self, *args, **kwargs)
        except ResponseError as error:
            _refuse_no_greeting(error)
            raise
        if check_protocol_version(self.protocol, 3):
            await self.send_command("HELLO", 3, check_health=False)
            _check_greeting(await self.read_response())

    return type(f"Greeted{kind.__name__}", (kind,), {"on_connect_check_health": on_connect_check_health})


def _refuse_no_greeting(error: ResponseError) -> None:
    """Raise an error in place of one that quotes the whole command, and in it the password."""
    if "unknown command" in str(error) and "HELLO" in str(error).upper():
        raise ServerUnfit(f"it is older than Redis 6: {_TOO_OLD}") from None


def _check_greeting(greeting: Any) -> None:
    """Look at what HELLO has returned; what it does not tell is no reason to refuse.

    Raises:
        ServerUnfit: the server is too old, a node of a Cluster, or a Sentinel.
    """
    if not isinstance(greeting, dict):
        return
    said = {_text(name): _text(value) for name, value in greeting.items()}
    if said.get("mode") in ("cluster", "sentinel"):
        raise ServerUnfit(CLUSTER_REFUSED if said["mode"] == "cluster" else _SENTINEL)
    found = re.match(r"(\d{1,4})\.(\d{1,4})", said.get("version", ""))
    if found and (int(found[1]), int(found[2])) < NEEDED_VERSION:
        raise ServerUnfit(f"it is version {said['version'][:20]}: {_TOO_OLD}")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def check_server(connection: Redis, url: str, rights: Rights, queue: str = "fastgpt2") -> None:
    """See whether the server can be served from, and whether the user may do all that its part needs.

    Args:
        url: for messages.
        rights: of which part.
        queue: the name of the queue, to whose keys the user may be confined.

    Raises:
        RedisUnfit: the server is too old, a Cluster, a Sentinel, or has no such database.
        RedisAccessDenied: the password is wrong, or the user lacks rights.
        QueueUnavailable: Redis is away.
    """
    try:
        try_rights(connection, url, rights, queue)
    except (RedisError, OSError) as reason:
        raise in_words(url, reason) from None


def refuse_unfit(url: str, rights: Rights, queue: str) -> None:
    """Look at Redis once, for a program that waits for one that is away: waiting would not mend another fault.

    Raises:
        BadRequest: the URL cannot be used.
        RedisUnfit: as `check_server`.
    """
    connection = connect(url)
    try:
        check_server(connection, url, rights, queue)
    except RedisUnfit:
        raise
    except QueueUnavailable:
        pass
    finally:
        connection.close()


def try_rights(connection: Redis, url: str, rights: Rights, queue: str) -> None:
    """Do as `check_server`, but raise the library's RedisError where the connection fails."""
    pool = connection.connection_pool
    commands = _commands(rights, queue)
    used: Any = pool.get_connection()
    try:
        if used.handshake_metadata is None:  # the second version of the protocol has no greeting
            _check_greeting(_ask_greeting(used))
        used.send_packed_command(used.pack_commands([("MULTI",), *commands, ("DISCARD",)]))
        replies = [_read(used) for _ in range(len(commands) + 2)][1:-1]
    except BaseException:
        used.disconnect()
        raise
    finally:
        pool.release(used)
    _judge(url, rights, commands, replies)


def _ask_greeting(used: Any) -> dict[Any, Any] | None:
    used.send_command("HELLO", 2)
    reply = _read(used)
    return dict(zip(reply[::2], reply[1::2], strict=False)) if isinstance(reply, list) else None


def _read(used: Any) -> Any:
    try:
        return used.read_response()
    except ResponseError as error:
        return error


def _commands(rights: Rights, queue: str) -> list[tuple[str, ...]]:
    """Return the commands of a part, as words, on keys as it uses them; the job and the worker need not exist."""
    names = {
        "JOB": keys.job_key("check"),
        "QUEUE": keys.queue_key(queue),
        "RESULTS": keys.results_key("check"),
        "STARTED": keys.registry_key("started", queue),
        "CANCELED": keys.registry_key("canceled", queue),
        "DEFERRED": keys.registry_key("deferred", queue),
        "WORKERS": keys.workers_key(queue),
        "WORKER": f"{keys.WORKER_PREFIX}check",
        "STREAM": keys.stream_key("check"),
        "TOTALS": keys.totals_key(queue),
        "LATEST": keys.latest_key(queue),
        "ACCOUNT": keys.account_key(queue, "check"),
        "TOKEN-TOTALS": keys.token_totals_key(queue),
        "CLAIMED": keys.claimed_key("check", queue),
        "MODELS": keys.models_key(queue),
        "LEASES": keys.leases_key(queue),
        "WAKE": keys.wake_key(queue),
        "LOCK": f"rq:scheduler-lock:{queue}",
        "CHANNEL": "rq:pubsub:check",
    }
    lines = (line.split() for line in _COMMANDS[rights].strip().splitlines() if line.strip())
    return [tuple(names.get(word, word) for word in words) for words in lines]


def _judge(url: str, rights: Rights, commands: list[tuple[str, ...]], replies: list[Any]) -> None:
    denied = []
    for words, reply in zip(commands, replies, strict=True):
        if isinstance(reply, NoPermissionError):
            denied.append(" ".join(words[:2]))
        elif isinstance(reply, ResponseError):
            error = in_words(url, reply)
            if isinstance(error, RedisUnfit):
                raise error
    if denied:
        more = f" and {len(denied) - MOST_NAMED} more" if len(denied) > MOST_NAMED else ""
        raise RedisAccessDenied(
            f"Redis at {without_password(url)} denied access: the user may not {', '.join(denied[:MOST_NAMED])}{more}; "
            f"give it the rights of the {rights} in deploy/redis.acl, or check the user in FASTGPT2_REDIS_URL"
        )
