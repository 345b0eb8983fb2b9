"""The input: a file or a pipe, its format, and the reader of its lines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2 import settings
from fastgpt2.commands.batch.formats import DELIMITERS, Format, check_head_of_pipe, input_format, open_input
from fastgpt2.commands.batch.lines import Line, LineReader, TooLong, raw_lines
from fastgpt2.commands.batch.output import Reader
from fastgpt2.commands.batch.tables import CSVReader, ObjectReader
from fastgpt2.errors import BadRequest, FastGPT2Error

# Lines that are read ahead of a pipe, each of up to `MAX_LINE_BYTES`.
READ_AHEAD = 8

# The rows of a larger table are not counted before it is read.
MAX_COUNTED_BYTES = 1 << 30


class Source:
    """The input of a run.

    Args:
        path: None for standard input.
        values: of the command's options.

    Attributes:
        form: the format.
        is_file: it can be read more than once.

    Raises:
        FastGPT2Error: it cannot be read.
        BadRequest: its format is not known, or it has another, or an option does not go with it.
    """

    def __init__(self, path: Path | None, values: Mapping[str, Any]) -> None:
        self._path = path
        self._column: str | None = values["prompt_column"]
        self._delimiter: str | None = values["delimiter"]
        self.is_file = path is not None and path.is_file()
        if path is not None:
            _refuse_unreadable(path)
        self.form = input_format(path, values["format"])
        self._file: BinaryIO | None = open_input(path, self.form)
        if self.form.name == "jsonl" and self.is_file and self._column is None and self._is_openai():
            self.form = Format("openai", self.form.compression)
        for option, given, formats in (
            ("--prompt-column", self._column, ("csv", "tsv", "parquet", "jsonl")),
            ("--delimiter", self._delimiter, ("csv", "tsv")),
        ):
            if given is not None and self.form.name not in formats:
                raise BadRequest(f"{option} does not go with {self.form.name}, only with {', '.join(formats)}")

    def _is_openai(self) -> bool:
        from fastgpt2.commands.batch.openai_lines import looks_like_request

        first = next(raw_lines(self.open()), b"")
        self.close()
        return not isinstance(first, TooLong) and looks_like_request(first)

    @property
    def is_table(self) -> bool:
        """Tell whether a column is the prompt, and the others are passed through."""
        return self.form.is_table or self._column is not None

    @property
    def names_models(self) -> bool:
        """Tell whether a line may name the model that it is for."""
        return self.form.name in ("jsonl", "openai") and not self.is_table

    def make_reader(self, kind: Format, values: Mapping[str, Any], fields: dict[str, Any]) -> Reader:
        """Return what makes lines of the input.

        Args:
            kind: the format of the output.
            fields: the `JobFields` that the options give.

        Raises:
            BadRequest: a field is out of bounds, or the prompts are not found.
        """
        if self.form.name == "openai":
            from fastgpt2.commands.batch.openai_lines import OpenAILineReader

            named = {setting.field or setting.name: setting for setting in settings.OF_REQUEST}
            given = {name: fields[name] for name, setting in named.items() if fields[name] != setting.default}
            if fields["model"] is not None:
                given["model"] = fields["model"]
            return OpenAILineReader(given, values["priority"], values["deadline"])
        if self.form.name == "parquet":
            from fastgpt2.commands.batch.parquet import ParquetReader

            assert self._path is not None
            return ParquetReader(self._path, self._column, fields, with_rows=kind.name != "parquet")
        if self.form.name in DELIMITERS:
            delimiter = self._delimiter or DELIMITERS[self.form.name]
            return CSVReader(self.open(), delimiter, self._column, fields)
        if self._column is not None:
            return ObjectReader(self._column, fields)
        return LineReader(self.form.name == "jsonl", fields, with_prompt=kind.is_table)

    def open(self) -> BinaryIO:
        """Return the opened input: of a file always a new one, of a pipe the same."""
        if self.is_file and self._file is None:
            return open_input(self._path, self.form)
        assert self._file is not None
        file = self._file
        if self.is_file:
            self._file = None
        else:
            check_head_of_pipe(file, self.form)
        return file

    def lines(self, reader: Reader) -> Generator[Line, None, None]:
        """Yield the lines of the input, of a pipe those that are left."""
        if not self.is_file:
            yield from reader.read(self.open())
            return
        with self.open() as file:
            yield from reader.read(file)

    def total(self, reader: Reader) -> int | None:
        """Return the number of lines, None if it is not known.

        Raises:
            FastGPT2Error: the file is malformed.
        """
        if not self.is_file or self._path is None or self.form.compression:
            return None
        if self.form.name == "parquet":
            from fastgpt2.commands.batch.parquet import ParquetReader

            return reader.rows if isinstance(reader, ParquetReader) else None
        if isinstance(reader, CSVReader):
            if self._path.stat().st_size > MAX_COUNTED_BYTES:
                return None
            with open_input(self._path, self.form) as file:
                return reader.count(file)
        return count_lines(self._path)

    def close(self) -> None:
        if self.is_file and self._file is not None:
            self._file.close()
            self._file = None


def _refuse_unreadable(path: Path) -> None:
    try:
        path.stat()
        if path.is_dir():
            open_input(path, Format("txt"))
    except OSError as reason:
        raise FastGPT2Error(f"{path}: cannot be read ({reason.strerror})") from None


def count_lines(path: Path) -> int:
    """Return how many lines a file has, the last one with or without its end."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def read_ahead(lines: Iterator[Line]) -> Iterator[Line | None]:
    """Yield lines that a thread reads from a pipe; None while there is none, so that results need not wait for it."""
    ready: queue.Queue[Line | BaseException | None] = queue.Queue(READ_AHEAD)

    def read() -> None:
        try:
            for line in lines:
                ready.put(line)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=read, daemon=True, name="input").start()
    while True:
        try:
            found = ready.get_nowait()
        except queue.Empty:
            yield None
            continue
        if isinstance(found, BaseException):
            raise found
        if found is None:
            return
        yield found


def peeked(lines: Iterator[Line]) -> list[Line]:
    """Return the next line, in a list that is empty if there is none."""
    return list(islice(lines, 1))
