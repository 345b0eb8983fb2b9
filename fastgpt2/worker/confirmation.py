"""The confirmation that what a worker has written outlasts the loss of its Redis: it is on disk, or on a replica.

A thread asks for it, so that no step of the decoder waits. In each of its rounds it sends, on a connection of its own,

    HMGET rq:job:a status worker_name ...    for each end that is not confirmed: is it in this Redis?
    SET fastgpt2:asked:worker-7 ...          a write behind all that was seen
    WAIT 1 1000                              until one replica has that write, and so all before it

or WAITAOF, which waits for the disk. All three reach the same Redis. So an end that was seen in a round which is then
confirmed is on two machines, or on disk. After a failover the round is asked of the new master; what it has lost, a job
that is still started by this worker under the execution that ended, is written again from the worker's memory.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastgpt2.plurals import counted
from fastgpt2.process import stop_signals_held
from fastgpt2.protocol import keys
from fastgpt2.protocol.connection import address_of
from fastgpt2.protocol.durability import DISK, MEMORY, REPLICA, confirming, count_confirmed, why_unfit
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.batch import Attempt

if TYPE_CHECKING:
    from redis import Redis

    from fastgpt2.errors import RedisUnfit

log = logging.getLogger("fastgpt2.worker")

# How long one round waits: shorter than Redis may be silent before it counts as away.
ROUND_SECONDS = 1.0

# A delay that is worth a line in the log, once in a while.
LATE_SECONDS = 5.0
LOG_SECONDS = 60.0

# How long an end that Redis has, and does not confirm, is held at most, and how many: a pool goes on for as long as its
# replica is away. While Redis itself is away, no time is up.
CONFIRM_SECONDS = 60.0
MOST_HELD = 1000

# What is left at the end of a stopping worker's time, such as the jobs that it gave back then, has this much more.
LAST_SECONDS = 2.0
RETRY_SECONDS = 1.0
MARK_TTL_SECONDS = 60


@dataclass(eq=False, slots=True)
class Written:
    """What a worker has written of a job, and nobody has confirmed yet.

    Attributes:
        again: writes it again, if the job is still this worker's.
        at: when it was written, on `time.monotonic`'s clock.
        is_confirmed: it will last.
        is_missing: Redis has lost it.
        is_short: Redis has it, and did not confirm when it was asked.
    """

    attempt: Attempt
    again: Callable[[], object]
    at: float = field(default_factory=time.monotonic)
    is_confirmed: bool = False
    is_missing: bool = False
    is_short: bool = False


class Confirmation:
    """The confirmation of one worker's ends and give-backs; with the durability `memory`, none is asked for.

    All methods are the main thread's.

    Args:
        unconfirmed: called with the number of the ends that are let go of without confirmation.
    """

    def __init__(
        self, connection: Redis, durability: str, worker_name: str, unconfirmed: Callable[[int], None]
    ) -> None:
        self._connection = connection
        self._durability = durability
        self._name = worker_name
        self._unconfirmed = unconfirmed
        # By the ids of the executions. The thread reads it; whoever changes it holds the lock.
        self._held: dict[str, Written] = {}
        self._lock = threading.Lock()
        self._something, self._round_over, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._until = math.inf
        self._said_at = self._told_at = -math.inf
        self._let_go_of = 0

    def __len__(self) -> int:
        """Return how many ends and give-backs are not confirmed yet."""
        return len(self._held)

    def __iter__(self) -> Iterator[Attempt]:
        return (written.attempt for written in self._held.values())

    def check(self) -> None:
        """Ask Redis whether it can confirm what will be asked for.

        Raises:
            RedisUnfit: it cannot, and never will as it is.
        """
        if self._durability == MEMORY:
            return
        try:
            self._connection.execute_command(*confirming(self._durability, 0.001))  # type: ignore[no-untyped-call]
        except RedisError as reason:
            if unfit := self._why_unfit(reason):
                raise unfit from None
            # It is away for now; whether it can is told when it is back.

    def hold(self, attempt: Attempt, again: Callable[[], object]) -> None:
        """Hold what was just written of a job until it is confirmed; `again` writes it again if Redis loses it."""
        if self._durability == MEMORY:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="confirmation", daemon=True)
            with stop_signals_held():  # they are the main thread's, and interrupt what it waits for
                self._thread.start()
        with self._lock:
            self._held[attempt.execution.id] = Written(attempt, again)
            self._something.set()
        if len(self._held) > MOST_HELD:
            self._let_go([next(iter(self._held))], f"more than {MOST_HELD} wait for it")

    def settle(self) -> None:
        """Take note of what was confirmed, write again what Redis has lost, and let go of what waits for too long.

        Raises:
            RedisError: Redis cannot be reached; what is to be written again is kept.
        """
        self._round_over.clear()
        now = time.monotonic()
        late = []
        for execution, written in list(self._held.items()):
            if written.is_confirmed:
                self._drop(execution)
            elif written.is_missing:
                self._write_again(execution, written)
            elif now > self._until or (written.is_short and now - written.at > CONFIRM_SECONDS):
                late.append(execution)
        if late:
            stops = now > self._until
            self._let_go(late, "the worker stops" if stops else f"Redis has not confirmed for {CONFIRM_SECONDS:.0f} s")

    def wait(self, seconds: float) -> None:
        """Wait for the end of a round, if there is anything to confirm."""
        if self._held:
            self._round_over.wait(seconds)

    def hurry(self) -> None:
        """Note that the worker's time is up: nothing is held for longer than a moment from now on."""
        self._until = min(self._until, time.monotonic() + LAST_SECONDS)

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self._something.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * ROUND_SECONDS)

    def _write_again(self, execution: str, written: Written) -> None:
        log.warning(
            "%s: Redis has lost how job %s ended; it is written again",
            self._name,
            written.attempt.id,
            extra=written.attempt.log_extra,
        )
        try:
            written.again()
            written.at = time.monotonic()
            written.is_missing = False
        except RedisError as reason:
            if not is_of_entry(reason):
                raise
            log.warning(
                "%s: the end of job %s cannot be written again (%s)",
                self._name,
                written.attempt.id,
                reason,
                extra=written.attempt.log_extra,
            )
            self._drop(execution)
        except Exception:
            log.exception(
                "%s: the end of job %s cannot be written again",
                self._name,
                written.attempt.id,
                extra=written.attempt.log_extra,
            )
            self._drop(execution)

    def _drop(self, execution: str) -> None:
        with self._lock:
            del self._held[execution]

    def _let_go(self, executions: list[str], why: str) -> None:
        """Hold some ends no longer; say so once in a while, and before the worker ends."""
        for execution in executions:
            self._drop(execution)
        self._unconfirmed(len(executions))
        self._let_go_of += len(executions)
        now = time.monotonic()
        if now - self._told_at > LOG_SECONDS or now > self._until:
            ended = counted(self._let_go_of, "job has ended", "jobs have ended")
            what = f"is written, and no longer held although --durability {self._durability} is not confirmed"
            log.warning("%s: %s, which %s: %s", self._name, ended, what, why)
            self._told_at, self._let_go_of = now, 0

    # The thread's part.

    def _run(self) -> None:
        while not self._ending.is_set():
            with self._lock:
                held = [written for written in self._held.values() if not written.is_confirmed]
                if not held:
                    self._something.clear()
            if not held:
                self._something.wait()
                continue
            try:
                is_confirmed = self._ask(held)
            except RedisError as reason:
                unfit = self._why_unfit(reason)
                if unfit is not None:
                    for written in held:
                        written.is_short = True
                self._say(held, unfit or f"{reason}; it is asked again")
                self._ending.wait(RETRY_SECONDS)
            except Exception:
                log.exception("%s: unforeseen; confirmation is asked for again", self._name)
                self._ending.wait(RETRY_SECONDS)
            else:
                if not is_confirmed:
                    self._say(held, _REMEDIES[self._durability])
            self._round_over.set()

    def _ask(self, held: list[Written]) -> bool:
        """Take one round: find out what is missing, and whether the rest is confirmed. Return whether it is."""
        with self._connection.pipeline(transaction=False) as pipeline:
            for written in held:
                pipeline.hmget(written.attempt.rq_job.key, "status", "worker_name", keys.EXECUTION_FIELD)
            pipeline.set(keys.asked_key(self._name), len(held), ex=MARK_TTL_SECONDS)
            pipeline.execute_command(*confirming(self._durability, ROUND_SECONDS))  # type: ignore[no-untyped-call]
            replies: list[Any] = pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception) and not is_of_entry(reply):
                raise reply
        is_confirmed = count_confirmed(replies[-1]) >= 1
        for written, known in zip(held, replies, strict=False):
            if known == [b"started", self._name.encode(), written.attempt.execution.id.encode()]:
                written.is_missing = True
            elif is_confirmed:
                written.is_confirmed = True
            else:
                written.is_short = True
        return is_confirmed

    def _why_unfit(self, reason: RedisError) -> RedisUnfit | None:
        return why_unfit(f"Redis at {address_of(self._connection)}", self._durability, reason)

    def _say(self, held: list[Written], why: object) -> None:
        """Say in the log, once in a while, that confirmation is late."""
        now = time.monotonic()
        if now - min(written.at for written in held) > LATE_SECONDS and now - self._said_at > LOG_SECONDS:
            self._said_at = now
            ended, what = counted(len(held), "job has ended", "jobs have ended"), f"--durability {self._durability}"
            log.warning("%s: %s, which is not confirmed (%s): %s", self._name, ended, what, why)


_REMEDIES = {
    REPLICA: "no replica has them; start one, look why it lags (INFO replication), or use --durability memory",
    DISK: "they are not on disk; see whether that is full or slow (INFO persistence), or use --durability memory",
}
