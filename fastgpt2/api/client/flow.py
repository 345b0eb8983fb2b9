"""Flows say what is sent to Redis, not how it gets there (sans I/O): both clients share the same decisions.

A flow is a generator. It yields one step after the other, a `Command`, a `Pipeline` of commands or a `Pause`, and is
sent Redis's reply, or the redis library's error is thrown in. What it returns is the result. For example:

    def depth_of(queue: str) -> Flow[int]:
        depth: int = yield Command("llen", (queue_key(queue),))
        return depth

    Driver(url).run(depth_of("fastgpt2"))              # blocking, over redis.Redis
    await AsyncDriver(url).run(depth_of("fastgpt2"))   # the same flow, over redis.asyncio.Redis

One flow calls another by `yield from`. Only the two drivers touch a connection.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoReply

from fastgpt2.errors import RedisUnfit
from fastgpt2.protocol.connection import ANSWER_BY, connect, connect_async, in_words
from fastgpt2.protocol.scripts import execute, is_unknown, to_repeat, with_text

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

T = TypeVar("T")
C = TypeVar("C")

# How long after a deadline a reply may still come: Redis itself counts the time for which a read waits.
GRACE_SECONDS = 0.5

# How long a read is repeated while Redis is away, if it has answered before; and the pauses in between.
RECONNECT_SECONDS = 30.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Command:
    """One command, by the name of its method on a connection of the redis library.

    `Command("execute_command", script.command(...))` runs a script: a driver repeats it with the script's text if
    Redis wants that.
    """

    method: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Several commands in one round trip, on request as one transaction. The reply is a list."""

    commands: tuple[Command, ...]
    transaction: bool = False


@dataclass(frozen=True, slots=True)
class Bounded:
    """A request whose reply is wanted before `deadline`, on the monotonic clock; a bit later it is given up."""

    request: Command | Pipeline
    deadline: float


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


Step: TypeAlias = Command | Pipeline | Bounded | Pause
Flow: TypeAlias = Generator[Step, Any, T]

# The entries of one Redis stream: (id, {field: value}), bytes throughout.
Entries: TypeAlias = Sequence[tuple[Any, Any]]


class Retries:
    """The repetition of reads while Redis is away.

    Attributes:
        answered: Redis has answered this client before. A Redis that never did is not away but missing, or its URL is
            wrong: then nothing is repeated.
    """

    def __init__(self) -> None:
        self.answered = False

    def ask(self, request: Command | Pipeline, deadline: float = math.inf) -> Flow[Any]:
        """Return the reply to a request that may be sent twice; send it again while Redis is away.

        It is repeated for at most `RECONNECT_SECONDS`, and not past the `deadline` (on the monotonic clock). Then the
        redis library's error is raised.
        """
        away_since, pause = math.inf, FIRST_PAUSE_SECONDS
        while True:
            try:
                reply = yield Bounded(request, deadline)
            except Exception as error:
                now = time.monotonic()
                away_since = min(away_since, now)
                too_late = now + pause > min(away_since + RECONNECT_SECONDS, deadline)
                if not self.answered or too_late or not _means_away(error):
                    raise
                yield Pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.answered = True
                return reply


def _means_away(error: Exception) -> bool:
    # To the library, a Redis that loads its data is a ConnectionError, but so is one that wants a password.
    return isinstance(error, NoConnection | NoReply | OSError) and not isinstance(in_words("", error), RedisUnfit)


class OwnConnections(Generic[C]):
    """The connections of one process. After a fork, the child makes connections of its own.

    A fork copies sockets: two processes would write to one, and read each other's replies.

    Args:
        make: makes a pool of connections; nothing is sent by that.
    """

    def __init__(self, make: Callable[[str], C], redis_url: str) -> None:
        self._make, self._redis_url = make, redis_url
        self._pool, self._process = make(redis_url), os.getpid()
        # The parent's pools. The child keeps them: to close them here would disturb the parent's event loop.
        self._inherited: list[C] = []

    def get(self) -> C:
        """Return this process's pool of connections."""
        if self._process != os.getpid():
            self._inherited.append(self._pool)
            self._pool, self._process = self._make(self._redis_url), os.getpid()
        return self._pool


