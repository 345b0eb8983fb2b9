"""Where results go: at once into a file of JSON lines, or by way of one into a table; or to standard output.

An output that is a plain file of JSON lines is its own journal. Any other one has its journal beside it until all lines
have ended: `out.csv.partial.jsonl`. Then the output is made of it in one go, and put into place by renaming. A later
run reads its results from the output again.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fastgpt2.commands.batch.formats import DELIMITERS, Format, open_input
from fastgpt2.commands.batch.journal import Journal, append, open_locked
from fastgpt2.commands.batch.lines import MAX_LINE_BYTES, Line
from fastgpt2.commands.batch.records import (
    TABLE_COLUMNS,
    WHOLE_NUMBERS,
    Record,
    RecordForm,
    from_table,
    row_of,
    to_table,
)
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.plurals import counted

JOURNAL_ENDING = ".partial.jsonl"
REMOVED_ENDING = ".removed.jsonl"


def is_device(path: Path | None) -> bool:
    """Tell whether this is a pipe or a device: what is written there cannot be read again, nor be replaced."""
    return path is not None and path.exists() and not path.is_file() and not path.is_dir()


class Reader(Protocol):
    """What turns the input into lines.

    Attributes:
        columns: the names that the input's columns have in the output; None if they differ from line to line.
        is_joined: what stands in the columns is not in the records, but read from the input again.
    """

    columns: list[str] | None
    is_joined: bool

    def read(self, file: BinaryIO) -> Iterator[Line]: ...


class StreamOutput:
    """Standard output, a pipe or a device: what has been written is not read again, nor put into order.

    Args:
        path: None for standard output.
        form: of the records.

    Raises:
        FastGPT2Error: it cannot be written.
    """

    journal: Journal | None = None
    is_continued = False

    def __init__(self, path: Path | None, form: RecordForm) -> None:
        self.form = form
        self.name = "standard output" if path is None else str(path)
        self._file: BinaryIO | None = None
        self.count = 0
        if path is not None:
            try:
                self._file = cast(BinaryIO, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0))
            except OSError as reason:
                raise FastGPT2Error(f"{path}: cannot be written ({reason.strerror})") from None

    def write(self, record: Record, index: int, replaces: int | None) -> None:
        """Write one record, at once.

        Raises:
            FastGPT2Error: it cannot be written.
        """
        del index, replaces
        text = json.dumps(record) + "\n"
        if self._file is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            append(self._file, text.encode(), self.name, self.count)
        self.count += 1

    def finish(self, reader: Reader) -> list[str]:
        """Return no notes: all has been written."""
        del reader
        return []

    @property
    def where(self) -> str:
        """Return what has become of the results of a run that ends early."""
        return f"{counted(self.count, 'result has', 'results have')} been written"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class FileOutput:
    """A file, which is continued if it holds results; or a table that a pipe or standard output gets at the end.

    So does a device. What is compressed goes there at the end, too.

    Args:
        path: None for standard output.
        form: of the records.
        mark: see `mark_of_options`.
        restart: begin anew.

    Attributes:
        name: the output's, for messages.
        journal: the records.
        is_continued: a later run goes on with this output.

    Raises:
        BadRequest: the file holds something else than results.
        FastGPT2Error: the file cannot be written, or another run writes it.
    """

    def __init__(self, path: Path | None, kind: Format, form: RecordForm, mark: str, restart: bool) -> None:
        self.name = "standard output" if path is None else str(path)
        self.form = form
        self._kind = kind
        self._device = path if is_device(path) else None
        # What a link leads to is written, and not the link.
        self._path = None if path is None or self._device else Path(os.path.realpath(path))
        self.is_continued = self._path is not None
        self._beside: Path | None = None
        self._is_untouched = False
        if self._path is None:
            file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            self.journal = Journal(file, "the temporary file", form, mark)
            return
        if not kind.is_plain_jsonl:
            if self._path.is_dir():
                raise FastGPT2Error(f"{path}: cannot be written (Is a directory)")
            self._beside = self._path.with_name(self._path.name + JOURNAL_ENDING)
        file = open_locked(self._beside or self._path, restart)
        if self._beside and not restart and not os.fstat(file.fileno()).st_size and self._path.exists():
            file = self._import(file, self._beside)
        self.journal = Journal(file, self.name, form, mark)
        self.journal.load()

    def _import(self, file: BinaryIO, beside: Path) -> BinaryIO:
        """Read an output's results into a journal, which is in place only when it has all of them."""
        assert self._path is not None
        new = beside.with_name(beside.name + ".new")
        try:
            filled = open_locked(new, restart=True)
            with io.BufferedWriter(cast(Any, os.fdopen(os.dup(filled.fileno()), "wb", buffering=0))) as writer:
                for record in read_output(self._path, self._kind):
                    writer.write(json.dumps(record).encode() + b"\n")
        except BadRequest:
            new.unlink()
            beside.unlink()
            raise BadRequest(
                f"{self.name} holds something else than results; begin anew with --restart, or name another file with "
                "-o"
            ) from None
        new.rename(beside)
        file.close()
        self._is_untouched = True
        return filled

    def write(self, record: Record, index: int, replaces: int | None) -> None:
        """Write one record, at once. See `Journal.write`."""
        self.journal.write(record, index, replaces)

    def finish(self, reader: Reader) -> list[str]:
        """Put the output into its form and the order of the input, once all lines have ended.

        Returns:
            What there is to say about it.

        Raises:
            FastGPT2Error: that cannot be done; nothing is lost.
        """
        notes = self._put_aside()
        if self._device is not None:
            try:
                write_file(self._device, self._kind, self.journal, reader)
            except OSError as reason:
                raise FastGPT2Error(f"{self.name}: cannot be written ({reason.strerror})") from None
            return notes
        if self._path is None:
            write_stream(sys.stdout.buffer, self._kind, self.journal, reader)
            return notes
        is_in_place = self._beside is None or (self._is_untouched and not reader.is_joined)
        if is_in_place and self.journal.is_final():
            self._drop_journal()
            return notes
        new = self._path.with_name(self._path.name + ".new")
        try:
            write_file(new, self._kind, self.journal, reader)
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as reason:
            new.unlink(missing_ok=True)
            raise FastGPT2Error(
                f"{self.name}: its results cannot be put into order ({reason.strerror}); they are in "
                f"{self._beside or self._path}, and the same command goes on from there"
            ) from None
        self._drop_journal()
        return notes

    def _put_aside(self) -> list[str]:
        """Keep the results of lines that are not in the input any more, in a file of their own."""
        gone = self.journal.left_over()
        if not gone or self._path is None:
            return []
        aside = self._path.with_name(self._path.name + REMOVED_ENDING)
        moved = 0
        for raw in self.journal.left_over_results():
            with aside.open("ab") as file:
                file.write(raw)
            moved += 1
        notes = []
        of_lines = "of lines that the input does not have any more"
        if moved:
            notes.append(f"moved to {self.name}{REMOVED_ENDING}: {counted(moved, 'result')} {of_lines}")
        if gone > moved:
            notes.append(f"dropped: {counted(gone - moved, 'error')} {of_lines}")
        return notes

    def _drop_journal(self) -> None:
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)

    @property
    def where(self) -> str:
        """Return what has become of the results of a run that ends early."""
        if self._path is None:
            return "nothing has been written: a table is written when all lines have ended"
        ending = JOURNAL_ENDING if self._beside is not None else ""
        return f"{self.name}{ending} holds {counted(self.count, 'result')}; the same command goes on from there"

    @property
    def count(self) -> int:
        return self.journal.count

    def close(self) -> None:
        if self._beside is not None and (not self.journal.end or (self._is_untouched and not self.journal.has_changed)):
            self._beside.unlink(missing_ok=True)
        self.journal.close()


