"""The set-up of every long-running process: its stop signals, its children, which do not outlive it, and its log."""

from __future__ import annotations

import ctypes
import logging
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1

# The limit of open files where the system has none; macOS allows this many.
MOST_OPEN_FILES = 10_240
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the stop signals; SIGHUP only if it is not ignored: nohup ignores it on a process's behalf."""
    for signum in STOP_SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


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


def set_up_child() -> None:
    """Take stop signals again, and on Linux be sent SIGTERM when the parent dies; call it between fork and exec.

    prctl(2) sees to the latter, in whatever way the parent dies. Elsewhere only workers notice, by looking for their
    supervisor.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def raise_open_file_limit() -> int:
    """Let this process have as many files open as it may: raise the soft limit to the hard one. Returns the limit.

    Most shells set a soft limit of 1,024, for programs that use select(2), which this package does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS knows no limit here, and refuses that as a value.
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return soft
    return wanted


def set_up_logging(level: str) -> None:
    """Log to standard error: this package from `level` on, the libraries' warnings with it."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fastgpt2").setLevel(level)
    # Has a handler of its own: its warnings would come twice.
    logging.getLogger("huggingface_hub").propagate = False
