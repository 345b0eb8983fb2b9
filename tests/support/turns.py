"""A worker in the test's own process, taken through its loop turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastgpt2 import Engine
from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.worker import GenerationWorker


class Turns:
    """A worker and its turns."""

    def __init__(self, worker: GenerationWorker) -> None:
        self.worker = worker

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            self.worker._turn(burst=True)

    def until(self, condition: Callable[[], object], what: str, most: int = 2000) -> int:
        """Take turns until the condition holds; return how many it took."""
        for count in range(most):
            if condition():
                return count
            self.take()
        pytest.fail(f"{most} turns did not bring: {what}")


@contextmanager
def take_turns(
    engine: Engine, redis_server: RedisServer, queue_name: str, durability: str = "memory", **options: Any
) -> Iterator[Turns]:
    """Sign a worker on within the context; the options are further ones of `GenerationWorker`."""
    connection = connect(redis_server.url)
    given = {"drain_timeout": 1000, "durability": durability, **options}
    worker = GenerationWorker(engine, connection, queue_name, **given)
    assert worker.sign_on()
    try:
        yield Turns(worker)
    finally:
        # Also after a failure: a lease whose worker takes no turns ends the process, and the tests with it.
        for running in worker.batch:
            worker.batch.drop(running)
        worker._claims.close()
        worker.confirmation.close()
        worker.sign_off()
        connection.close()
