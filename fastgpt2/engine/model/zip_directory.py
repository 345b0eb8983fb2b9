"""The byte ranges of the entries of a zip file, for entries that are stored as they are.

torch.save writes such files, so that tensors can be viewed on a map of the file. The standard library's `zipfile` reads
the directory. It has no function that says where an entry's numbers begin, it tolerates entries that overlap, and it
reads as many bytes as the file claims. So the entry's own header is read here, every range is checked, and `zipfile`
gets the map through a reader that refuses to read much at once.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from itertools import pairwise
from typing import NamedTuple

# A directory of torch's has about 80 bytes a tensor, and a pickle of `torch_pickle.MAX_OPCODES` fewer than 20,000
# tensors. For this much `zipfile` takes 20 MB of memory and a second at most.
MAX_DIRECTORY_BYTES = 2 << 20

# Source: PKWARE's APPNOTE.TXT, sections 4.3.7 and 4.4.4. Of an entry's own header, only its first four bytes and the
# lengths of the name and of the extra field, which follow the header, matter here.
_LOCAL, _LOCAL_MAGIC = struct.Struct("<4s22x2H"), b"PK\3\4"
_ENCRYPTED, _NAME_IS_UTF8 = 1 << 0, 1 << 11


class BadZip(ValueError):
    """Raised if a file is no zip file, is damaged, or has entries that are not stored as they are."""


class ZipEntry(NamedTuple):
    """An entry's byte range in the file, and its checksum (0 if its writer made none)."""

    start: int
    stop: int
    crc32: int


def read_directory(data: mmap.mmap) -> dict[str, ZipEntry]:
    """Return the entries of a zip file by name.

    Raises:
        BadZip: an entry is compressed or encrypted, two entries have one name or overlap, or a number leads out of the
            file.
    """
    try:
        with zipfile.ZipFile(_BoundedReader(data)) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, struct.error) as reason:
        raise BadZip(f"its directory cannot be read: {reason}") from None
    entries: dict[str, ZipEntry] = {}
    ranges = []
    for info in infos:
        name = info.orig_filename  # `filename` ends at a zero byte, so that two names could become one
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if info.flag_bits & _ENCRYPTED or not stored:
            raise BadZip(f"its entry {name[:80]!r} is compressed or encrypted")
        if name in entries:
            raise BadZip(f"two of its entries are named {name[:80]!r}")
        entries[name] = _locate(data, info, directory)
        ranges.append((info.header_offset, entries[name].stop))
    ranges.sort()
    if any(following[0] < before[1] for before, following in pairwise(ranges)):
        raise BadZip("two of its entries overlap")
    return entries


def _locate(data: mmap.mmap, info: zipfile.ZipInfo, directory: int) -> ZipEntry:
    """Return where an entry lies, by the header that stands before it. All of it must lie before the directory."""
    names = info.header_offset + _LOCAL.size
    if info.header_offset >= 0 and names <= directory:
        magic, n_name, n_extra = _LOCAL.unpack_from(data, info.header_offset)
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _NAME_IS_UTF8 else "cp437")
        start = names + n_name + n_extra
        stop = start + info.file_size
        if magic == _LOCAL_MAGIC and data[names : names + n_name] == name and stop <= directory:
            return ZipEntry(start, stop, info.CRC)
    raise BadZip("an entry is not where its directory says")


class _BoundedReader:
    """A map as a file for `zipfile`, of which it can read no more at once than a directory may have."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, len(self._data))[whence]
        if at < 0:
            raise OSError("a number leads out of the file")
        self._at = at
        return at

    def read(self, size: int = MAX_DIRECTORY_BYTES) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"it has {size} bytes, and may have at most {MAX_DIRECTORY_BYTES}")
        part = self._data[self._at : self._at + size]
        self._at += len(part)
        return part
