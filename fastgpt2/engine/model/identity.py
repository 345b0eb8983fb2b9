"""The identity of a model's weights: a short digest that tells whether a packed file was made of these files.

It is taken at every load, so it reads little. Of each file it covers the path, the size, the time of change, the first
bytes (the header of a safetensors file as a whole), the last bytes, and blocks in between, evenly spaced. So it notices
a folder that was replaced by one with the same sizes and times, as `rsync -a` or the layers of a container's image can
do: other weights have other bytes nearly everywhere. It does not notice a change that lies between two blocks and keeps
size and time.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from fastgpt2.engine.model.files import open_file

# A block of this size is read from each of `BLOCK_SPACING` bytes, but at most `MAX_BLOCKS` blocks of all files.
# 522 of them (gpt2 in float32) take 1.5 ms if the system has the file in memory.
BLOCK_BYTES = 1 << 10
BLOCK_SPACING = 1 << 20
MAX_BLOCKS = 1024

# Files that have no more bytes than this, all together, are read whole.
WHOLE_BYTES = 2 << 20

# The beginning of a file, which in torch's format has the names and places of the tensors, and its end, which there has
# a checksum of each tensor (the directory of a zip file).
EDGE_BYTES = 64 << 10

# A safetensors file's header, read whole up to here.
_MAX_HEADER_BYTES = 8 << 20


def weights_identity(files: Sequence[Path], facts: str) -> str:
    """Return the identity of weights: 16 hexadecimal digits.

    Args:
        files: the files, in the order of their names in the model's folder.
        facts: whatever else the packed file depends on.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(facts.encode())
    sizes = [file.stat().st_size for file in files]
    spacing = max(BLOCK_SPACING, sum(sizes) // MAX_BLOCKS) if sum(sizes) > WHOLE_BYTES else 0
    for file in files:
        _add_file(digest, file, spacing)
    return digest.hexdigest()[:16]


def _add_file(digest: hashlib._Hash, file: Path, spacing: int) -> None:
    """Add a file to a digest: one block of each `spacing` bytes, or the whole file if `spacing` is 0."""
    fd = open_file(file)
    try:
        status = os.fstat(fd)
        size = status.st_size
        digest.update(f"\n{file.resolve()} {size} {status.st_mtime_ns}\n".encode())
        if not spacing:
            digest.update(os.pread(fd, size, 0))
            return
        blocks = range(spacing, size, spacing)
        if hasattr(os, "posix_fadvise"):
            # What follows a block is of no use. And what is not in memory is read at once, not block after block.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for at in blocks:
                os.posix_fadvise(fd, at, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
        digest.update(os.pread(fd, _first_bytes(fd, size), 0))
        for at in blocks:
            digest.update(os.pread(fd, BLOCK_BYTES, at))
        digest.update(os.pread(fd, EDGE_BYTES, max(0, size - EDGE_BYTES)))
    except OSError as reason:
        raise OSError(reason.errno, reason.strerror, str(file)) from None
    finally:
        os.close(fd)


def _first_bytes(fd: int, size: int) -> int:
    """Return how many bytes the beginning of a file has: at least a safetensors file's header, if it is one."""
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0).ljust(8, b"\0"))
    return min(size, max(EDGE_BYTES, 8 + length if length <= _MAX_HEADER_BYTES else 0))
