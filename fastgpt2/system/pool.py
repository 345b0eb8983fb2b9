"""Supervised processes: started by exec, replaced when they end, with back-off when they die, stopped together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial as bound
from typing import Self

from fastgpt2.errors import BadRequest, FastGPT2Error, ModelError, RedisUnfit
from fastgpt2.process import set_up_child, stop_signal_came, stop_signals_held
from fastgpt2.protocol.keys import DIED, ENDED

log = logging.getLogger("fastgpt2.pool")

# A process that lived this long has shown that it can; its next death starts the back-off anew.
HEALTHY_SECONDS = 30.0
MAX_BACK_OFF_SECONDS = 30.0
MAX_QUICK_DEATHS = 5

# How often in a row a worker may die while it has jobs, having finished none: of several jobs that workers die of, each
# is given up after a few deaths, but a machine on which every job ends so must not use up a whole queue.
MAX_DEATHS_AT_WORK = 12

# A process that ends with status 0 is replaced at once, but its starts are at least this far apart.
START_PAUSE_SECONDS = 1.0

# After this many ends with status 0 in a row, each within START_PAUSE_SECONDS, they count as deaths.
MAX_QUICK_ENDS = 5

# A process that says that its configuration or its model is at fault would only say so again.
FATAL_EXIT_CODES = frozenset({BadRequest.exit_code, ModelError.exit_code})


@dataclass(eq=False, slots=True)
class Child:
    """One supervised process.

    Attributes:
        name: how the log calls it.
        command: its argument list; secrets go into `environment`, which other users cannot read.
        stops_first: it is told to stop before the others, which still serve it meanwhile.
        ends_soon: it has been told to end of itself (`--max-jobs`), so that ending soon is no sign of a fault.
        is_worker: the jobs that it has when it ends are to be taken back.
        rereads: it reads files again at SIGHUP, which does nothing to it before it can.
        output: the descriptor that it writes to, instead of this process's standard output and error.
        identity: the name of the process that runs, or ran last: a worker is told to go by it.
        restarts: how often a process was started in the first one's place.
        last_end: how the last process ended: one of `keys.RESTARTS`.
        process: None from the end of one process to the start of the next.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    stops_first: bool = False
    ends_soon: bool = False
    is_worker: bool = False
    rereads: bool = False
    output: int | None = None
    identity: str = ""
    restarts: int = 0
    last_end: str = ENDED
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    quick_deaths: int = 0
    deaths_at_work: int = 0
    quick_ends: int = 0
    restart_at: float = 0.0

    def start(self, now: float) -> None:
        """Start a process, under an identity of its own."""
        # Never the same again: what the last process left behind must not pass for this one's.
        self.identity = f"{socket.gethostname()}.{self.name.replace(' ', '-')}.{uuid.uuid4().hex[:8]}"
        own = {"FASTGPT2_NAME": self.identity, "FASTGPT2_RESTARTS": str(self.restarts)} if self.is_worker else {}
        # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which then stops all in order.
        with stop_signals_held():
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                start_new_session=True,
                preexec_fn=bound(set_up_child, self.rereads),
            )
        self.started_at = now

    def signal(self, signum: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the process to end. Return whether it has."""
        if self.process is not None:
            try:
                self.process.wait(max(0.0, seconds))
            except subprocess.TimeoutExpired:
                return False
        return True


class ChildFailed(FastGPT2Error):
    """A child ended for a reason that trying again does not mend; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Pool:
    """A pool supervises children: `start`, then `check(now)` again and again, then `stop`.

    Attributes:
        reap: called with the identity of each worker whose process has ended, in whatever way, and whether it died:
            only then it may have left jobs behind without a word.
        count_restart: called when a worker is started in the place of another, with the way in which that one ended.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        self.children = list(children)
        self.reap: Callable[[str, bool], None] = lambda _identity, _died: None
        self.count_restart: Callable[[str], None] = lambda _how: None

    def start(self) -> None:
        now = time.monotonic()
        for child in self.children:
            child.start(now)

    def note_recovery(self, identity: str, had_jobs: bool, finished: int) -> None:
        """Note, from another thread, whether a worker that has ended had jobs: one that had has started well.

        Args:
            finished: how many jobs it had finished before.
        """
        for child in self.children:
            if child.identity == identity and had_jobs:
                child.quick_deaths = 0
                child.deaths_at_work = 1 if finished else child.deaths_at_work + 1

    def check(self, now: float) -> None:
        """Replace whatever has ended, and restart whatever has died and waited long enough.

        Raises:
            FastGPT2Error: a child cannot be kept alive: it ended with a fatal status, or died too often too soon.
        """
        for child in self.children:
            if child.process is not None:
                status = child.process.poll()
                if status is None:
                    continue
                child.process = None
                if child.is_worker:
                    self.reap(child.identity, _died(status))
                orderly = _is_orderly_end(child, status, now)
                child.last_end = ENDED if orderly else DIED
                if not orderly:
                    _back_off(child, status, now)
            if now >= child.restart_at:
                child.restarts += 1
                child.start(now)
                if child.is_worker:
                    self.count_restart(child.last_end)

    def stop(self, patience: float) -> None:
        """Tell all to end; tell them again if that takes longer than `patience`, in seconds; then kill.

        A stop signal that is held back (see `stop_signals_held`) ends the patience of the stage that it comes in.
        """
        first = [child for child in self.children if child.stops_first]
        self._signal_and_wait(first, signal.SIGTERM, patience)
        for signum, seconds in ((signal.SIGTERM, patience), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            self._signal_and_wait(self.children, signum, seconds)
        for child in self.children:
            if child.is_worker and child.process is not None and child.wait(0):
                self.reap(child.identity, _died(child.process.returncode))

    def _signal_and_wait(self, children: Sequence[Child], signum: int, seconds: float) -> None:
        alive = [child for child in children if not child.wait(0)]
        for child in alive:
            child.signal(signum)
        deadline = time.monotonic() + seconds
        while alive and time.monotonic() < deadline and not stop_signal_came():
            alive[0].wait(0.05)
            alive = [child for child in alive if not child.wait(0)]


class ProcessGroup(ABC):
    """Processes that are started together, one after the other, and stopped in the opposite order.

    A context manager: it is entered when all serve, and stops what was started when it is left, or cannot be entered.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @abstractmethod
    def _start(self) -> None:
        """Start everything, each with what stops it on the stack, and wait until it serves."""

    def stop(self) -> None:
        """Stop everything. A stop signal meanwhile hurries it."""
        with stop_signals_held():
            self._stack.close()


def _died(status: int) -> bool:
    """Tell whether a worker ended without a word. Only one that still loads ends by SIGTERM: the others handle it."""
    return status not in (0, -signal.SIGTERM, *FATAL_EXIT_CODES)


def _is_orderly_end(child: Child, status: int, now: float) -> bool:
    """Tell whether a child that nobody stopped ended because it was done; if so, let another start at once."""
    if status != 0:
        return False
    quick = now - child.started_at < START_PAUSE_SECONDS and not child.ends_soon
    child.quick_ends = child.quick_ends + 1 if quick else 0
    if child.quick_ends >= MAX_QUICK_ENDS:
        return False
    if not quick:
        child.quick_deaths = 0
    child.restart_at = child.started_at + START_PAUSE_SECONDS
    log.info("%s has ended; starting another", child.name)
    return True


def _back_off(child: Child, status: int, now: float) -> None:
    """Say when a child that died is to be started again.

    Raises:
        FastGPT2Error: it is not: trying again would not help, or did not.
    """
    names = {each.value: each.name for each in signal.Signals}  # real-time signals have none
    signum = names.get(-status, f"signal {-status}")
    how = f"was killed by {signum}" if status < 0 else f"ended with status {status}"
    if status in FATAL_EXIT_CODES:
        raise ChildFailed(f"{child.name} {how}; its message above says why", status)
    child.quick_deaths = 1 if now - child.started_at > HEALTHY_SECONDS else child.quick_deaths + 1
    if child.quick_deaths > MAX_QUICK_DEATHS:
        message = f"{child.name} {how}, {child.quick_deaths} times in a row; giving up"
        # A Redis that denies access may be about to read its users; in the end it was no blip.
        raise ChildFailed(message, status) if status == RedisUnfit.exit_code else FastGPT2Error(message)
    if child.deaths_at_work >= MAX_DEATHS_AT_WORK:
        raise FastGPT2Error(f"{child.name} {how}, and has died {child.deaths_at_work} times over jobs; giving up")
    back_off = min(MAX_BACK_OFF_SECONDS, 0.5 * 2 ** (child.quick_deaths - 1))
    child.restart_at = now + back_off
    log.warning("%s %s; starting it again in %.1f s", child.name, how, back_off)
