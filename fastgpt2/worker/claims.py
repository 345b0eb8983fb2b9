"""Claiming jobs from the queues: between two steps without waiting, and when idle without polling."""

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

# While all queues hold jobs, one claim of 16 looks at the last queue first, and of the others one of 4 at the second.
LAST_EVERY = 16
SECOND_EVERY = 4

# A safeguard only: `Claims.wait` unblocks the connections that were not served.
_BLOCK_SECONDS = 10
_CLAIM = Script(__file__, "claim")
_PUT_BACK = Script(__file__, "put_back")


class Claims:
    """The jobs of some queues, claimed one after the other into lists of this worker's, where others find them.

    A job stays in such a list until its end is written, by the script that writes it: so a worker that crashes leaves
    no job behind that nobody knows of.

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
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def add_claim(self, pipeline: Pipeline, most: int, running: int) -> None:
        """Add to a pipeline the claim of at most `most` jobs, by a worker that has `running` jobs already.

        `read` takes the reply, which has no jobs while workers are suspended.
        """
        _CLAIM.add(pipeline, self._keys, [most, self._turn, running, LAST_EVERY, SECOND_EVERY])

    def read(self, reply: Sequence[Any]) -> list[Claim]:
        """Return the jobs that the reply to a claim names."""
        self._turn += len(reply) // 2
        return self._decode([(self._queues[int(i)], raw) for i, raw in zip(reply[::2], reply[1::2], strict=True)])

    def claim(self, most: int) -> list[Claim]:
        """Claim at most `most` jobs that are there now, for a worker that has none."""
        arguments = [most, self._turn, 0, LAST_EVERY, SECOND_EVERY]
        return self.read(_CLAIM.run(self._connection, self._keys, arguments))

    def list_all(self) -> list[Claim]:
        """Return all that Redis has as claimed by this worker, in the order in which it was claimed.

        Also what this worker never heard of, because the reply to its claim was lost; and what it runs.
        """
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                pipeline.lrange(claimed_key(self._worker_name, queue.name), 0, -1)
            lists = pipeline.execute()
        return self._decode([(queue, raw) for queue, ids in zip(self._queues, lists, strict=True) for raw in ids])

    def put_back(self, claims: Sequence[Claim]) -> None:
        for queue in self._queues:
            ids = [job_id for of, job_id in reversed(claims) if of == queue]
            if ids:
                _PUT_BACK.run(self._connection, [queue.key, claimed_key(self._worker_name, queue.name)], ids)

    def wait(self, seconds: float) -> list[Claim]:
        """Wait for a job and claim it: one of each queue at most; none when the time is over or `wake` was called.

        One BLMOVE for each queue, each on a connection of its own: to wait for several lists at once, Redis has only
        commands that take from them without leaving a trace. The connections that were not served are unblocked again,
        so that nothing is claimed later.
        """
        if not self._waiting:
            self._waiting = [_Waiting(self._connection, queue, self._worker_name) for queue in self._queues]
        try:
            for waiting in self._waiting:
                waiting.begin()
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake_reader, selectors.EVENT_READ)
                for waiting in self._waiting:
                    selector.register(waiting.fileno(), selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(seconds)}
            with self._connection.pipeline(transaction=False) as pipeline:
                for waiting in self._waiting:
                    if waiting.fileno() not in ready:
                        pipeline.client_unblock(waiting.client_id)
                pipeline.execute()
            claims = self._decode([(each.queue, raw) for each in self._waiting if (raw := each.end()) is not None])
        except BaseException:
            self.close_connections()
            raise
        finally:
            with suppress(BlockingIOError):
                while os.read(self._wake_reader, 64):
                    pass
        self._turn += len(claims)
        return claims

    def wake(self) -> None:
        """End a `wait`, from a signal handler or another thread."""
        with suppress(OSError):
            os.write(self._wake_writer, b"!")

    def close_connections(self) -> None:
        while self._waiting:
            self._waiting.pop().close()

    def close(self) -> None:
        self.close_connections()
        reader, writer = self._wake_reader, self._wake_writer
        # The numbers may soon be another file's, and a signal may still come.
        self._wake_reader = self._wake_writer = -1
        os.close(reader)
        os.close(writer)

    def _decode(self, claims: Iterable[tuple[Queue, bytes]]) -> list[Claim]:
        """Return claims with their ids as text. What is no text is no job's id: it is dropped."""
        decoded: list[Claim] = []
        for queue, raw in claims:
            try:
                decoded.append((queue, raw.decode("utf-8")))
            except UnicodeDecodeError:
                log.warning("%s: an entry of the queue %s is no job's id: %r", self._worker_name, queue.name, raw[:100])
                self._connection.lrem(claimed_key(self._worker_name, queue.name), 1, raw)  # type: ignore[arg-type]
        return decoded


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
        """Return the id that came; None if the connection was unblocked."""
        reply: bytes | None = self._connection.read_response()
        return reply

    def close(self) -> None:
        with suppress(RedisError, OSError):
            self._connection.disconnect()
        self._pool.release(self._connection)
