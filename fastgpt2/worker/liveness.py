"""The signs that a worker lives: a lease in Redis that it renews each second, and a file that probes look at.

The workers of a pool watch each other's leases: each notices those that have lapsed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from redis.exceptions import ReadOnlyError, RedisError

from fastgpt2.errors import BadRequest
from fastgpt2.events import are_logged
from fastgpt2.process import stop_signals_held
from fastgpt2.protocol.keys import LEASE_SECONDS, WORKER_PREFIX, leases_key, models_key
from fastgpt2.protocol.scripts import Script

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")
BEAT_SECONDS = 1.0

# A worker is dead when its lease was found lapsed, and the same, at this many beats in a row: 15 to 18 s after its last
# renewal. The beats are by the looker's own clock, and only those that Redis answered count: if Redis's clock jumps, or
# Redis has been away, all leases lapse at once, and each worker that lives renews its own at its next beat.
LOOKS = 7

# A worker whose loop has stood still for this long is beyond help: no step takes as long.
STUCK_SECONDS = 300.0
STUCK_EXIT_CODE = 70

# How often the file for probes is touched.
TOUCH_SECONDS = 1.0
_BEAT = Script(__file__, "beat")


class Lease:
    """One worker's lease, renewed by a thread, which looks at the leases of the others at the same time.

    The lease has a thread because one step of a large model may take longer than a lease lasts. So that the thread does
    not keep a worker alive whose loop hangs, it ends the process if `note_turn` was not called for `STUCK_SECONDS`.

    Args:
        queue: the name of the pool's queue.
        dead: called, in the thread, with the name of a worker that has died and what stood in its lease.
        models: the names of this worker's model.

    Attributes:
        incarnation: tells this process from others that have the worker's name before or after it.
    """

    def __init__(
        self,
        connection: Redis,
        queue: str,
        worker_name: str,
        dead: Callable[[str, str], object],
        models: Sequence[str] = (),
    ) -> None:
        self.incarnation = uuid.uuid4().hex
        self._connection = connection
        self._keys = [leases_key(queue), f"{WORKER_PREFIX}{worker_name}", models_key(queue)]
        self._name = worker_name
        self._dead = dead
        self._models = models
        # For each lapsed lease what stands in it, and how often in a row just this was found.
        self._lapsed: dict[str, tuple[str, int]] = {}
        self._written = ""
        self._renewed_at = -math.inf
        self._turned_at = math.inf
        self._lost = threading.Event()
        self._taken = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_valid(self) -> bool:
        """True if this worker still counts as alive, by its own clock: one that does not claims no jobs."""
        return time.monotonic() - self._renewed_at < LEASE_SECONDS

    @property
    def is_taken(self) -> bool:
        """True if another process has this worker's name by now: this one was silent, and is to end."""
        return self._taken.is_set()

    def note_taken(self) -> None:
        """Note that another process has this worker's name: from now on it claims nothing."""
        self._renewed_at = -math.inf
        self._taken.set()

    def consume_loss(self) -> bool:
        """Tell whether this worker was taken for dead since the last call: its jobs may be another's now."""
        lost = self._lost.is_set()
        self._lost.clear()
        return lost

    def note_turn(self) -> None:
        """Note that the worker's loop goes round; see that the thread does, too."""
        self._turned_at = time.monotonic()
        if self._thread is not None and not self._thread.is_alive() and not self._ending.is_set():
            log.error("%s: the thread that renews the lease has ended; starting it again", self._name)
            self.start()

    def hold(self, leased: str, began: float) -> None:
        """Note the lease that signing on has brought, which was asked for at `began`, of `time.monotonic()`."""
        self._written, self._renewed_at = leased, began

    def start(self) -> None:
        """Renew the lease from now on, if it is not being renewed yet."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        with stop_signals_held():  # they are the main thread's, and interrupt what it waits for
            self._thread.start()

    def stop(self) -> None:
        """Renew the lease no more."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def beat(self) -> None:
        """Renew the lease, and look at those of the others."""
        began = time.monotonic()
        arguments = [self._name, int(LEASE_SECONDS * 1000), self.incarnation, *self._models]
        reply = _BEAT.run(self._connection, self._keys, arguments)
        before, written, previous = _text(reply[0]), _text(reply[1]), self._written
        if not written:
            self.note_taken()
            return
        self._written, self._renewed_at = written, began
        if previous and before != previous:
            self._lost.set()
        self._look([_text(word) for word in (*reply[2], *reply[3])])

    def _look(self, words: list[str]) -> None:
        """Count how often each lapsed lease was found: `words` are names, each followed by what its lease is."""
        lapsed: dict[str, tuple[str, int]] = {}
        for name, score in zip(words[::2], words[1::2], strict=True):
            known, count = self._lapsed.get(name, (score, 0))
            lapsed[name] = score, count + 1 if known == score else 1
        self._lapsed = lapsed
        for name, (score, count) in lapsed.items():
            if count >= LOOKS and name != self._name:
                self._lapsed[name] = score, 0
                self._dead(name, score)

    def _run(self) -> None:
        away = False
        while not self._ending.wait(BEAT_SECONDS):
            if time.monotonic() - self._turned_at > STUCK_SECONDS:
                log.critical("%s: nothing has moved for %.0f s; giving up", self._name, STUCK_SECONDS)
                _show_stacks()
                os._exit(STUCK_EXIT_CODE)
            try:
                self.beat()
                away = False
            except RedisError as reason:
                if not away:
                    log.warning("%s: the lease cannot be renewed (%s)", self._name, reason)
                away = True
                if isinstance(reason, ReadOnlyError):
                    # A master that has become a replica keeps its connections, and none of them is of use any more:
                    # a new one leads to the new master, where a name, a proxy or Sentinel knows it.
                    self._connection.connection_pool.disconnect(inuse_connections=False)
            except Exception:
                log.exception("%s: unforeseen; the lease is renewed all the same", self._name)


def _show_stacks() -> None:
    """Show where each thread stands, on standard error; where events are logged, as one."""
    if not are_logged():
        faulthandler.dump_traceback(sys.stderr)
        return
    with contextlib.suppress(OSError), TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        log.critical("where each thread stands", extra={"fields": {"traceback": file.read()}})


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class AliveFile:
    """A file that is there while a worker serves its queue, and touched while the worker's loop turns.

    It is for probes of `docker` and Kubernetes: to look at a file costs next to nothing, beside a process that asks
    Redis. Whether Redis is there does not matter to the file: a worker that waits for Redis must not be restarted for
    that, as it has jobs.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._touched_at = -TOUCH_SECONDS
        self._complained = False
        # A file that was left by a process which was killed, in a folder that outlived it, tells nothing of this one.
        self.remove()

    def create(self) -> None:
        """Create the file: the worker is ready.

        Raises:
            BadRequest: the file cannot be made.
        """
        try:
            self._path.touch()
        except OSError as reason:
            raise BadRequest(f"--alive-file {self._path}: cannot be made ({reason.strerror})") from None

    def note_turn(self) -> None:
        """Touch the file if it is time: the worker's loop goes round."""
        now = time.monotonic()
        if now - self._touched_at < TOUCH_SECONDS:
            return
        self._touched_at = now
        try:
            self._path.touch()
        except OSError as reason:
            if not self._complained:
                log.warning("--alive-file %s: cannot be touched (%s)", self._path, reason)
            self._complained = True

    def remove(self) -> None:
        """Remove the file: the worker has ended."""
        with contextlib.suppress(OSError):
            self._path.unlink()
