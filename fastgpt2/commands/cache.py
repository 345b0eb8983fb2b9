"""`fastgpt2 cache` lists the cache folder, or removes what is of no more use there.

It looks only at regular files directly in the folder, and only at those whose names fastgpt2 gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastgpt2.engine.machine import MEASUREMENTS_FILE, MEASUREMENTS_LOCK, cache_folder, is_locked, locked
from fastgpt2.engine.model.checkpoint import MAX_HEADER_BYTES
from fastgpt2.engine.model.config import printable
from fastgpt2.engine.model.identity import weights_identity
from fastgpt2.engine.model.packing import FORMAT, checksum
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.plurals import counted

# The name of a packed file, of its lock, or of the file that is renamed to it when it is whole. The first format had no
# layouts.
_NAME = re.compile(
    r"(?P<model>.+)-(?P<identity>[0-9a-f]{16})(?:-(?P<layout>[\w-]+))?\.v(?P<format>\d+)\.(safetensors|lock|tmp)"
)
_CALIBRATION_TMP = re.compile(r"calibration\.\d+\.tmp")

# Measurements are written within milliseconds. The process id in the name may be that of another container.
_ABANDONED_SECONDS = 60.0

# Without this flag, a look at a file by this command would count as its last use. Linux has it, for the file's owner.
_NOATIME = getattr(os, "O_NOATIME", 0)


def run(values: dict[str, Any]) -> int:
    """Run the command.

    Raises:
        BadRequest: an option was given that only `prune` takes.
        FastGPT2Error: the folder cannot be read or written.
    """
    prunes = values["action"] == "prune"
    if not prunes and (values["all"] or values["dry_run"]):
        raise BadRequest("--all and --dry-run are for `fastgpt2 cache prune`; leave them out")
    try:
        folder = cache_folder()
    except OSError as reason:
        raise FastGPT2Error(f"there is no cache folder ({reason}); set FASTGPT2_CACHE to a folder") from None
    if prunes:
        _prune(folder, values["all"], values["dry_run"], values["json"])
    else:
        _list(folder, values["json"])
    return 0


def _list(folder: Path, as_json: bool) -> None:
    found = list_entries(folder)
    total = sum(entry.size for entry in found)
    if as_json:
        files = [entry.as_json() for entry in found]
        print(json.dumps({"folder": str(folder), "bytes": total, "files": files}, indent=2))
        return
    if not found:
        print(f"nothing in {folder}")
        return
    rows = [("MODEL", "LAYOUT", "SIZE", "CHANGED", "USED", "STATE", "FILE")]
    for entry in found:
        texts = (
            entry.model or "-",
            entry.layout or "-",
            _format_size(entry.size),
            _format_day(entry.changed),
            _format_day(entry.used),
        )
        rows.append((*texts, str(entry.state), str(entry.path)))
    widths = [max(len(printable(row[column])) for row in rows) for column in range(6)]
    for row in rows:
        cells = [printable(cell).ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, printable(row[6])]))
    print(f"{counted(len(found), 'file')}, {_format_size(total)}")


def _prune(folder: Path, everything: bool, dry_run: bool, as_json: bool) -> None:
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry, gone in prune(folder, everything, dry_run):
        (removed if gone else kept).append(entry)
        if as_json:
            continue
        if gone:
            verb = "would remove" if dry_run else "removed"
            print(f"{verb} {printable(str(entry.path))} ({entry.state}, {_format_size(entry.size)})")
        else:
            print(f"kept {printable(str(entry.path))}: it is being packed", file=sys.stderr)
    freed = sum(entry.size for entry in removed)
    if as_json:
        lists = {"removed": [entry.as_json() for entry in removed], "kept": [entry.as_json() for entry in kept]}
        print(json.dumps({"folder": str(folder), "dry_run": dry_run, "freed_bytes": freed, **lists}, indent=2))
    elif removed:
        print(f"{'would free' if dry_run else 'freed'} {_format_size(freed)}")
    else:
        print(f"nothing to remove in {folder}")


def _format_size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"


def _format_day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")


class State(StrEnum):
    """The state of a file in the cache, in the words of the list."""

    OK = "ok"
    BUSY = "being packed"
    DAMAGED = "damaged"
    OUTDATED = "outdated format"
    NEWER = "newer format"
    CHANGED = "source changed"
    GONE = "source gone"
    UNREADABLE = "unreadable"
    LEFTOVER = "leftover"


# Files of a newer release are of use to it. A file that cannot be read now may be another user's, or on a disk that is
# not mounted at the moment.
OF_NO_USE = frozenset({State.DAMAGED, State.OUTDATED, State.CHANGED, State.GONE, State.LEFTOVER})


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the cache.

    Attributes:
        changed, used: the moments of its last change and of its last use, in seconds since 1970, as the file system
            keeps them.
        model, layout, format: None for a file that is not a packed file.
    """

    path: Path
    state: State
    size: int
    changed: float
    used: float
    model: str | None = None
    layout: str | None = None
    format: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "state": str(self.state),
            "model": self.model,
            "layout": self.layout,
            "format": self.format,
            "bytes": self.size,
            "changed": datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds"),
            "used": datetime.fromtimestamp(self.used, UTC).isoformat(timespec="seconds"),
        }


