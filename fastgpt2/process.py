"""Stop signals, and child processes that neither outlive their parent nor slip away from it."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the stop signals; SIGHUP only if it is not ignored: nohup ignores it on a process's behalf."""
    for signum in STOP_SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Put the stop signals off: a KeyboardInterrupt between a fork and the noting of its result loses the child."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_signal_came() -> bool:
    """Whether a stop signal has come while they are held; takes it."""
    pending = signal.sigpending() & set(STOP_SIGNALS)
    if pending:
        signal.sigwait(pending)
    return bool(pending)


def set_up_child() -> None:
    """In a child between fork and exec: take stop signals again, and on Linux be sent SIGTERM when the parent dies.

    prctl(2) does the latter, however the parent dies. Elsewhere only workers notice, by looking for their supervisor.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# NOTE logs: Logging of the commands that run for long: one handler on standard error.


def set_up_logging(level: str) -> None:
    """This package at `level`, the libraries' warnings with it."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fastgpt2").setLevel(level)
    # Has a handler of its own: its warnings would come twice.
    logging.getLogger("huggingface_hub").propagate = False
