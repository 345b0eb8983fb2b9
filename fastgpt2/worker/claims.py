"""Claiming jobs from the queues: between two steps without waiting, and when idle without polling."""

from __future__ import annotations

import logging
import os
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError
from rq import Queue
from rq.suspension import WORKERS_SUSPENDED

from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import PRIORITIES, claimed_key
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import check_replies, is_of_entry
from fastgpt2.worker.set_aside import set_aside, shown
from fastgpt2.worker.unfit import tell

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
Claim = tuple[Queue, str]

# While there are jobs of all priorities, one claim of 16 looks at the last one first, and of the others one of 4 at the
# second.
LAST_EVERY = 16
SECOND_EVERY = 4

# Far beyond what anybody uses; each of a job's keys has it in its name.
MAX_ID_BYTES = 1 << 20

# How long a queue whose key is no list is left out by a worker that waits.
UNFIT_SECONDS = 5.0

# A safeguard only: `Claims.wait` unblocks the connections that were not served.
_BLOCK_SECONDS = 10
_CLAIM = Script(__file__, "claim")
_PUT_BACK = Script(__file__, "put_back")


class Claims:
    """The jobs of some queues, claimed one after the other into lists of this worker's, where others find them.

    A job stays in such a list until its end is written, by the script that writes it: so a worker that crashes leaves
    no job behind that nobody knows of.

    A queue whose key is no list is left out until it is one. A list of this worker's own that is none is deleted.

    Args:
        queues: the most urgent first, as many of each priority: these take turns. Jobs of the less urgent ones are not
            kept waiting for ever: see `LAST_EVERY`.
        refused: called for each entry that is set aside, with the beginning of it as it can be shown.
    """

    def __init__(
        self, connection: Redis, queues: Sequence[Queue], worker_name: str, refused: Callable[[str], None]
    ) -> None:
        self._connection = connection
        self._queues = list(queues)
        self._keys = [WORKERS_SUSPENDED]
        for queue in queues:
            self._keys += (queue.key, claimed_key(worker_name, queue.name))
        self._worker_name = worker_name
        self._refused = refused
        self._turn = 0
        # For each priority, which of its queues is looked at first.
        self._firsts = [0] * len(PRIORITIES)
        self._each = len(self._queues) // len(PRIORITIES)
        # The queues whose keys are no lists, with the time until which they are not waited for.
        self._unfit: dict[str, float] = {}
        self._waiting: list[_Waiting] = []
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def urgency(self, queue: Queue) -> int:
        """Return how urgent the jobs of one of the queues are; more for the more urgent ones."""
        return -(self._queues.index(queue) // self._each)

    def add_claim(self, pipeline: Pipeline, most: int, running: int) -> None:
        """Add to a pipeline the claim of at most `most` jobs, by a worker that has `running` jobs already.

        `read` takes the reply.
        """
        _CLAIM.add(pipeline, self._keys, self._arguments(most, running))

    def read(self, reply: Sequence[Any] | None) -> list[Claim]:
        """Return the jobs that the reply to a claim names; none while workers are suspended."""
        if reply is None:
            return []
        numbers = [int(number) for number in reply[::2]]
        for number in numbers:
            self._note_turn(number)
        return self._decode([(self._queues[at], raw) for at, raw in zip(numbers, reply[1::2], strict=True)])

    def _note_turn(self, number: int) -> None:
        """Note that a job was claimed of the queue of this number: of the same priority, the next one comes first."""
        self._turn += 1
        priority, at = divmod(number, self._each)
        self._firsts[priority] = (at + 1) % self._each

    def _arguments(self, most: int, running: int) -> list[int]:
        return [most, self._turn, running, LAST_EVERY, SECOND_EVERY, *self._firsts]

    def claim(self, most: int) -> list[Claim] | None:
        """Claim at most `most` jobs that are there now, for a worker that has none; None if workers are suspended."""
        reply = _CLAIM.run(self._connection, self._keys, self._arguments(most, 0))
        return None if reply is None else self.read(reply)

    def list_all(self, held: Iterable[Claim]) -> list[Claim]:
        """Return all that Redis has as claimed by this worker, in the order in which it was claimed.

        Also what this worker never heard of, because the reply to its claim was lost; and what it runs. A list that is
        none is mended on the way.

        Args:
            held: as `mend` takes it.
        """
        with self._connection.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                pipeline.lrange(claimed_key(self._worker_name, queue.name), 0, -1)
            lists = check_replies(pipeline.execute(raise_on_error=False))
        if None in lists:
            self.mend(held)
        return self._decode([(queue, raw) for queue, ids in zip(self._queues, lists, strict=True) for raw in ids or ()])

    def mend(self, held: Iterable[Claim]) -> None:
        """Delete what stands under the names of this worker's lists and is none; then they name what it holds.

        Args:
            held: the jobs that this worker has.
        """
        keys = [claimed_key(self._worker_name, queue.name) for queue in self._queues]
        with self._connection.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.type(key)
            kinds = pipeline.execute()
        for queue, key, kind in zip(self._queues, keys, kinds, strict=True):
            if kind in (b"list", b"none"):
                continue
            tell(key, f"a {kind.decode()}, no list", "it was deleted, as only this worker writes there")
            with self._connection.pipeline() as pipeline:
                pipeline.delete(key)
                ids = [job_id for of, job_id in held if of == queue]
                if ids:
                    pipeline.rpush(key, *ids)
                pipeline.execute()

    def put_back(self, claims: Sequence[Claim]) -> None:
        """Put claimed jobs back to the front of their queues; what cannot be put back stays claimed."""
        for queue in self._queues:
            ids = [job_id for of, job_id in reversed(claims) if of == queue]
            if ids:
                keys = queue.key, claimed_key(self._worker_name, queue.name)
                left = len(ids) - int(_PUT_BACK.run(self._connection, keys, ids))
                if left:
                    log.warning("%s: %s cannot be put back into %s", self._worker_name, counted(left, "job"), queue.key)

    def wait(self, seconds: float, most: int) -> list[Claim]:
        """Wait for a job, where `claim` has found none. Return none when the time is over or `wake` was called.

        One BLMOVE for each queue, each on a connection of its own: to wait for several lists at once, Redis has only
        commands that take from them without leaving a trace. The connections that were not served are unblocked again,
        so that nothing is claimed later. Several may be served at the same moment: all but `most` are put back.
        """
        while len(self._waiting) < len(self._queues):
            at = len(self._waiting)
            self._waiting.append(_Waiting(self._connection, self._queues[at], at, self._worker_name))
        now = time.monotonic()
        waitings = [each for each in self._waiting if self._unfit.get(each.queue.name, 0.0) <= now]
        try:
            for waiting in waitings:
                waiting.begin()
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake_reader, selectors.EVENT_READ)
                for waiting in waitings:
                    selector.register(waiting.fileno(), selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(seconds)}
            with self._connection.pipeline(transaction=False) as pipeline:
                for waiting in waitings:
                    if waiting.fileno() not in ready:
                        pipeline.client_unblock(waiting.client_id)
                pipeline.execute()
            ended = [(each, each.end()) for each in waitings]
        except BaseException:
            self.close_connections()
            raise
        finally:
            with suppress(BlockingIOError):
                while os.read(self._wake_reader, 64):
                    pass
        for waiting, outcome in ended:
            if isinstance(outcome, ResponseError):
                self._leave_out(waiting.queue, outcome)
        served = [(waiting, raw) for waiting, raw in ended if isinstance(raw, bytes)]
        for waiting, _ in served:
            self._note_turn(waiting.number)
        claims = self._decode([(waiting.queue, raw) for waiting, raw in served])
        self.put_back(claims[most:])
        return claims[:most]

    def _leave_out(self, queue: Queue, reason: ResponseError) -> None:
        """Wait no more for a queue of which nothing can be claimed, for a while.

        Raises:
            ResponseError: Redis cannot serve, whatever stands there.
        """
        if not is_of_entry(reason):
            raise reason
        self.mend([])
        if self._connection.type(queue.key) not in (b"list", b"none"):
            tell(queue.key, reason, "no job of this queue can be taken")
            self._unfit[queue.name] = time.monotonic() + UNFIT_SECONDS

    def wake(self) -> None:
        """End a `wait`, from a signal handler or another thread."""
        with suppress(OSError):
            os.write(self._wake_writer, b"!")

    def close_connections(self) -> None:
        while self._waiting:
            self._waiting.pop().close()

    def close(self) -> None:
        self.close_connections()
        if self._wake_reader < 0:
            return
        reader, writer = self._wake_reader, self._wake_writer
        # The numbers may soon be another file's, and a signal may still come.
        self._wake_reader = self._wake_writer = -1
        os.close(reader)
        os.close(writer)

    def _decode(self, claims: Iterable[tuple[Queue, bytes]]) -> list[Claim]:
        """Return claims with their ids as text; what can be no job's id is set aside."""
        decoded: list[Claim] = []
        for queue, raw in claims:
            try:
                text = raw.decode("utf-8")
                reason = f"it has more than {MAX_ID_BYTES} bytes" if len(raw) > MAX_ID_BYTES else None
            except UnicodeDecodeError:
                reason = "it is no text in UTF-8"
            if reason is None:
                decoded.append((queue, text))
            else:
                set_aside(queue, raw, f"an entry that can be no job's id: {reason}", self._worker_name)
                self._refused(shown(raw))
        return decoded


class _Waiting:
    """A connection on which a BLMOVE waits for one queue, which has a number among the worker's queues."""

    def __init__(self, connection: Redis, queue: Queue, number: int, worker_name: str) -> None:
        self.queue, self.number = queue, number
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

    def end(self) -> bytes | ResponseError | None:
        """Return the id that came; None if the connection was unblocked; what Redis says if it cannot move any."""
        try:
            reply: bytes | None = self._connection.read_response()
        except ResponseError as reason:
            return reason
        return reply

    def close(self) -> None:
        with suppress(RedisError, OSError):
            self._connection.disconnect()
        self._pool.release(self._connection)
