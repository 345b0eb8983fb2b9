"""A supervisor's talk with Redis, in a thread of its own: supervising goes on while Redis is away."""

from __future__ import annotations

import logging
import queue as thread_queue
import threading
from collections.abc import Callable
from functools import partial

from redis.exceptions import RedisError

from fastgpt2.errors import FastGPT2Error
from fastgpt2.worker.connection import connect
from fastgpt2.worker.measures import restarts_field
from fastgpt2.worker.process import stop_signals_held
from fastgpt2.worker.reaping import Reaper

log = logging.getLogger("fastgpt2.worker")

RETRY_SECONDS = 1.0


class BackgroundReaper:
    """A thread that takes back the jobs of processes that have ended, and counts those that are started again, as soon
    as Redis can be reached.

    Args:
        redis_url, queue: where the jobs are.
        told: called, in the thread, with the name of each, whether it had jobs in its hands, and how many it had
            finished.
    """

    def __init__(self, redis_url: str, queue: str, told: Callable[[str, bool, int], None]) -> None:
        self._told = told
        self._connection = connect(redis_url)
        self._reaper = Reaper(self._connection, queue)
        self._tasks: thread_queue.SimpleQueue[Callable[[], bool] | None] = thread_queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        with stop_signals_held():  # they are the main thread's, which may hold them back
            self._thread.start()

    def reap(self, worker_name: str) -> None:
        """Soon, in the thread."""
        self._tasks.put(partial(self._reaped, worker_name))

    def count_restart(self, reason: str) -> None:
        """Soon, in the thread; see `measures.RESTARTS`."""
        self._tasks.put(partial(self._counted, restarts_field(reason)))

    def close(self, patience: float) -> None:
        """Finish what there is to do, within so many seconds."""
        self._ending.set()
        self._tasks.put(None)
        self._thread.join(timeout=patience)
        self._connection.close()

    def _run(self) -> None:
        while (done := self._tasks.get()) is not None:
            while not done():
                # Told to end, it tries once more, so that it ends although Redis is away.
                if self._ending.wait(RETRY_SECONDS) and not done():
                    return

    def _reaped(self, name: str) -> bool:
        try:
            reaped = self._reaper.reap(name)
            if reaped is not None:
                self._told(name, bool(reaped), reaped.finished)
        except (RedisError, FastGPT2Error) as reason:
            log.warning("the jobs of the dead worker %s cannot be taken back yet (%s)", name, reason)
            return False
        except Exception:
            log.exception("the jobs of the dead worker %s cannot be taken back", name)
        return True

    def _counted(self, field: str) -> bool:
        try:
            self._reaper.count(field)
        except RedisError:
            return False
        return True