def list_entries(folder: Path) -> list[Entry]:
    """Return the files in the cache by name; [] if the folder does not exist.

    Raises:
        FastGPT2Error: the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as reason:
        raise FastGPT2Error(f"the cache {folder} cannot be read ({reason.strerror or reason})") from None
    found = [_find_entry(path) for path in paths]
    return [entry for entry in found if entry is not None]


def prune(folder: Path, everything: bool = False, dry_run: bool = False) -> Iterator[tuple[Entry, bool]]:
    """Remove the files that are of no use, or `everything`; a packed file's lock goes with it.

    Yields:
        Each file in question, and whether it is removed, or with `dry_run` would be. A file that is being packed stays.

    Raises:
        FastGPT2Error: the folder cannot be read, or a file in it cannot be removed.
    """
    for entry in list_entries(folder):
        if entry.state is State.BUSY:
            yield entry, False
        elif everything or entry.state in OF_NO_USE:
            try:
                removed = dry_run or _remove(entry, everything)
            except BlockingIOError:
                yield entry, False
                continue
            except OSError as reason:
                raise FastGPT2Error(f"{entry.path} cannot be removed ({reason.strerror or reason})") from None
            if removed:
                yield entry, True


def _remove(entry: Entry, everything: bool) -> bool:
    """Remove a file, unless it has gone or has become of use since it was listed; tell whether it was removed.

    Raises:
        BlockingIOError: the file is being packed.
        OSError: the file cannot be removed.
    """
    path, lock = entry.path, entry.path.with_suffix(".lock")
    if not _NAME.fullmatch(path.name):
        path.unlink(missing_ok=True)
        if path.name == MEASUREMENTS_FILE:
            with contextlib.suppress(BlockingIOError), locked(lock, wait=False):
                lock.unlink()
        return True
    with locked(lock, wait=False):
        now = _inspect(path)
        removed = now is not None and (everything or now.state in OF_NO_USE)
        if removed and path != lock:
            path.unlink(missing_ok=True)
        if not _has_locked_file(lock):
            lock.unlink(missing_ok=True)
        return removed


def _find_entry(path: Path) -> Entry | None:
    """Return the entry of a file; None if the file is not the cache's, has gone, or is the lock of another file."""
    lock = path.with_suffix(".lock")
    if _NAME.fullmatch(path.name) and is_locked(lock):
        entry = _inspect(path, State.BUSY)
        return None if path == lock else entry
    return _inspect(path)


def _inspect(path: Path, state: State | None = None) -> Entry | None:
    """Return the same without a look at locks. A `state` that is known already is taken over."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    facts = (status.st_size, status.st_mtime, status.st_atime)
    parts = _NAME.fullmatch(path.name)
    if parts is None:
        if path.name == MEASUREMENTS_FILE:
            return Entry(path, State.OK, *facts)
        if path.name == MEASUREMENTS_LOCK:
            of_no_use = not (path.with_name(MEASUREMENTS_FILE).exists() or is_locked(path))
            return Entry(path, State.LEFTOVER, *facts) if of_no_use else None
        abandoned = _CALIBRATION_TMP.fullmatch(path.name) and time.time() - status.st_mtime > _ABANDONED_SECONDS
        return Entry(path, State.LEFTOVER, *facts) if abandoned else None
    if path.suffix == ".lock":
        return None if _has_locked_file(path) else Entry(path, State.LEFTOVER, *facts)
    known = (parts["layout"], int(parts["format"]))
    if path.suffix == ".tmp":
        return Entry(path, state or State.LEFTOVER, *facts, parts["model"], *known)
    found, model = _read_state(path, parts)
    return Entry(path, state or found, *facts, model or parts["model"], *known)


def _has_locked_file(lock: Path) -> bool:
    """Tell whether the file exists that the lock is for."""
    return any(lock.with_suffix(suffix).exists() for suffix in (".safetensors", ".tmp"))


def _read_state(path: Path, parts: re.Match[str]) -> tuple[State, str | None]:
    """Return a packed file's state, and its model's name if that can be read."""
    model = None
    fd = -1
    try:
        fd = _open(path)
        metadata = _read_metadata(fd)
        model = None if metadata is None else metadata.get("model")
        if int(parts["format"]) != FORMAT:
            return State.OUTDATED if int(parts["format"]) < FORMAT else State.NEWER, model
        if metadata is None or metadata.get("source_identity") != parts["identity"]:
            return State.DAMAGED, model
        # As in `packing`: only if the time of change differs does the checksum need to be computed.
        if str(os.fstat(fd).st_mtime_ns) != metadata.get("sealed") and f"{checksum(fd):08x}" != metadata.get("crc32"):
            return State.DAMAGED, model
    except OSError:
        return State.UNREADABLE, model
    finally:
        if fd >= 0:
            os.close(fd)
    return _find_source_state(metadata), model


def _open(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags | _NOATIME)
    except PermissionError:
        return os.open(path, flags)


def _read_metadata(fd: int) -> dict[str, str] | None:
    """Return the texts in a packed file's header; None if it has none, or is not as long as the header says."""
    size = os.fstat(fd).st_size
    with os.fdopen(os.dup(fd), "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
            metadata = header.pop("__metadata__")
            stop = max(entry["data_offsets"][1] for entry in header.values())
            whole = 8 + length + stop == size
            return {str(key): str(value) for key, value in metadata.items()} if whole else None
        except (struct.error, ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
            return None


def _find_source_state(metadata: dict[str, str]) -> State:
    try:
        sources = [Path(name) for name in json.loads(metadata["source"])]
    except (KeyError, ValueError, TypeError, RecursionError):
        return State.DAMAGED
    try:
        for source in sources:
            source.stat()
    except (FileNotFoundError, NotADirectoryError):
        return State.GONE
    except OSError:
        return State.UNREADABLE
    if not all(os.access(source, os.R_OK) for source in sources):
        return State.UNREADABLE
    # As when it was packed: the sources are in that order.
    try:
        unchanged = weights_identity(sources, metadata.get("source_facts", "")) == metadata["source_identity"]
    except OSError:
        return State.UNREADABLE
    return State.OK if unchanged else State.CHANGED
