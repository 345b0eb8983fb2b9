"""What is said to Redis, apart from how it gets there: one set of decisions for the blocking client and for asyncio.

A talk is a generator. It yields what is to be asked, gets the answer back, or has the library's error raised where it
stands, and returns what came of it. `carry_out` and `carry_out_async` are the only code that touches a connection.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from fastgpt2.errors import RedisAccessDenied
from fastgpt2.protocol.connection import ANSWER_BY, in_words

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

T = TypeVar("T")

# So long after a deadline an answer may still come: Redis itself counts the time that a read waits.
GRACE_SECONDS = 0.5

# How long a read goes on asking for a Redis that has answered before and is away.
RECONNECT_SECONDS = 30.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """One command, by the name of its method on a connection."""

    method: str
    args: tuple[Any, ...] = ()
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Together:
    """Several commands in one round trip, and with `at_once` in one transaction; answered by a list."""

    calls: tuple[Call, ...]
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Within:
    """What is asked, and until when, on the monotonic clock, the answer is wanted; a bit later it is given up."""

    ask: Call | Together
    deadline: float


Ask: TypeAlias = Call | Together | Pause | Within
Talk: TypeAlias = Generator[Ask, Any, T]


def call(method: str, *args: Any) -> Call:
    return Call(method, args)


def read_streams(after: dict[str, bytes | str], seconds: float) -> Call:
    """Wait for entries after the given ones, at least a millisecond: none at all would mean for ever."""
    return Call("xread", (after,), max(1, int(seconds * 1000)))


def entries_by_key(reply: Any) -> dict[str, list[tuple[Any, Any]]]:
    """The answer to `read_streams`, whichever protocol the connection speaks."""
    if isinstance(reply, dict):  # RESP3, where the entries are a list in a list
        return {key.decode(): [entry for part in parts for entry in part] for key, parts in reply.items()}
    return {key.decode(): entries for key, entries in reply or ()}


class Contact:
    """Whether Redis has answered this client yet: one that never did is not away but missing, or mistaken."""

    def __init__(self) -> None:
        self.made = False

    def patiently(self, ask: Call | Together, deadline: float) -> Talk[Any]:
        """The answer to what may be asked twice, asked again while Redis is away.

        For `RECONNECT_SECONDS` at most, and not past the `deadline` (on the monotonic clock); then the library's error
        is raised.
        """
        away_since, pause = 0.0, FIRST_PAUSE_SECONDS
        while True:
            try:
                answer = yield Within(ask, deadline)
            except Exception as reason:
                now = time.monotonic()
                away_since = away_since or now
                too_late = now + pause > min(away_since + RECONNECT_SECONDS, deadline)
                if not self.made or too_late or not _is_away(reason):
                    raise
                yield Pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.made = True
                return answer


def _is_away(reason: Exception) -> bool:
    from redis.exceptions import ConnectionError as NoConnection
    from redis.exceptions import TimeoutError as NoAnswer

    # One that is loading its data is a ConnectionError to the library, but so is one that wants a password.
    return isinstance(reason, NoConnection | NoAnswer | OSError) and not isinstance(
        in_words("", reason), RedisAccessDenied
    )


def carry_out(connection: Redis, url: str, talk: Talk[T]) -> T:
    """Hold a talk over a connection of the blocking library; what the library raises ends it as an error in words."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            ask = talk.send(answer) if error is None else talk.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        except Exception as escaped:
            if escaped is error:
                raise _said(url, escaped) from None
            raise
        answer, error = None, None
        bound = ANSWER_BY.set(ask.deadline + GRACE_SECONDS if isinstance(ask, Within) else math.inf)
        ask = ask.ask if isinstance(ask, Within) else ask
        try:
            if isinstance(ask, Pause):
                time.sleep(ask.seconds)
            elif isinstance(ask, Together):
                with connection.pipeline(transaction=ask.at_once) as pipeline:
                    _put(pipeline, ask)
                    answer = pipeline.execute()
            else:
                answer = _send(connection, ask)
        except Exception as reason:
            error = reason
        finally:
            ANSWER_BY.reset(bound)


async def carry_out_async(connection: AsyncRedis, url: str, talk: Talk[T]) -> T:
    """`carry_out` over a connection of the asyncio library."""
    answer: Any = None
    error: Exception | None = None
    while True:
        try:
            ask = talk.send(answer) if error is None else talk.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        except Exception as escaped:
            if escaped is error:
                raise _said(url, escaped) from None
            raise
        answer, error = None, None
        try:
            if isinstance(ask, Pause):
                await asyncio.sleep(ask.seconds)
            elif isinstance(ask, Within):
                left = ask.deadline + GRACE_SECONDS - time.monotonic()
                async with asyncio.timeout(left if math.isfinite(left) else None):
                    answer = await _ask_async(connection, ask.ask)
            else:
                answer = await _ask_async(connection, ask)
        except TimeoutError:
            from redis.exceptions import TimeoutError as NoAnswer

            error = NoAnswer("Timeout: no answer")
        except Exception as reason:
            error = reason


async def _ask_async(connection: AsyncRedis, ask: Call | Together) -> Any:
    if isinstance(ask, Together):
        async with connection.pipeline(transaction=ask.at_once) as pipeline:
            _put(pipeline, ask)
            return await pipeline.execute()
    return await _send(connection, ask)


def _said(url: str, error: Exception) -> Exception:
    from redis.exceptions import RedisError

    return in_words(url, error) if isinstance(error, RedisError | OSError) else error


def _send(connection: Any, ask: Call) -> Any:
    blocking = {} if ask.block is None else {"block": ask.block}
    return getattr(connection, ask.method)(*ask.args, **blocking)


def _put(pipeline: Any, ask: Together) -> None:
    for one in ask.calls:
        _send(pipeline, one)
