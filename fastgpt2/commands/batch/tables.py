"""Tables of prompts: csv, tsv, and JSON objects. One column is the prompt, the others go to the output as they are."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.commands.batch.lines import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    Line,
    RawLineReader,
    decode_line,
    digest_of,
    digest_of_plan,
    parse_json,
    plan_prompt,
    read_line,
)
from fastgpt2.commands.batch.records import rename_columns
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.plurals import counted

# The columns that are taken for the prompt if none is named, the first of them that is there.
USUAL_COLUMNS = ("prompt", "text")
_SHOWN_COLUMNS = 20


def find_column(names: Sequence[str], given: str | None) -> int:
    """Return which column is the prompt; say on standard error if that is not plain.

    Raises:
        BadRequest: it cannot be told; the message lists the columns.
    """
    if given is not None:
        if given in names:
            return list(names).index(given)
        raise BadRequest(f"there is no column {given!r}; the columns are {_listed(names)}")
    for name in USUAL_COLUMNS:
        if name in names:
            return list(names).index(name)
    if len(names) == 1:
        print(f"the prompts are taken from the only column, {names[0]!r}", file=sys.stderr)
        return 0
    raise BadRequest(f"which column is the prompt? name it with --prompt-column; the columns are {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return ", ".join(repr(name[:100]) for name in names[:_SHOWN_COLUMNS]) + more


def refuse_equal_columns(names: Sequence[str]) -> None:
    """Raise BadRequest if two columns have the same name."""
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise BadRequest(f"two columns are named {twice!r}; rename one of them")


class CSVReader:
    """Turns the rows of a csv or tsv file into jobs. Its first row names the columns.

    Args:
        file: is read up to the end of that row; see `read`.
        delimiter: stands between two values.
        column: the column of the prompts, if it is named.
        fields: the `JobFields` of all rows.

    Attributes:
        columns: the names of the columns in the output.

    Raises:
        BadRequest: a field is out of bounds, or the header is none, or does not tell where the prompts are.
    """

    is_joined = False

    def __init__(self, file: BinaryIO, delimiter: str, column: str | None, fields: dict[str, Any]) -> None:
        plan_job("", fields)
        self._fields = fields
        self._delimiter = delimiter
        self._file, self._rest = file, self._rows(file)
        names = next(self._rest, None)
        if names is None:
            raise BadRequest("the input has no header: its first row must name the columns")
        if isinstance(names[1], BadRequest):
            raise BadRequest(f"the header cannot be read: {names[1]}")
        self._names = names[1]
        if len(self._names) == 1 and (other := next((c for c in ";\t|," if c in self._names[0]), None)):
            raise BadRequest(
                f"the header has one column, {self._names[0][:100]!r}: if another character stands between columns, "
                f"give it with --delimiter {'TAB' if other == chr(9) else repr(other)}"
            )
        refuse_equal_columns(self._names)
        self._prompt = find_column(self._names, column)
        self.columns: list[str] | None = rename_columns(self._names)

    def read(self, file: BinaryIO) -> Iterator[Line]:
        """Yield the rows after the header; no more than one is held at a time.

        Args:
            file: the one that the reader was made with, which can be read once, or the same opened anew.
        """
        assert self.columns is not None
        rows = self._rest
        if file is not self._file:
            rows = self._rows(file)
            next(rows)
        for number, values in rows:
            if isinstance(values, BadRequest):
                yield Line(values, digest_of(str(values).encode()), dict.fromkeys(self.columns), number)
                continue
            row = dict(zip(self.columns, map(_mended, values), strict=False))
            raw = "\0".join(values).encode("utf-8", "surrogateescape")
            try:
                self._check(values)
                plan = plan_prompt(values[self._prompt], self._fields)
            except BadRequest as error:
                yield Line(error, digest_of(raw), {**dict.fromkeys(self.columns), **row}, number)
            else:
                yield Line(plan, digest_of_plan(plan), row, number)

    def count(self, file: BinaryIO) -> int:
        """Return how many rows a file has after its header.

        Raises:
            FastGPT2Error: a quote has no end.
        """
        return sum(1 for _ in self._rows(file)) - 1

    def _check(self, values: list[str]) -> None:
        if len(values) != len(self._names):
            raise BadRequest(
                f"the row has {counted(len(values), 'value')}, the header {len(self._names)}; "
                f"a value that holds {self._delimiter!r} must stand in quotes"
            )
        for name, value in zip(self._names, values, strict=True):
            if not value.isascii() and _mended(value) != value:
                raise BadRequest(f"the column {name[:100]!r} is not UTF-8; iconv -f LATIN1 -t UTF-8 may make it so")

    def _rows(self, file: BinaryIO) -> Iterator[tuple[int, list[str] | BadRequest]]:
        """Yield the number of each row's first line, and its values or what is wrong with it. Empty lines are none.

        Raises:
            FastGPT2Error: a quote has no end.
        """
        csv.field_size_limit(MAX_LINE_BYTES)
        rows = csv.reader(_texts(file), delimiter=self._delimiter, strict=True)
        while True:
            number = rows.line_num + 1
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as reason:
                if "unexpected end" in str(reason) or "field limit" in str(reason):
                    raise FastGPT2Error(f"line {number}: a quote begins a value that does not end; close it") from None
                if "new-line character" in str(reason):
                    yield number, BadRequest("a value holds a CR, a line end; such a value must stand in quotes")
                    continue
                yield number, BadRequest(f"the row is malformed ({reason}); a quote within quotes is written twice")
            else:
                if values:
                    yield number, values


def _texts(file: BinaryIO) -> Iterator[str]:
    """Yield lines with their ends; bytes that are not UTF-8 as surrogates."""
    is_first, number = True, 0
    while line := read_line(file, MAX_LINE_BYTES + 2):
        number += 1
        if is_first:
            line, is_first = line.removeprefix(BYTE_ORDER_MARK), False
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise FastGPT2Error(f"line {number} has more than {MAX_LINE_BYTES} bytes, the limit; is it a table?")
        yield line.decode("utf-8", "surrogateescape")


def _mended(value: str) -> str:
    """Return a text with a mark in place of each byte that is not UTF-8."""
    return value if value.isascii() else value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class ObjectReader(RawLineReader):
    """Turns lines that are JSON objects into jobs: one field is the prompt, the others are columns.

    Args:
        column: the field of the prompts.
        fields: the `JobFields` of all lines.
    """

    def __init__(self, column: str, fields: dict[str, Any]) -> None:
        plan_job("", fields)
        self._column = column
        self._fields = fields

    def _line(self, raw: bytes, number: int) -> Line:
        row: Mapping[str, Any] = {}
        try:
            value = parse_json(decode_line(raw))
            if not isinstance(value, dict):
                raise BadRequest(f"the line is no object with a field {self._column!r}")
            row = dict(zip(rename_columns(value), value.values(), strict=True))
            if self._column not in value:
                raise BadRequest(f"there is no field {self._column!r}; the fields are {_listed(list(value))}")
            plan = plan_prompt(value[self._column], self._fields)
        except BadRequest as error:
            return Line(error, digest_of(raw), row, number)
        return Line(plan, digest_of_plan(plan), row, number)