class Driver:
    """Runs flows over connections of the blocking redis library; safe for several threads, and after a fork.

    Args:
        between_steps: called before each step, every few seconds at least; what it raises ends the flow.

    Raises:
        BadRequest: not a Redis URL.
    """

    def __init__(self, redis_url: str, between_steps: Callable[[], None] | None = None) -> None:
        self.redis_url = redis_url
        self._between_steps = between_steps
        self._connections = OwnConnections(connect, redis_url)

    @property
    def connection(self) -> Redis:
        return self._connections.get()

    def run(self, flow: Flow[T]) -> T:
        """Run a flow and return its result.

        Raises:
            QueueUnavailable: Redis cannot be reached, or refuses to serve.
            Exception: what the flow raises.
        """
        reply: Any = None
        error: Exception | None = None
        while True:
            try:
                step = _advance(flow, reply, error, self.redis_url)
            except StopIteration as end:
                result: T = end.value
                return result
            reply, error = None, None
            if self._between_steps is not None:
                self._between_steps()
            try:
                reply = self._take(step)
            except Exception as reason:
                error = reason

    def _take(self, step: Step) -> Any:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        if not isinstance(step, Bounded):
            return self._send(step)
        bound = ANSWER_BY.set(step.deadline + GRACE_SECONDS)
        try:
            return self._send(step.request)
        finally:
            ANSWER_BY.reset(bound)

    def _send(self, request: Command | Pipeline) -> Any:
        if isinstance(request, Pipeline):
            with self.connection.pipeline(transaction=request.transaction) as pipeline:
                for one in request.commands:
                    getattr(pipeline, one.method)(*one.args)
                return _without_errors(execute(pipeline))
        try:
            return getattr(self.connection, request.method)(*request.args)
        except Exception as error:
            if not is_unknown(error):
                raise
        return self.connection.execute_command(*with_text(request.args))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.connection.close()


class AsyncDriver:
    """See `Driver`. For one event loop at a time: connections are made inside the running loop, and end with it."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self._connections = OwnConnections(connect_async, redis_url)
        # The loop in which these were first used.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks = set[asyncio.Task[Any]]()

    @property
    def connection(self) -> AsyncRedis:
        if self._loop is None or self._loop.is_closed():
            self._take_loop()
        return self._connections.get()

    def _take_loop(self) -> None:
        """Make connections for the running loop if there were some of a loop that is closed."""
        if self._loop is not None:
            self._connections = OwnConnections(connect_async, self.redis_url)
        with suppress(RuntimeError):  # asked for outside of any loop
            self._loop = asyncio.get_running_loop()

    async def run(self, flow: Flow[T]) -> T:
        """See `Driver.run`."""
        reply: Any = None
        error: Exception | None = None
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        while True:
            try:
                step = _advance(flow, reply, error, self.redis_url)
            except StopIteration as end:
                result: T = end.value
                return result
            reply, error = None, None
            try:
                reply = await self._take(step)
                if task and task.cancelling() > cancellations:
                    # Before Python 3.12, `asyncio.wait_for`, by which the redis library sends, loses a cancellation
                    # that comes as the sending ends.
                    raise asyncio.CancelledError
            except TimeoutError:
                error = NoReply("Timeout: no answer")
            except Exception as reason:
                error = reason

    async def run_whole(self, flow: Flow[T]) -> T:
        """Run a flow to its end, even if the caller is cancelled meanwhile.

        A caller may be one that is cancelled at each `await`: so anyio ends what a web server's client has left.
        """
        task = asyncio.create_task(self.run(flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _take(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if not isinstance(step, Bounded):
            return await self._send(step)
        left = step.deadline + GRACE_SECONDS - time.monotonic()
        async with asyncio.timeout(left if math.isfinite(left) else None):
            return await self._send(step.request)

    async def _send(self, request: Command | Pipeline) -> Any:
        if isinstance(request, Pipeline):
            return await self._send_pipeline(request)
        try:
            return await getattr(self.connection, request.method)(*request.args)
        except Exception as error:
            if not is_unknown(error):
                raise
        return await self.connection.execute_command(*with_text(request.args))  # type: ignore[no-untyped-call]

    async def _send_pipeline(self, request: Pipeline) -> list[Any]:
        """Do what `fastgpt2.protocol.scripts.execute` does for the blocking library."""
        async with self.connection.pipeline(transaction=request.transaction) as pipeline:
            for one in request.commands:
                getattr(pipeline, one.method)(*one.args)
            replies = await pipeline.execute(raise_on_error=False)
            again = to_repeat([one.args for one in request.commands], replies)
            if again:
                for words in again.values():
                    pipeline.execute_command(*words)
                for at, reply in zip(again, await pipeline.execute(raise_on_error=False), strict=True):
                    replies[at] = reply
            return _without_errors(replies)

    async def aclose(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.connection.aclose()


def _advance(flow: Flow[Any], reply: Any, error: Exception | None, redis_url: str) -> Step:
    """Give a flow the reply or the error, and return its next step.

    Raises:
        StopIteration: the flow has returned.
        QueueUnavailable: the flow has let the redis library's error pass.
    """
    try:
        return flow.send(reply) if error is None else flow.throw(error)
    except Exception as escaped:
        if escaped is error and isinstance(error, RedisError | OSError):
            raise in_words(redis_url, error) from None
        raise


def _without_errors(replies: list[Any]) -> list[Any]:
    """Return the replies of a pipeline; raise the first error among them, if there is one."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
