"""A Redis whose administrator the test is: nothing disabled, more options, and stopped as `kill -STOP` stops it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis import Redis

from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer


class OpenRedis(RedisServer):
    """Args:
    options: of the server, beside or instead of `RedisServer`'s.
    """

    def __init__(self, *options: str, folder: Path | None = None) -> None:
        super().__init__(folder=folder)
        self._more = options

    def _options(self) -> list[str]:
        options = super()._options()
        return [*options[: options.index("--rename-command")], *self._more]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """Kill it and start it again, in the test's main thread: a server ends with the thread that started it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It hangs: connections stay, and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def administered(self) -> Iterator[Redis]:
        connection = connect(self.url)
        yield connection
        connection.close()


def config_set(connection: Redis, name: str, value: Any) -> None:
    connection.config_set(name, value)
