"""A checkpoint that cannot be used as it lies -> one aligned float32 file, written once and mapped by every process.

The public `gpt2` file begins its data at byte 14,291, so that none of its float32 tensors is aligned; others are
float16. Converted in memory, N workers would hold N private copies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from fastgpt2.engine.checkpoint import Checkpoint, TensorInfo, map_file
from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.weights import match_names
from fastgpt2.errors import CheckpointError

log = logging.getLogger("fastgpt2.engine")

# In the file's name: a release that writes another form looks for another name.
FORMAT = 1
ALIGNMENT = 64
# Below this, sharing saves less than a file in the cache costs.
MIN_BYTES = 64 << 20


def cache_folder() -> Path:
    """`FASTGPT2_CACHE`, else `$XDG_CACHE_HOME/fastgpt2`, else `~/.cache/fastgpt2`."""
    explicit = os.environ.get("FASTGPT2_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgpt2"


def shareable(checkpoint: Checkpoint, config: GPT2Config, model: str) -> Checkpoint:
    """The checkpoint itself if its weights can be mapped as they lie, or are small; else its packed file.

    The packed file is made if it is not there, by whichever process comes first; the others wait for it. Where the
    cache cannot be written, the checkpoint is returned, with a warning of what that costs.

    Raises:
        CheckpointError: a tensor is missing, surplus or misshapen.
    """
    names = match_names(checkpoint, config)
    used = [checkpoint.tensors[stored] for stored in names.values()]
    size = sum(4 * _count(info) for info in used)
    if size < MIN_BYTES or all(info.dtype == "F32" and info.start % 4 == 0 for info in used):
        return checkpoint
    path = cache_folder() / f"{_slug(model)}-{_identity(checkpoint)}.v{FORMAT}.safetensors"
    try:
        return _open(path) or _build_once(path, checkpoint, names)
    except (OSError, RuntimeError) as reason:  # RuntimeError: no home folder
        log.warning(
            "%s: the packed weights cannot be kept there (%s); this process converts them into %.0f MB of memory of "
            "its own, as every other will. Set FASTGPT2_CACHE to a folder that can be written",
            path.parent,
            reason,
            size / 1e6,
        )
        return checkpoint


def _open(path: Path) -> Checkpoint | None:
    """The packed file, if it is there and whole."""
    if not path.exists():
        return None
    try:
        tensors, mapped = map_file(path)
    except CheckpointError:
        return None
    return Checkpoint(tensors, {path: mapped})


def _build_once(path: Path, checkpoint: Checkpoint, names: dict[str, str]) -> Checkpoint:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        # Whoever held the lock before may have made it.
        found = _open(path)
        if found is None:
            if path.exists():
                log.warning("%s is damaged; packing anew", path)
            started = perf_counter()
            _write(path, checkpoint, names)
            log.info("packed %s in %.1f s", path, perf_counter() - started)
            found = _open(path)
    if found is None:
        raise OSError("the file written a moment ago cannot be read")
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock among processes, given up by the kernel however its holder ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """Stream the tensors, one at a time, into a file that gets its name when it is whole and on the disk."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_header(checkpoint, names))
            for stored in names.values():
                file.write(checkpoint.float32(stored).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(checkpoint: Checkpoint, names: dict[str, str]) -> bytes:
    """Length and JSON, padded so that data begins at a multiple of `ALIGNMENT`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "fastgpt2_format": str(FORMAT)}}
    at = 0
    for name, stored in names.items():
        info = checkpoint.tensors[stored]
        stop = at + 4 * _count(info)
        header[name] = {"dtype": "F32", "shape": list(info.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _count(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count


def _identity(checkpoint: Checkpoint) -> str:
    """Changes whenever a source file does: sizes, times of change, and the place of every tensor."""
    digest = hashlib.sha256()
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.start}\n".encode())
    return digest.hexdigest()[:16]


def _slug(model: str) -> str:
    """The model's name as part of a file name, for people who look into the cache."""
    return "".join(c if c.isalnum() else "-" for c in model)[-60:].strip("-") or "model"
