"""Taking jobs out of the queues: between two steps without waiting, and when idle without polling."""

from __future__ import annotations

import logging
import os
import selectors
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq import Queue
from rq.suspension import WORKERS_SUSPENDED

from fastgpt2.protocol.keys import claimed_key
from fastgpt2.protocol.scripts import Script

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
Claim = tuple[Queue, str]

# Of so many jobs taken while all queues hold some, one is of the last queue; of the fewer, one of the second.
LAST_EVERY, SECOND_EVERY = 16, 4

# A safeguard only: `Claims.wait` unblocks what it has not been served.
_BLOCK_SECONDS = 10

_CLAIM = Script(__file__, "claim")
_PUT_BACK = Script(__file__, "put_back")


class Claims:
    """The jobs of some queues, taken one after the other into lists of this worker's, where a crash leaves them found.

    A job stays in such a list until its end is written, by the script that writes it.

    Args:
        queues: the most urgent first. Jobs of the others are not kept waiting for ever: see `LAST_EVERY`.
    """

    def __init__(self, connection: Redis, queues: Sequence[Queue], worker_name: str) -> None:
        self._connection = connection
        self._queues = list(queues)
        self._keys = [WORKERS_SUSPENDED]
        for queue in queues:
            self._keys += (queue.key, claimed_key(worker_name, queue.name))
        self._worker_name = worker_name
        self._turn = 0
        self._waiting: list[_Waiting] = []
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)

    def ask(self, pipeline: Pipeline, most: int, in_hand: int) -> None:
        """Add to a pipeline what takes up to so many jobs, none while workers are suspended."""
        _CLAIM.add(pipeline, self._keys, self._arguments(most, in_hand))

    def _arguments(self, most: int, in_hand: int) -> list[int]:
        return [most, self._turn, in_hand, LAST_EVERY, SECOND_EVERY]

    def answered(self, reply: Sequence[Any]) -> list[Claim]:
        """What came of it."""
        self._turn += len(reply) // 2
        return self._known([(self._queues[int(i)], raw) for i, raw in zip(reply[::2], reply[1::2], strict=True)])

    def take(self, most: int) -> list[Claim]:
        """Up to so many jobs that are there now, for a worker that holds none."""
        return self.answered(_CLAIM.run(self._connection, self._keys, self._arguments(most, 0)))

    def in_hand(self) -> list[Claim]:
        """Everything that Redis has as taken, in the order in which it was: also what this worker never heard of."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                pipeline.lrange(claimed_key(self._worker_name, queue.name), 0, -1)
            lists = pipeline.execute()
        return self._known([(queue, raw) for queue, ids in zip(self._queues, lists, strict=True) for raw in ids])

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Give claims, none of which has been started, back to the front of their queues."""
        for queue in self._queues:
            ids = [job_id for of, job_id in reversed(claims) if of == queue]
            if ids:
                _PUT_BACK.run(self._connection, [queue.key, claimed_key(self._worker_name, queue.name)], ids)

    def wait(self, seconds: float) -> list[Claim]:
        """The next job, or one of each queue at most, or none when the time is over or `wake` was called.

        One BLMOVE a queue, each on a connection of its own, as Redis can wait for several lists only by taking from
        them without leaving a trace. Those that were not served are unblocked again, so that nothing is taken later.
        """
        self._waiting = self._waiting or [
            _Waiting(self._connection, queue, self._worker_name) for queue in self._queues
        ]
        try:
            for waiting in self._waiting:
                waiting.begin()
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                for waiting in self._waiting:
                    selector.register(waiting.fileno(), selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(seconds)}
            unserved = [waiting.client_id for waiting in self._waiting if waiting.fileno() not in ready]
            self._unblock(unserved)
            taken = self._known([(each.queue, raw) for each in self._waiting if (raw := each.end()) is not None])
        except BaseException:
            self.close_connections()
            raise
        finally:
            with suppress(BlockingIOError):
                while os.read(self._woken, 64):
                    pass
        self._turn += len(taken)
        return taken

    def wake(self) -> None:
        """End a `wait`, from a signal handler or another thread."""
        with suppress(OSError):
            os.write(self._wake, b"!")

    def close_connections(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.close()

    def close(self) -> None:
        self.close_connections()
        woken, wake = self._woken, self._wake
        self._woken = self._wake = -1  # the numbers may soon be another file's, and a signal may still come
        os.close(woken)
        os.close(wake)

    def _known(self, claims: Iterable[tuple[Queue, bytes]]) -> list[Claim]:
        """With ids as text. What is no text is no job's id: it is dropped."""
        known: list[Claim] = []
        for queue, raw in claims:
            try:
                known.append((queue, raw.decode("utf-8")))
            except UnicodeDecodeError:
                log.warning("%s: an entry of the queue %s is no job's id: %r", self._worker_name, queue.name, raw[:100])
                self._connection.lrem(claimed_key(self._worker_name, queue.name), 1, raw)  # type: ignore[arg-type]
        return known

    def _unblock(self, client_ids: Iterable[int]) -> None:
        with self._connection.pipeline(transaction=False) as pipeline:
            for client_id in client_ids:
                pipeline.client_unblock(client_id)
            pipeline.execute()


class _Waiting:
    """A connection on which a BLMOVE waits for one queue."""

    def __init__(self, connection: Redis, queue: Queue, worker_name: str) -> None:
        self.queue = queue
        self._keys = queue.key, claimed_key(worker_name, queue.name)
        self._pool = connection.connection_pool
        self._connection: Any = self._pool.get_connection()
        self._connection.send_command("CLIENT", "ID")
        self.client_id = int(self._connection.read_response())

    def begin(self) -> None:
        self._connection.send_command("BLMOVE", *self._keys, "LEFT", "RIGHT", _BLOCK_SECONDS)

    def fileno(self) -> int:
        # redis-py has no other way to wait for several connections at once.
        number: int = self._connection._sock.fileno()
        return number

    def end(self) -> bytes | None:
        reply: bytes | None = self._connection.read_response()
        return reply

    def close(self) -> None:
        with suppress(RedisError, OSError):
            self._connection.disconnect()
        self._pool.release(self._connection)
