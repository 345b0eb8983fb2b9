"""The directory of a zip file: where in the file each entry lies, for entries that are stored as they are.

torch.save writes such files, so that tensors can be viewed on a map of the file. Python's `zipfile` hands out copies,
and reads a directory of any size that the file claims. Here every number is checked against the file's size first.
"""

from __future__ import annotations

import mmap
import struct
from itertools import pairwise
from typing import NamedTuple

# A directory of torch's has about 80 bytes a tensor.
MAX_DIRECTORY_BYTES = 8 << 20

# Source: PKWARE's APPNOTE.TXT, sections 4.3.7 to 4.3.16 and 4.5.3.
_END, _END_MAGIC, _MAX_COMMENT = struct.Struct("<4s4H2LH"), b"PK\5\6", 0xFFFF
_LOCATOR, _LOCATOR_MAGIC = struct.Struct("<4sLQL"), b"PK\6\7"
_END64, _END64_MAGIC = struct.Struct("<4sQ2H2L4Q"), b"PK\6\6"
_HEADER, _HEADER_MAGIC = struct.Struct("<4s6H3L5H2L"), b"PK\1\2"
_LOCAL, _LOCAL_MAGIC = struct.Struct("<4s5H3L2H"), b"PK\3\4"
_SATURATED_16, _SATURATED_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 1
_ENCRYPTED = 1


class BadZip(ValueError):
    """Raised if a file is no zip file, is damaged, or has entries that are not stored as they are."""


class ZipEntry(NamedTuple):
    """An entry's byte range in the file, and its checksum (0 if its writer made none)."""

    start: int
    stop: int
    crc32: int


class _Header(NamedTuple):
    """One header of the directory."""

    name: bytes
    size: int
    crc32: int
    at: int  # of the entry's own header


def read_directory(data: mmap.mmap) -> dict[str, ZipEntry]:
    """Return the entries of a zip file by name.

    Raises:
        BadZip: an entry is compressed or encrypted, two entries have one name or overlap, or a number leads out of the
            file.
    """
    start, stop = _find_directory(data)
    entries: dict[str, ZipEntry] = {}
    ranges = []
    at = start
    while at < stop:
        header, at = _read_header(data, at, stop)
        entry = _locate(data, header, start)
        name = header.name.decode("utf-8", "replace")
        if name in entries:
            raise BadZip(f"two of its entries are named {name[:80]!r}")
        entries[name] = entry
        ranges.append((header.at, entry.stop))
    ranges.sort()
    if any(following[0] < before[1] for before, following in pairwise(ranges)):
        raise BadZip("two of its entries overlap")
    return entries


def _find_directory(data: mmap.mmap) -> tuple[int, int]:
    """Return the byte range of the directory."""
    at = data.rfind(_END_MAGIC, max(0, len(data) - _END.size - _MAX_COMMENT))
    if at < 0 or at + _END.size > len(data):
        raise BadZip("its end is missing")
    _, _, _, _, count, size, start, _ = _END.unpack_from(data, at)
    stop = at
    locator = at - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == _LOCATOR_MAGIC:
        end64 = _LOCATOR.unpack_from(data, locator)[2]
        if end64 + _END64.size > locator or data[end64 : end64 + 4] != _END64_MAGIC:
            raise BadZip("its end is damaged")
        *_, count64, size64, start64 = _END64.unpack_from(data, end64)
        for small, large, most in (
            (count, count64, _SATURATED_16), (size, size64, _SATURATED_32), (start, start64, _SATURATED_32)
        ):  # fmt: skip
            if small not in (large, most):
                raise BadZip("its two ends disagree")
        size, start, stop = size64, start64, end64
    if size > MAX_DIRECTORY_BYTES:
        raise BadZip(f"its directory has {size} bytes, and may have at most {MAX_DIRECTORY_BYTES}")
    if start + size > stop:
        raise BadZip("its directory is not where its end says")
    return start, start + size


def _read_header(data: mmap.mmap, at: int, stop: int) -> tuple[_Header, int]:
    """Return a header of the directory, and where the next one begins."""
    if at + _HEADER.size > stop or data[at : at + 4] != _HEADER_MAGIC:
        raise BadZip("its directory is damaged")
    _, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, *_, local = _HEADER.unpack_from(
        data, at
    )
    names = at + _HEADER.size
    end = names + n_name + n_extra + n_comment
    if end > stop:
        raise BadZip("its directory is damaged")
    name = data[names : names + n_name]
    values = _widen([size, packed, local], data[names + n_name : names + n_name + n_extra])
    size, packed, local = values
    if flags & _ENCRYPTED or method != 0 or packed != size:
        raise BadZip(f"its entry {name[:80].decode('utf-8', 'replace')!r} is compressed or encrypted")
    return _Header(name, size, crc, local), end


def _widen(values: list[int], extra: bytes) -> list[int]:
    """Return the values, each that is too large for 32 bits as the header's zip64 field has it."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_EXTRA:
            field = extra[at + 4 : at + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return [next(wide, value) if value == _SATURATED_32 else value for value in values]
        at += 4 + length
    return values


def _locate(data: mmap.mmap, header: _Header, directory: int) -> ZipEntry:
    """Return where an entry lies, by the header that stands before it."""
    names = header.at + _LOCAL.size
    if names > directory or data[header.at : header.at + 4] != _LOCAL_MAGIC:
        raise BadZip("an entry is not where its directory says")
    *_, n_name, n_extra = _LOCAL.unpack_from(data, header.at)
    start = names + n_name + n_extra
    if start + header.size > directory or data[names : names + n_name] != header.name:
        raise BadZip("an entry is not where its directory says")
    return ZipEntry(start, start + header.size, header.crc32)
