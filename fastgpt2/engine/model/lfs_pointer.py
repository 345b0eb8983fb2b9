"""A pointer of Git LFS: the few lines that Git leaves in place of a large file which was not fetched."""

from __future__ import annotations

from pathlib import Path

# How a pointer begins, and how long it is at most. Source: docs/spec.md of git-lfs.
_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024


def is_pointer(path: Path) -> bool:
    """Tell whether a file is a pointer of Git LFS in place of the file that it stands for."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def explain_pointer(path: Path) -> str:
    """Return the sentence for a pointer of Git LFS."""
    return (
        f"{path}: is a Git LFS pointer and not the file itself; run `git lfs pull` in {path.parent}, or download the "
        "model with `hf download`"
    )
