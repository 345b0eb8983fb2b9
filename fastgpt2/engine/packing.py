"""A packed file (`pack_plan.py`), written once by whichever process comes first and mapped by every other."""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.arena import anonymous_file
from fastgpt2.engine.cache import locked
from fastgpt2.engine.checkpoint import Checkpoint, map_file, read_metadata
from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.pack_plan import CHUNK_BYTES, FORMAT, Layout, Plan, Stored
from fastgpt2.errors import CheckpointError

log = logging.getLogger("fastgpt2.engine")

Array = NDArray[np.float32]

SUFFIX = f".v{FORMAT}.safetensors"


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed file, mapped.

    Attributes:
        tensors: its tensors.
        path: where it lies, None for memory of this process and its helpers only.
        fd: an open descriptor, for a helper to inherit. Closed with this object.
    """

    tensors: Checkpoint
    path: Path | None
    fd: int

    def __del__(self) -> None:
        os.close(self.fd)

    def touch(self) -> None:
        """Enter all pages into this process's page table at once, where the system can (Linux 5.14)."""
        self.tensors.populate()


def pack_path(folder: Path, checkpoint: Checkpoint, model: str, layout: Layout) -> Path:
    """Where the packed file of a checkpoint is or belongs: another name for another source or layout.

    The model's name in it is for people: a file made under another name of the same source is the one.
    """
    end = f"-{checkpoint.identity}-{layout.name}{SUFFIX}"
    return next(folder.glob(f"*{end}"), folder / f"{_slug(model)}{end}")


def packed_in_cache(
    path: Path, checkpoint: Checkpoint, config: GPT2Config, model: str, layout: Layout, progress: bool = False
) -> Packed:
    """The packed file, made if it is not there by whichever process comes first; the others wait for it.

    Raises:
        CheckpointError: a tensor of the checkpoint is missing, surplus or misshapen.
        OSError: the file can neither be read nor written.
    """
    plan = Plan.of(checkpoint, config, layout)
    found = _open(path, plan)
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        # Whoever held the lock before may have made it.
        found = _open(path, plan)
        if found is None:
            if path.exists():
                log.warning("%s is damaged; packing anew", path)
            started = perf_counter()
            _write(path, plan, model, progress)
            log.info("packed %s in %.1f s", path, perf_counter() - started)
            found = _open(path, plan)
    if found is None:
        raise OSError("the file written a moment ago cannot be read")
    return found


def packed_in_memory(checkpoint: Checkpoint, config: GPT2Config, model: str, layout: Layout) -> Packed:
    """The same in memory of this process, which only its own helpers share.

    Raises:
        CheckpointError: as `packed_in_cache`.
        OSError: there is not so much memory.
    """
    plan = Plan.of(checkpoint, config, layout)
    fd = anonymous_file("fastgpt2-weights")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            plan.write(file, model, 0, lambda _count: None)
        return open_packed(fd)
    except BaseException:
        os.close(fd)
        raise


def open_packed(fd: int, path: Path | None = None) -> Packed:
    """Map a packed file by its descriptor, which is the result's from now on.

    Raises:
        CheckpointError: it is damaged.
    """
    source = path or Path(f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}")
    tensors, mapped = map_file(source)
    return Packed(Checkpoint(tensors, {source: mapped}), path, fd)


def _open(path: Path, plan: Plan) -> Packed | None:
    """The packed file, if it is there, whole, and what the plan says."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        packed = open_packed(fd, path)
    except CheckpointError:
        os.close(fd)
        return None
    tensors = {name: Stored(info.dtype, info.shape) for name, info in packed.tensors.tensors.items()}
    metadata = read_metadata(path)
    as_planned = tensors == plan.tensors and metadata.get("source_identity") == plan.checkpoint.identity
    return packed if as_planned and _unharmed(path, fd, metadata) else None


def _unharmed(path: Path, fd: int, metadata: dict[str, str]) -> bool:
    """Whether the bytes are those that were written.

    The file's time of change is set to a whole second, noted in the file, when it is complete. Whatever writes to it
    later, or copies it, leaves another time; then the checksum decides, and the time is set right.
    """
    sealed = int(metadata["sealed"]) if metadata.get("sealed", "").isdecimal() else -1
    if os.fstat(fd).st_mtime_ns == sealed:
        return True
    if f"{checksum(fd):08x}" != metadata.get("crc32"):
        return False
    try:
        os.utime(path, ns=(sealed, sealed))
    except (OSError, OverflowError, ValueError):
        log.info("%s was copied or touched; on a file system that can be written it need not be checked again", path)
    return True


def checksum(fd: int) -> int:
    """CRC-32 of a packed file's tensors."""
    crc = 0
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        while piece := file.read(CHUNK_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def _write(path: Path, plan: Plan, model: str, progress: bool) -> None:
    """Stream the tensors into a file that gets its name when it is whole and on the disk."""
    import shutil

    free = shutil.disk_usage(path.parent).free
    if free < plan.data_bytes:
        raise OSError(errno.ENOSPC, f"{plan.data_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")
    temporary = path.with_suffix(".tmp")
    sealed = int(time.time()) * 10**9
    try:
        with temporary.open("wb") as file, _bar(plan.data_bytes, model, progress) as advance:
            plan.write(file, model, sealed, advance)
            file.flush()
            os.utime(file.fileno(), ns=(sealed, sealed))
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _bar(size: int, model: str, wanted: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar, where somebody looks."""
    if not wanted:
        yield lambda _count: None
        return
    from tqdm import tqdm

    with tqdm(total=size, desc=f"packing {model}", unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


def _slug(model: str) -> str:
    """The model's name as part of a file name, for people who look into the cache."""
    return "".join(c if c.isalnum() else "-" for c in model)[-60:].strip("-") or "model"
