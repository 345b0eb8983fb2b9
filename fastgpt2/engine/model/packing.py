"""What a packed file consists of, before a byte of it is written.

It is a standard safetensors file with the checkpoint's own names. Weights of linear layers [K, N] are stored as panels
[n, K, P] (see `panels.py`), and so is the transpose of the token table, a column of which is a token's embedding;
biases are filled up with zeros to whole panels, other tensors to multiples of 64 bytes, so that every tensor is
aligned. Causal masks are left out. Panels may be bfloat16 or int8 instead of float32, the latter with a float32 tensor
of scales, `NAME.scales`, one a column.
"""

from __future__ import annotations

import errno
import json
import logging
import math
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
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.panels import STORED, panel_count, scales_of, stored_as, to_panels
from fastgpt2.engine.machine import anonymous_file, locked
from fastgpt2.engine.model.checkpoint import Checkpoint, map_file, read_metadata
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.weights import expected_shapes, match_names, scales_name
from fastgpt2.errors import CheckpointError

Array = NDArray[np.float32]

# In the file's name: a release that writes another form looks for another name.
FORMAT = 2
ALIGNMENT = 64
_FLOATS = ALIGNMENT // 4

# Converted and written at a time, so that packing takes little memory beside the file's own pages.
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """The width of the panels of a matrix, by its numbers of rows (K) and columns (N), and what they are stored as."""

    name: str
    width: Callable[[int, int], int]
    weights: str = "float32"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a packed file: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


_ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in STORED.values()}


class Plan:
    """The tensors of a packed file, and where their numbers come from."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], tensors: dict[str, Stored], weights: str) -> None:
        self.checkpoint, self._names, self.tensors, self._weights = checkpoint, names, tensors, weights

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: GPT2Config, layout: Layout) -> Plan:
        """
        Raises:
            CheckpointError: as `packed_in_cache`.
        """
        names = match_names(checkpoint, config)
        logical = expected_shapes(config)
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        tensors: dict[str, Stored] = {}
        for name in names:
            shape = logical[name]
            if name == head or (len(shape) == 2 and name.startswith("h.")):
                n_out, n_in = shape if name == head else shape[::-1]
                width = layout.width(n_in, n_out)
                n = panel_count(n_out, width)
                tensors[name] = Stored(STORED[layout.weights][0], (n, n_in, width))
                if layout.weights == "int8":
                    tensors[scales_name(name)] = Stored("F32", (n * width,))
            elif name.endswith("bias") and ".ln_" not in name and name != "ln_f.bias":
                n_in = logical[name.removesuffix("bias") + "weight"][0]
                width = layout.width(n_in, shape[0])
                tensors[name] = Stored("F32", (panel_count(shape[0], width) * width,))
            else:
                tensors[name] = Stored("F32", (-(-shape[0] // _FLOATS) * _FLOATS, *shape[1:]))
        return cls(checkpoint, names, tensors, layout.weights)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, file: BinaryIO, model: str, sealed: int, progress: Callable[[int], object]) -> None:
        """Header and tensors, a piece at a time; `progress` gets the number of bytes of each."""
        file.write(self._header(model, sealed, 0))
        crc = 0
        for name in self.tensors:
            for piece in self._pieces(name):
                file.write(piece.data)
                crc = zlib.crc32(piece.data, crc)
                progress(piece.nbytes)
        file.seek(0)
        file.write(self._header(model, sealed, crc))

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """The stored form of a tensor, contiguous, some megabytes at a time."""
        shape = self.tensors[name].shape
        if name not in self._names:
            (weight,) = (weight for weight in self._names if scales_name(weight) == name)
            for columns in self._columns(weight):
                yield scales_of(columns)
            yield np.zeros(shape[0] - self._n_out(weight), np.float32)
            return
        stored = self._names[name]
        source_shape = self.checkpoint.tensors[stored].shape
        if len(shape) < 3:
            tail = np.zeros((shape[0] - source_shape[0], *shape[1:]), np.float32)
            step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
            for at in range(0, source_shape[0], step):
                yield self.checkpoint.float32(stored, slice(at, at + step))
            yield tail
            return
        for columns in self._columns(name):
            yield to_panels(stored_as(self._weights, columns), shape[2])

    def _n_out(self, weight: str) -> int:
        return self.checkpoint.tensors[self._names[weight]].shape[1 if weight.startswith("h.") else 0]

    def _columns(self, weight: str) -> Iterator[Array]:
        """Of a weight, or of the transpose of a token table: [K, some whole panels], until there are none left."""
        _, n_in, width = self.tensors[weight].shape
        step = max(1, CHUNK_BYTES // (4 * n_in * width)) * width
        for at in range(0, self._n_out(weight), step):
            columns, stored = slice(at, at + step), self._names[weight]
            if weight.startswith("h."):
                yield self.checkpoint.float32(stored, (slice(None), columns))
            else:
                yield self.checkpoint.float32(stored, columns).T

    def _header(self, model: str, sealed: int, crc: int) -> bytes:
        """Length and JSON, padded so that data begins at a multiple of `ALIGNMENT`; as long for any checksum."""
        metadata = {
            "format": "fastgpt2",
            "fastgpt2_format": str(FORMAT),
            "layout": "weights of linear layers [K, N] and the token table [vocab, K] as panels [n, K, P]",
            "model": model,
            "source": json.dumps(sorted({str(info.file.resolve()) for info in self.checkpoint.tensors.values()})),
            "source_identity": self.checkpoint.identity,
            "sealed": str(sealed),
            "crc32": f"{crc:08x}",
        }
        header: dict[str, object] = {"__metadata__": metadata}
        at = 0
        for name, tensor in self.tensors.items():
            stop = at + tensor.nbytes
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


# NOTE engine.packing: A packed file (`pack_plan.py`), written once by whichever process comes first and mapped by
# every other.
log = logging.getLogger("fastgpt2.engine")
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