def write_stream(file: BinaryIO, kind: Format, journal: Journal, reader: Reader) -> None:
    """Write all records as a table of text, or as lines of JSON."""
    if not kind.is_table:
        for record in journal.records():
            if record is not None:
                file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        return
    columns = reader.columns if reader.columns is not None else list(_kinds(journal))
    text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
    rows = csv.writer(text, delimiter=DELIMITERS[kind.name], lineterminator="\n")
    rows.writerow([*columns, *TABLE_COLUMNS])
    for record in journal.records():
        if record is not None:
            own = to_table(record)
            rows.writerow([*(_cell(record.get(name)) for name in columns), *(_cell(own[n]) for n in TABLE_COLUMNS)])
    text.flush()
    text.detach()


def _cell(value: Any) -> str:
    """Return a value as a table of text has it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)


def _kinds(journal: Journal) -> dict[str, str]:
    """Return the columns that the records have beside ours, in the order in which they first come, and their kinds."""
    from fastgpt2.commands.batch.parquet import join_kinds, kind_of_value

    kinds: dict[str, str] = {}
    for record in journal.records():
        for name, value in row_of(record or {}).items():
            kinds[name] = join_kinds(kinds.get(name, ""), kind_of_value(value))
    return kinds


def write_file(path: Path, kind: Format, journal: Journal, reader: Reader) -> None:
    """Write all records into a file of this kind."""
    if kind.name == "parquet":
        from fastgpt2.commands.batch import parquet

        if reader.is_joined:
            parquet.write_joined(path, cast(parquet.ParquetReader, reader), journal.records())
            return
        known = reader.columns
        kinds = _kinds(journal) if known is None else dict.fromkeys(known, "text")
        parquet.write_records(path, (record for record in journal.records() if record is not None), kinds)
        return
    with _compressed(path, kind.compression) as file:
        write_stream(file, kind, journal, reader)


@contextmanager
def _compressed(path: Path, compression: str) -> Iterator[BinaryIO]:
    if compression == "zstd":
        from fastgpt2.commands.batch.parquet import arrow

        stream = arrow(".zst").CompressedOutputStream(str(path), "zstd")
        with io.BufferedWriter(cast(Any, stream), 1 << 16) as file:
            yield cast(BinaryIO, file)
    elif compression == "gzip":
        with gzip.open(path, "wb") as file:
            yield cast(BinaryIO, file)
    else:
        with path.open("wb") as file:
            yield file


def read_output(path: Path, kind: Format) -> Iterator[Record]:
    """Yield the records of an output that `write_file` has written.

    Raises:
        BadRequest: it holds something else.
    """
    if kind.name == "parquet":
        from fastgpt2.commands.batch import parquet

        yield from parquet.read_records(path)
        return
    try:
        with open_input(path, kind) as file:
            yield from _read_table(file, kind) if kind.is_table else map(json.loads, file)
    except (ValueError, EOFError, OSError, csv.Error) as reason:
        raise BadRequest(f"{path} holds no results ({reason})") from None


def _read_table(file: BinaryIO, kind: Format) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE_BYTES * 16)
    rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter=DELIMITERS[kind.name], strict=True)
    names = next(rows, [])
    if not {*TABLE_COLUMNS} <= {*names}:
        raise BadRequest("no results")
    for values in rows:
        cells = dict(zip(names, values, strict=True))
        own: dict[str, Any] = {name: cells[name] or None for name in TABLE_COLUMNS}
        for name in WHOLE_NUMBERS:
            own[name] = None if own[name] is None else int(own[name])
        if own["error"] is None:
            own["text"] = cells["text"]  # which may be empty
        yield from_table(own, row_of(cells))
