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

from fastgpt2.protocol.keys import CRASHES_FIELD, SUSPECT_CRASHES, claimed_key

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
Claim = tuple[Queue, str]

# Of so many jobs taken while all queues hold some, one is of the last queue; of the fewer, one of the second.
LAST_EVERY, SECOND_EVERY = 16, 4

# A safeguard only: `Claims.wait` unblocks what it has not been served.
_BLOCK_SECONDS = 10

# KEYS: the mark of a suspension; then of each queue, the most urgent first, its list and that of what is taken of it.
# ARGV: how many to take at most, how many have been taken before, and how many are in hand. A job in whose company
# workers have died goes to nobody who has other jobs; those behind it wait, else it might wait for ever.
_CLAIM = f"""
if redis.call('EXISTS', KEYS[1]) == 1 then return {{}} end
local queues, turn, claimed, alone = (#KEYS - 1) / 2, tonumber(ARGV[2]), {{}}, false
local function take(i)
    local head = redis.call('LINDEX', KEYS[2 * i], 0)
    if not head then return false end
    local crashes = redis.pcall('HGET', 'rq:job:' .. head, '{CRASHES_FIELD}')
    if (tonumber(crashes) or 0) >= {SUSPECT_CRASHES} then
        alone = true
        if #claimed > 0 or tonumber(ARGV[3]) > 0 then return false end
    end
    claimed[#claimed + 1] = i - 1
    claimed[#claimed + 1] = redis.call('LMOVE', KEYS[2 * i], KEYS[2 * i + 1], 'LEFT', 'RIGHT')
    return true
end
for _ = 1, tonumber(ARGV[1]) do
    local first = 1
    if turn % {LAST_EVERY} == {LAST_EVERY - 1} then first = queues
    elseif turn % {SECOND_EVERY} == {SECOND_EVERY - 1} then first = math.min(2, queues) end
    local found = take(first)
    for i = 1, queues do
        if not found and not alone and i ~= first then found = take(i) end
    end
    if alone or not found then return claimed end
    turn = turn + 1
end
return claimed
"""

# KEYS: a queue, the list of what is taken of it. ARGV: jobs' ids, the one that was taken last first.
_PUT_BACK = """
for _, id in ipairs(ARGV) do
    if redis.call('LREM', KEYS[2], 1, id) > 0 then redis.call('LPUSH', KEYS[1], id) end
end
"""


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
        pipeline.eval(_CLAIM, len(self._keys), *self._keys, most, self._turn, in_hand)

    def answered(self, reply: Sequence[Any]) -> list[Claim]:
        """What came of it."""
        self._turn += len(reply) // 2
        return self._known([(self._queues[int(i)], raw) for i, raw in zip(reply[::2], reply[1::2], strict=True)])

    def take(self, most: int) -> list[Claim]:
        """Up to so many jobs that are there now, for a worker that holds none."""
        with self._connection.pipeline(transaction=False) as pipeline:
            self.ask(pipeline, most, 0)
            return self.answered(pipeline.execute()[0])

    def in_hand(self) -> list[Claim]:
        """Everything that Redis has as taken, in the order in which it was: also what this worker never heard of."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                pipeline.lrange(claimed_key(self._worker_name, queue.name), 0, -1)
            lists = pipeline.execute()
        return self._known([(queue, raw) for queue, ids in zip(self._queues, lists, strict=True) for raw in ids])

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Give claims, none of which has been started, back to the front of their queues."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                ids = [job_id for of, job_id in reversed(claims) if of == queue]
                if ids:
                    pipeline.eval(_PUT_BACK, 2, queue.key, claimed_key(self._worker_name, queue.name), *ids)
            pipeline.execute()

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
