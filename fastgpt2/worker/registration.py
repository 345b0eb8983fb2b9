"""A worker's name: taken by one process at a time, kept, and given up.

RQ's own way of registering looks first and writes then: a worker whose connection breaks in between meets itself when
it tries again. Here each of the three is one script, which may run twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq.utils import now as utc_now
from rq.utils import utcformat

from fastgpt2.errors import BadRequest
from fastgpt2.process import has_surely_ended, pid_space
from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.liveness import LOOKS, Lease

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")

# What RQ adds to a worker's time to live, for a heartbeat that is late.
GRACE_SECONDS = 60
_SIGN_ON = Script(__file__, "sign_on")
_ANNOUNCE = Script(__file__, "announce")
_SIGN_OFF = Script(__file__, "sign_off")


class Registration:
    """The registration of one worker process under a name that may have been another's.

    A process that had the name before is dead if its lease has lapsed and stayed the same at as many looks, a second
    apart, as the workers of a pool take. So this is as sure as they are, whatever Redis's clock does. No look is needed
    if its process id is known to be nobody's any more. A live one renews its lease within a second or two, and keeps
    the name. If it was taken for dead all the same (it was stopped meanwhile, say), it finds another incarnation in its
    hash, renews no lease, and ends.

    Args:
        queue: the name of the pool's queue.
        queue_names: the names of the RQ queues that the worker serves. Whoever looks for the pool's workers finds it
            among those of the queue named as the pool, too.
        ttl: for how many seconds a heartbeat is good; the worker's hash expires `GRACE_SECONDS` later.
        lease: the worker's own; its `incarnation` tells this process from others of the name.
        reap: takes a dead worker's jobs back, by its name and its lease, unless the lease has changed.
    """

    def __init__(
        self,
        connection: Redis,
        queue: str,
        queue_names: Sequence[str],
        worker_name: str,
        ttl: int,
        lease: Lease,
        reap: Callable[[str, str], object],
    ) -> None:
        self._connection = connection
        self._name, self._ttl = worker_name, ttl + GRACE_SECONDS
        self._lease, self._reap = lease, reap
        hash_key = f"{keys.WORKER_PREFIX}{worker_name}"
        self._entries = [hash_key, f"{hash_key}{keys.EXECUTIONS_SUFFIX}", keys.WORKERS_KEY]
        self._workers_keys = [keys.workers_key(name) for name in dict.fromkeys((*queue_names, queue))]
        self._keys = [keys.leases_key(queue), *self._entries, *self._workers_keys]
        self._claimed_keys: list[str] = []
        # What stood in the lease of another process with this name, and at how many looks in a row.
        self._seen, self._looks = "", 0
        self._asked = False

    def take(self, fields: Mapping[str, Any], pool_queues: Sequence[str]) -> bool:
        """Register under the name and take the lease, if the name is free; take back what a dead worker left there.

        Args:
            fields: what the worker's hash is to hold.
            pool_queues: the names of all RQ queues of the pool: a dead worker of this name may have served others.

        Returns:
            False if it is not known yet whether another process of this name lives: look again, a second later.

        Raises:
            BadRequest: another worker has the name, and lives.
        """
        began = time.monotonic()
        self._asked = True
        self._claimed_keys = [keys.claimed_key(self._name, name) for name in pool_queues]
        ours = self._name, self._lease.incarnation, int(keys.LEASE_SECONDS * 1000), self._ttl, len(self._workers_keys)
        reply = _SIGN_ON.run(self._connection, [*self._keys, *self._claimed_keys], [*ours, *self._words(fields)])
        verdict, leased = reply[0], _text(reply[1])
        if verdict == 1:
            self._lease.hold(leased, began)
            return True
        valid_ms, (host, pid, space) = float(reply[2]), map(_text, reply[3:6])
        if verdict == -1 or (self._seen and leased != self._seen and valid_ms > 0):
            raise BadRequest(
                f"There exists an active worker named {self._name!r} already, process {pid or '?'} on {host or '?'}; "
                "give each worker a name of its own"
            )
        if has_surely_ended(pid, space) or self._is_dead(leased, valid_ms):
            self._take_back(leased)
            return self.take(fields, pool_queues)
        return False

    def _is_dead(self, leased: str, valid_ms: float) -> bool:
        """Tell whether the other's lease has lapsed, and was found as it is often enough."""
        if not self._seen:
            most = max(valid_ms / 1000, float(LOOKS)) + 1
            message = "%s: a worker of this name may still live; waiting until it surely does not, at most %.0f s"
            log.info(message, self._name, most)
        self._looks = self._looks + 1 if leased == self._seen else 1
        self._seen = leased
        return valid_ms <= 0 and self._looks >= LOOKS

    def _take_back(self, leased: str) -> None:
        """Take back what the dead worker had; what cannot be stays in its lists, and is found there."""
        self._seen, self._looks = "", 0
        try:
            self._reap(self._name, leased)
        except Exception as reason:
            if isinstance(reason, RedisError) and not is_of_entry(reason):
                raise
            log.exception("%s: not all jobs of the dead worker of this name could be taken back", self._name)

    def announce(self, fields: Mapping[str, Any], channel: str) -> int | None:
        """Write the worker's entries anew; if another worker has the name by now, tell the lease instead.

        Returns:
            How many clients of this Redis listen to the channel; None if that is not known.
        """
        arguments = [self._lease.incarnation, self._ttl, channel, *self._words(fields)]
        reply = _ANNOUNCE.run(self._connection, [*self._entries, *self._workers_keys], arguments)
        if not reply[0]:
            self._lease.note_taken()
        return int(reply[1]) if reply[1] >= 0 else None

    def leave(self) -> None:
        """Give the name up. A worker that leaves claimed jobs behind keeps its lease, so that they are found."""
        if not self._asked:
            return
        arguments = [self._name, self._lease.incarnation, utcformat(utc_now()), len(self._workers_keys)]
        _SIGN_OFF.run(self._connection, [*self._keys, *self._claimed_keys], arguments)

    def _words(self, fields: Mapping[str, Any]) -> list[Any]:
        return [word for field in {**fields, keys.PID_SPACE_FIELD: pid_space()}.items() for word in field]


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
