"""The thread in which a worker hears the commands that RQ's programs send it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, RedisError

from fastgpt2.process import stop_signals_held
from fastgpt2.protocol.connection import SOCKET_SECONDS

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import PubSub

log = logging.getLogger("fastgpt2.worker")

# After this long without a message, Redis is asked whether it is still there. A connection to a machine that is gone
# tells nothing by itself.
SILENCE_SECONDS = SOCKET_SECONDS
RETRY_SECONDS = 1.0


class Listener:
    """A listener keeps a subscription to a channel, whatever becomes of Redis, and hands each message on.

    RQ's own thread for this ends at the first error that is not a broken connection, and waits for ever on one that is
    broken without a sign. What is sent while there is no subscription is lost: Redis keeps no messages.

    Args:
        handle: called, in the thread, with each message as redis-py has it.
    """

    def __init__(self, connection: Redis, worker_name: str, channel: str, handle: Callable[[Any], None]) -> None:
        self._connection = connection
        self._name, self._channel, self._handle = worker_name, channel, handle
        self._pubsub: PubSub | None = None
        self._subscribed = threading.Event()
        self._ending = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen from now on, if nobody does yet."""
        if self._ending.is_set() or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        with stop_signals_held():  # they are the main thread's, and interrupt what it waits for
            self._thread.start()

    def wait_until_subscribed(self) -> None:
        """Wait until commands are heard, for as long as Redis may take to answer.

        Raises:
            RedisError: the channel may not be listened to.
        """
        deadline = time.monotonic() + SOCKET_SECONDS
        while not self._subscribed.wait(0.02) and time.monotonic() < deadline:
            if isinstance(self._failure, NoPermissionError):
                raise self._failure

    def renew(self) -> None:
        """Subscribe anew, soon: the Redis that is listened to is not the one any more that commands are sent to."""
        if self._subscribed.is_set():
            self._subscribed.clear()
            self._wake()

    def stop(self) -> None:
        """Listen no more. Redis is told nothing: it may be away."""
        self._ending.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _wake(self) -> None:
        """Wake the thread by the end of the connection that it waits on; the thread closes it then."""
        connection: Any = None if self._pubsub is None else self._pubsub.connection
        if connection is not None:
            with suppress(AttributeError, OSError):
                connection._sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                with self._connection.pubsub() as self._pubsub:  # type: ignore[no-untyped-call]
                    self._listen(self._pubsub)
            except Exception as reason:
                self._subscribed.clear()
                if self._ending.is_set():
                    return
                if self._failure is None:
                    unforeseen = not isinstance(reason, RedisError | OSError)
                    log.warning("%s: RQ's commands are not heard for now (%s)", self._name, reason, exc_info=unforeseen)
                self._failure = reason
                self._ending.wait(RETRY_SECONDS)

    def _listen(self, pubsub: PubSub) -> None:
        pubsub.subscribe(self._channel)
        asked = False
        while not self._ending.is_set():
            message = pubsub.get_message(timeout=SILENCE_SECONDS)
            if message is not None:
                asked = False
                self._note(message)
            elif asked:
                raise TimeoutError("Redis does not answer")
            else:
                asked = True
                pubsub.ping()

    def _note(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._subscribed.set()
            self._failure = None
        elif message["type"] == "message":
            self._handle(message)
