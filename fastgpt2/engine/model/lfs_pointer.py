"""A pointer of Git LFS: the few lines that Git leaves in place of a large file which was not fetched."""

from __future__ import annotations

import os
from pathlib import Path

from fastgpt2.engine.model.files import open_file

# How a pointer begins, and how long it is at most. Source: docs/spec.md of git-lfs.
_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024


def is_pointer(path: Path) -> bool:
    """Tell whether a file is a pointer of Git LFS in place of the file that it stands for."""
    try:
        fd = open_file(path)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_size <= _MAX_BYTES and os.pread(fd, len(_BEGINNING), 0) == _BEGINNING
    except OSError:
        return False
    finally:
        os.close(fd)


def explain_pointer(path: Path) -> str:
    """Return the sentence for a pointer of Git LFS."""
    return (
        f"{path}: is a Git LFS pointer and not the file itself; run `git lfs pull` in {path.parent}, or download the "
        "model with `hf download`"
    )
