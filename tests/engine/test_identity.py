"""The identity of weights changes with what a replaced file changes, and reads a bounded part of large ones."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from fastgpt2.engine.model.identity import BLOCK_BYTES, BLOCK_SPACING, EDGE_BYTES, MAX_BLOCKS, weights_identity

MEGABYTE = 1 << 20


def write(path: Path, size: int, *changes: int) -> Path:
    """Write a file of zeros with other bytes at these places, always under the same time."""
    with path.open("wb") as file:
        file.truncate(size)  # sparse: takes no disk
        for at in changes:
            file.seek(at)
            file.write(b"x")
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.mark.parametrize("size", [0, 5, 3000, 2 * MEGABYTE])
def test_every_byte_of_small_files_counts(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    before = weights_identity([write(path, size)], "")
    assert len(before) == 16
    assert weights_identity([write(path, size)], "") == before
    for at in {0, size // 3, size - 1} if size else ():
        assert weights_identity([write(path, size, at)], "") != before


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    path, size = tmp_path / "pytorch_model.bin", 9 * MEGABYTE + 7
    before = weights_identity([write(path, size)], "")
    seen = [0, EDGE_BYTES - 1, size - EDGE_BYTES, size - 1]
    seen += [at for block in range(1, 9) for at in (block * BLOCK_SPACING, block * BLOCK_SPACING + BLOCK_BYTES - 1)]
    for at in seen:
        assert weights_identity([write(path, size, at)], "") != before
    assert weights_identity([write(path, size, 3 * BLOCK_SPACING + BLOCK_BYTES)], "") == before  # as documented


def test_a_header_counts_as_a_whole(tmp_path: Path) -> None:
    path, header = tmp_path / "model.safetensors", 3 * EDGE_BYTES
    found = set()
    for at in (None, EDGE_BYTES + 1, 8 + header - 1, 8 + header):
        write(path, 5 * MEGABYTE, *([] if at is None else [at]))
        with path.open("r+b") as file:
            file.write(struct.pack("<Q", header))
        os.utime(path, ns=(10**18, 10**18))
        found.add(weights_identity([path], ""))
    assert len(found) == 3  # the last change is behind the header


def test_time_size_path_order_and_facts_count(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", 9, 1), write(tmp_path / "b", 9, 2)
    found = {
        weights_identity([one, other], ""),
        weights_identity([other, one], ""),
        weights_identity([one, other], "tied"),
        weights_identity([one], ""),
    }
    os.utime(one, ns=(1, 1))
    found.add(weights_identity([one], ""))
    found.add(weights_identity([write(one, 10, 1)], ""))
    assert len(found) == 6
    link = tmp_path / "link"
    link.symlink_to(other)
    assert weights_identity([link], "") == weights_identity([other], "")


def test_few_bytes_of_very_large_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{number}", 3 * MAX_BLOCKS * MEGABYTE) for number in range(2)]
    read: list[int] = []

    def pread(_fd: int, count: int, _at: int) -> bytes:
        read.append(count)
        return bytes(count)

    monkeypatch.setattr(os, "pread", pread)
    weights_identity(files, "")
    assert read.count(BLOCK_BYTES) <= MAX_BLOCKS
    assert sum(read) < 2 * MEGABYTE
