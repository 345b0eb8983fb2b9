"""The folder that keeps packed weights and what was measured: where it is, and who may write in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`FASTGPT2_CACHE`, else `$XDG_CACHE_HOME/fastgpt2`, else `~/.cache/fastgpt2`.

    Raises:
        FileNotFoundError: there is no home folder.
    """
    explicit = os.environ.get("FASTGPT2_CACHE")
    folder = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgpt2"
    try:
        return folder.expanduser()
    except RuntimeError as reason:
        raise FileNotFoundError(f"{folder}: {reason}") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """An exclusive lock among processes, given up by the kernel however its holder ends.

    The holder may delete the file. Whoever waited for it then begins anew, with the file that has its name by now:
    else two processes could hold a lock of one name.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: the file cannot be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, fd):
                yield
                return
        finally:
            os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds that lock now. Makes no file, and hinders nobody who asks the same."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _names(path: Path, fd: int) -> bool:
    """Whether the path leads to the open file, and not to another or to none."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False
