"""The set-up of every long-running process: its stop signals, its children, its open files, its log.

And whether another process is still there.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType

from fastgpt2.events import EventFormatter, are_logged, event_handler

log = logging.getLogger("fastgpt2")

# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1

# How long a waiter may take to see that a flag was set.
NAP_SECONDS = 0.02

# A line of the log is no longer, and control characters in it are shown as \x0a: they might forge a line of their own.
# So might Unicode's line ends for some readers; and what turns the direction of text shows another line than there is.
MAX_LOG_CHARACTERS = 4000
_UNSEEN = (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(10, 32), *range(127, 160))}
_CONTROLS |= {code: f"\\u{code:04x}" for code in _UNSEEN}
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the stop signals; SIGHUP only if it is not ignored: nohup ignores it on a process's behalf."""
    for signum in STOP_SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def has_terminal() -> bool:
    """Tell whether this process can be reached from a terminal: it was started in one that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class HangUp:
    """The two meanings of SIGHUP: the terminal was closed, or somebody asks to read files again.

    It is the former if there was a terminal when this was made, and is none now, or within `_LATER_SECONDS`: some
    shells send the signal to their jobs first, and end then. A program that nohup started never stops by it.

    Attributes:
        asks: set when the signal came and the terminal is not known to be closed; whoever reads the files clears it.
    """

    _LATER_SECONDS = 5.0

    def __init__(self) -> None:
        self._had_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and has_terminal()
        self._came_at = -math.inf
        self.asks = False

    def listen(self) -> None:
        """Take the signal from now on, in place of its end of this process."""
        signal.signal(signal.SIGHUP, self._take)

    def _take(self, _signum: int, _frame: FrameType | None) -> None:
        self._came_at = time.monotonic()
        self.asks = True

    def is_stop(self) -> bool:
        """Tell whether the signal has come as the terminal was closed."""
        recently = time.monotonic() - self._came_at < self._LATER_SECONDS
        return recently and self._had_terminal and not has_terminal()


class StopFlag:
    """A flag that a signal handler may set, as often as it likes.

    An Event of threading takes a lock to be set. A signal that comes while its own thread holds that lock, as a second
    SIGTERM does right after the first, would wait for it for ever.
    """

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Wait until the flag is set, for at most this long; return whether it is."""
        deadline = time.monotonic() + seconds
        while not self._is_set and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, NAP_SECONDS))
        return self._is_set


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Hold the stop signals back: a KeyboardInterrupt between a fork and the noting of its result loses the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_signal_came() -> bool:
    """Tell whether a stop signal has come while they are held, and take it."""
    pending = signal.sigpending() & set(STOP_SIGNALS)
    if pending:
        signal.sigwait(pending)
    return bool(pending)


def set_up_child(ignores_hang_up: bool = False) -> None:
    """Take stop signals again, and on Linux be sent SIGTERM when the parent dies; call it between fork and exec.

    With `ignores_hang_up`, SIGHUP does nothing to the child until it takes it itself.

    prctl(2) sees to the latter, in whatever way the parent dies. Elsewhere only workers notice, by looking for their
    supervisor.
    """
    if ignores_hang_up:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _OneLine(logging.Formatter):
    """A message is one line, not too long: what it quotes, such as a job's id, may be anything. Tracebacks follow."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        text = super().formatMessage(record)
        if len(text) > MAX_LOG_CHARACTERS:
            text = f"{text[:MAX_LOG_CHARACTERS]}... ({len(text)} characters)"
        return text.translate(_CONTROLS)


def set_up_logging(level: str, handler: logging.Handler | None = None) -> None:
    """Log to standard error, or by a handler: this package from `level` on, the libraries' warnings with it.

    Lines are text, or events where `events.log_events` was called.
    """
    if are_logged():
        handler = handler or event_handler()
        handler.setFormatter(EventFormatter())
    else:
        handler = handler or logging.StreamHandler(sys.stderr)
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fastgpt2").setLevel(level)
    # Has a handler of its own: its warnings would come twice.
    logging.getLogger("huggingface_hub").propagate = False


def raise_open_file_limit() -> int:
    """Let this process, and the children that it starts, have as many files and connections open as it may.

    In most shells a process may have 1,024 of them, the soft limit, and may raise that to the hard one itself.

    Returns:
        The limit from now on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as reason:  # macOS knows a lower limit of its own
            log.debug("the limit of open files stays at %d (%s)", soft, reason)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


@cache
def pid_space() -> str:
    """Return within what this process's id means a process: a boot of a machine, and a name space of process ids there.

    Two containers have the same host's name and process id more easily than one might think; never the same of these.
    Empty where the system does not say: not Linux, or a sandbox that imitates one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}" if boot else ""
    except OSError:
        return ""


def has_surely_ended(pid: str, space: str) -> bool:
    """Tell whether a process is known to be gone: False if it is there, or if that cannot be told from here.

    Args:
        pid, space: its id, and its own `pid_space`.
    """
    if not space or space != pid_space() or not re.fullmatch(r"[1-9][0-9]{0,8}", pid):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
