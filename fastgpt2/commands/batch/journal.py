"""The records of a run, one a line of a file, written as soon as they are there; and which line each belongs to.

A line is known by its digest. Of equal lines, the first has the first record with the digest. Of each record, only
digest and offset are held in memory. A record may take the place of an earlier one, when a failed line was tried again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import BinaryIO

from fastgpt2.commands.batch.lines import Line
from fastgpt2.commands.batch.records import REPLACES, Record, RecordForm, row_of
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.plurals import counted

# The offset of a line that has no record.
NOWHERE = (1 << 64) - 1

# A record may have the log probabilities of each token of many texts.
MAX_RECORD_BYTES = 1 << 30


def open_locked(path: Path, restart: bool) -> BinaryIO:
    """Open a file for reading and writing, and lock it against other runs.

    Raises:
        FastGPT2Error: it cannot be written, or another run writes it.
    """
    try:
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended just now may have put another file in this one's place.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()
        if restart:
            file.truncate(0)
    except BlockingIOError:
        raise FastGPT2Error(f"{path} is being written by another run; wait for it, or name another file") from None
    except OSError as reason:
        hint = "" if path.parent.exists() else f"; make the folder {path.parent} first"
        raise FastGPT2Error(f"{path}: cannot be written ({reason.strerror}){hint}") from None
    return file


class Journal:
    """The records in a file that was opened by `open_locked`, or in a temporary one.

    Args:
        name: the output's, for messages.
        mark: of the options that are given now.

    Attributes:
        order: for each line of the input so far, the offset of its record, or `NOWHERE`.
        results: how many results there are, those of lines that are not in the input any more too.
        end: where the next record is written.
        has_changed: a record was written in this run.
    """

    def __init__(self, file: BinaryIO, name: str, form: RecordForm, mark: str) -> None:
        self._file = file
        self._name = name
        self._form = form
        self._mark = mark
        # Of the records that were there at the start, in the order of the file: digest, where each began, where the
        # one that has taken its place begins, a digest of its row, whether it is an error, whether a line has it.
        self._digests, self._starts, self._offsets, self._rows = array("Q"), array("Q"), array("Q"), array("q")
        self._failed, self._matched = bytearray(), bytearray()
        self._foreign: set[int] = set()
        # Lines mostly come in the order of the records: then nothing is looked up. As soon as one does not, the records
        # that are left are found by their digests: the first record of each, and the next one with the same.
        self._at = 0
        self._first: dict[int, int] | None = None
        self._next = array("q")
        # Whether the file holds one record for each line, in their order, each with its number.
        self._is_in_order = True
        self.order = array("Q")
        self._written = 0
        self.results = 0
        self.end = 0
        self.has_changed = False

    def load(self) -> None:
        """Read the records that are there, and cut off one that was not written to its end.

        Raises:
            BadRequest: the file holds something else.
        """
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            for number, raw in enumerate(iter(lambda: file.readline(MAX_RECORD_BYTES), b""), 1):
                if not raw.endswith(b"\n"):
                    if number == 1 and not raw.startswith(b"{"):
                        raise self._holds_something_else(number)
                    break
                self._load(raw, number)
                self.end += len(raw)
        self._file.truncate(self.end)
        self.results = len(self._failed) - sum(self._failed)

    def _load(self, raw: bytes, number: int) -> None:
        try:
            record = json.loads(raw)
            origin = self._form.origin(record)
            replaces = record.get(REPLACES)
            at = len(self._starts) if replaces is None else self._position(int(replaces))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._holds_something_else(number) from None
        if replaces is not None:
            self._offsets[at], self._failed[at] = self.end, origin.failed
            self._rows[at] = _row_digest(row_of(record))
            self._is_in_order = False
            return
        if record.get("index", at) != at:
            self._is_in_order = False
        self._digests.append(origin.digest)
        self._starts.append(self.end)
        self._offsets.append(self.end)
        self._rows.append(_row_digest(row_of(record)))
        self._failed.append(origin.failed)
        self._matched.append(False)
        if not origin.failed and origin.mark not in ("", self._mark):
            self._foreign.add(origin.digest)

    def _position(self, start: int) -> int:
        at = bisect_left(self._starts, start)
        if at == len(self._starts) or self._starts[at] != start:
            raise ValueError("replaces no record")
        return at

    def _holds_something_else(self, number: int) -> BadRequest:
        return BadRequest(
            f"{self._name} holds something else than results, in line {number}; begin anew with --restart, or name "
            "another file with -o"
        )

    def check(self, lines: Iterable[Line]) -> None:
        """See that the results there belong to these lines; read no more of the lines than that takes.

        Raises:
            BadRequest: they were made with other options, or of another input.
        """
        if not self.results:
            return
        found, foreign = False, set(self._foreign)
        for line in lines:
            digest = int(line.digest, 16)
            found = found or self._is_there(digest)
            foreign.discard(digest)
            if found and not foreign:
                return
        what = "holds results of other options" if foreign else "holds results of another input or of other options"
        raise BadRequest(
            f"{self._name} {what}, so that all lines would be run again; begin anew with --restart, or name another "
            "file with -o"
        )

    def has_all(self, lines: Iterable[Line], with_errors: bool) -> bool:
        """Tell whether the records are those of all these lines, in their order, so that no line is to be run.

        Args:
            with_errors: an error is a record, too.
        """
        if any(self._failed) and not with_errors:
            return False
        pairs = zip_longest((int(line.digest, 16) for line in lines), self._digests)
        return all(digest == known for digest, known in pairs)

    def _is_there(self, digest: int) -> bool:
        if self._first is None:
            if self._at < len(self._digests) and self._digests[self._at] == digest:
                return not self._failed[self._at]
            self._first = self._find_rest()
        at = self._first.get(digest, -1)
        return at >= 0 and not self._failed[at]

    def match(self, line: Line) -> int | None:
        """Take the next line of the input, and return which of the records before is the line's; None if none is."""
        at = self._take(int(line.digest, 16))
        if at is not None:
            self._matched[at] = True
        self.order.append(NOWHERE if at is None else self._offsets[at])
        return at

    def _take(self, digest: int) -> int | None:
        if self._first is None:
            if self._at < len(self._digests) and self._digests[self._at] == digest:
                self._at += 1
                return self._at - 1
            self._first = self._find_rest()
        at = self._first.pop(digest, -1)
        if at < 0:
            return None
        if self._next[at - self._at] >= 0:
            self._first[digest] = self._next[at - self._at]
        return at

    def _find_rest(self) -> dict[int, int]:
        first: dict[int, int] = {}
        rest = range(self._at, len(self._digests))
        self._next = array("q", bytes(8 * len(rest)))
        for at in reversed(rest):
            self._next[at - self._at] = first.get(self._digests[at], -1)
            first[self._digests[at]] = at
        return first

    def is_error(self, at: int) -> bool:
        return bool(self._failed[at])

    def has_row(self, at: int, line: Line) -> bool:
        """Tell whether what stands beside the result is still what the input has there."""
        return self._rows[at] == _row_digest(line.row)

    def read(self, offset: int) -> Record:
        """Return the record at an offset."""
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(offset)
            record: Record = json.loads(file.readline())
        return record

    def renew_row(self, at: int, line: Line, index: int) -> None:
        """Write a record again, beside what the input has there now."""
        old = self.read(self._offsets[at])
        row = row_of(old)
        kept = {name: value for name, value in old.items() if name not in row and name not in ("index", REPLACES)}
        self.write({"index": index, **line.row, **kept}, index, at)

    def write(self, record: Record, index: int, at: int | None) -> None:
        """Append the record of a line, at once.

        Args:
            index: the line's.
            at: the record that it takes the place of.

        Raises:
            FastGPT2Error: it cannot be written; what has been written stays.
        """
        if at is not None:
            record = {**record, REPLACES: self._starts[at]}
            self._is_in_order = False
        elif index != self.count:
            self._is_in_order = False
        data = json.dumps(record).encode() + b"\n"
        offset = self.end
        self._file.seek(offset)
        append(self._file, data, self._name, self.count)
        self.end += len(data)
        self.has_changed = True
        self._written += at is None
        self.order[index] = offset

    def is_final(self) -> bool:
        """Tell whether the file holds just the records of all lines, in their order."""
        return self._is_in_order and not self.left_over() and NOWHERE not in self.order and _ascends(self.order)

    def left_over(self) -> int:
        """Return how many records belong to no line of the input."""
        return len(self._matched) - sum(self._matched)

    def left_over_results(self) -> Iterator[bytes]:
        """Yield the results among these, as they stand in the file."""
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            for at, offset in enumerate(self._offsets):
                if not self._matched[at] and not self._failed[at]:
                    file.seek(offset)
                    yield file.readline()

    def records(self) -> Iterator[Record | None]:
        """Yield the record of each line of the input, with the line's number; None for a line without one."""
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            for index, offset in enumerate(self.order):
                if offset == NOWHERE:
                    yield None
                    continue
                file.seek(offset)
                record: Record = json.loads(file.readline())
                record.pop(REPLACES, None)
                yield {**record, "index": index} if "index" in record else record

    @property
    def count(self) -> int:
        """Return how many lines have a record."""
        return len(self._starts) + self._written

    def close(self) -> None:
        self._file.close()


def append(file: BinaryIO, data: bytes, name: str, written: int) -> None:
    """Write to a file or a device, all of the data.

    Args:
        written: how many results are there, for the message.

    Raises:
        FastGPT2Error: it cannot be written.
    """
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as reason:
        full = ": make room, and" if reason.errno in (errno.ENOSPC, errno.EDQUOT) else ";"
        raise FastGPT2Error(
            f"{name}: {reason.strerror} after {counted(written, 'result')}{full} the same command goes on from there"
        ) from None


def _row_digest(row: object) -> int:
    return hash(json.dumps(row, sort_keys=True))


def _ascends(offsets: array[int]) -> bool:
    return all(one < next_one for one, next_one in pairwise(offsets))
