"""The files of a model's folder, opened and read as what somebody else has put there.

Only a regular file is opened, since a pipe is waited for and a device has no end; what is looked at is the file that
was opened, whatever takes its name meanwhile. Whatever is read has a bound. A file that cannot be read is one sentence.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt2.errors import FastGPT2Error
from fastgpt2.fields import why_no_json

# Without the second flag, a pipe that took the file's name a moment ago would be waited for.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class SpecialFile(OSError):
    """Raised for a folder, a pipe, a socket or a device in place of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "a folder, pipe or device; put the model's file in its place", str(path))


def open_file(path: Path) -> int:
    """Return the descriptor of a regular file, for reading.

    Raises:
        SpecialFile: it is something else. To open a device could do something by itself, so none is.
        OSError: it cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise SpecialFile(path)
    fd = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SpecialFile(path)
    return fd


def read_file(path: Path, max_bytes: int, error: type[FastGPT2Error]) -> bytes:
    """Return the bytes of a file of at most `max_bytes`; raise `error`, naming the file, if that cannot be done."""
    try:
        fd = open_file(path)
        size = os.fstat(fd).st_size
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            if size <= max_bytes:
                data = file.read(size)  # and no more, if it grows meanwhile
    except OSError as reason:
        raise error(why_not_read(path, reason)) from None
    if size > max_bytes:
        raise error(f"{path}: {size} bytes; a file of this kind has at most {max_bytes}")
    return data


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file that has bytes, read-only.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    fd = open_file(path)
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)


def path_of(fd: int) -> Path:
    """Return a path that leads to an open file, whatever has its name by now."""
    return Path(f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}")


def why_not_read(path: Path, reason: OSError) -> str:
    """Return the sentence for a file that cannot be read."""
    if isinstance(reason, FileNotFoundError):
        return f"{path}: no such file"
    if isinstance(reason, SpecialFile):
        return f"{path}: {reason.strerror}"
    return f"{path}: cannot be read ({reason.strerror or reason})"


def parse_json(data: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value that a JSON text in UTF-8 stands for.

    Raises:
        ValueError: it is none, or one that Python does not read; the message is a part of a sentence.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as reason:
        raise ValueError(why_no_json(reason)) from None
