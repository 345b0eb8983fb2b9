"""Parquet, read and written in batches of rows, and zstd: what the extra `data`, pyarrow, is for.

Nothing is imported before it is needed: pyarrow takes longer to import than all the rest of `fastgpt2 batch`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.commands.batch.lines import Line, digest_of, digest_of_plan, plan_prompt
from fastgpt2.commands.batch.records import (
    TABLE_COLUMNS,
    WHOLE_NUMBERS,
    Record,
    from_table,
    rename_columns,
    row_of,
    to_table,
)
from fastgpt2.commands.batch.tables import find_column, refuse_equal_columns
from fastgpt2.errors import BadRequest, FastGPT2Error

# Rows that are in memory at once, when read and when written.
ROWS_READ = 256
ROWS_WRITTEN = 4096


def arrow(what: str) -> Any:
    """Return pyarrow, its module for Parquet with it.

    Raises:
        FastGPT2Error: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FastGPT2Error(f"{what} needs pyarrow, which is not installed: pip install 'fastgpt2[data]'") from None
    return pyarrow


class ParquetReader:
    """Turns the rows of a Parquet file into jobs.

    Args:
        path: the file.
        column: the column of the prompts, if it is named.
        fields: the `JobFields` of all rows.
        with_rows: what stands in the other columns is made JSON; else it is left where it is.

    Attributes:
        columns: the names of the columns in the output.
        is_joined: what stands in the columns is read again when the output is written, with its types.
        rows: the number of rows.

    Raises:
        BadRequest: a field is out of bounds, or no column holds prompts.
        FastGPT2Error: the file is damaged, or pyarrow is not installed.
    """

    def __init__(self, path: Path, column: str | None, fields: dict[str, Any], with_rows: bool) -> None:
        plan_job("", fields)
        self._path = path
        self._fields = fields
        self.is_joined = not with_rows
        with _open(path) as file:
            self.schema = file.schema_arrow
            self.rows: int = file.metadata.num_rows
        names = list(self.schema.names)
        refuse_equal_columns(names)
        self._prompt = names[find_column(names, column)]
        self._names = names
        self.columns: list[str] | None = rename_columns(names)
        self._check_type()

    def _check_type(self) -> None:
        types = arrow("Parquet").types
        kind = self.schema.field(self._prompt).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        ids = (types.is_list(inner) or types.is_large_list(inner)) and types.is_integer(inner.value_type)
        view = getattr(types, "is_string_view", lambda _: False)(inner)
        if not (types.is_string(inner) or types.is_large_string(inner) or types.is_null(inner) or view or ids):
            raise BadRequest(
                f"the column {self._prompt!r} holds {kind}; prompts are texts or lists of token ids: "
                "name another column with --prompt-column"
            )

    def read(self, file: BinaryIO) -> Iterator[Line]:
        """Yield the rows; no more than `ROWS_READ` are held at a time."""
        del file  # opened to see that it can be read; pyarrow opens the file itself
        assert self.columns is not None
        read_columns = self._names if not self.is_joined else [self._prompt]
        number = 0
        for batch in self.batches(ROWS_READ, read_columns):
            for values in batch.to_pylist():
                number += 1
                prompt = values[self._prompt]
                named = () if self.is_joined else zip(self.columns, self._names, strict=True)
                row = {name: plain(values[own]) for name, own in named}
                try:
                    if prompt is None:
                        raise BadRequest("the prompt is null")
                    plan = plan_prompt(prompt, self._fields)
                except BadRequest as error:
                    yield Line(error, digest_of(repr(prompt).encode()), row, number)
                else:
                    yield Line(plan, digest_of_plan(plan), row, number)

    def batches(self, rows: int, columns: list[str] | None = None) -> Iterator[Any]:
        """Yield the file's rows as record batches.

        Raises:
            FastGPT2Error: the file is damaged.
        """
        lib = arrow("Parquet")
        with _open(self._path) as file:
            try:
                yield from file.iter_batches(batch_size=rows, columns=columns)
            except (lib.ArrowException, OSError) as reason:
                raise _damaged(self._path, reason) from None


def _open(path: Path) -> Any:
    lib = arrow("Parquet")
    try:
        return lib.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (lib.ArrowException, OSError) as reason:
        raise _damaged(path, reason) from None


def _damaged(path: Path, reason: Exception) -> FastGPT2Error:
    first = str(reason).partition("\n")[0][:200]
    return FastGPT2Error(f"{path} is no Parquet file, or a damaged one ({first})")


def plain(value: Any) -> Any:
    """Return a value as JSON has it; what JSON has no type for as text: times in ISO 8601, bytes in base64."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a Parquet file that `write_records` or `write_joined` has written.

    Raises:
        BadRequest: the file holds something else.
    """
    lib = arrow("Parquet")
    with _open(path) as file:
        if not {*TABLE_COLUMNS} <= {*file.schema_arrow.names}:
            raise BadRequest(f"{path} holds no results")
        try:
            for batch in file.iter_batches(batch_size=ROWS_READ):
                for values in batch.to_pylist():
                    yield from_table(values, {name: plain(value) for name, value in row_of(values).items()})
        except (lib.ArrowException, OSError) as reason:
            raise _damaged(path, reason) from None


def write_records(path: Path, records: Iterable[Record], kinds: Mapping[str, str]) -> None:
    """Write a Parquet file.

    Args:
        kinds: the columns of the input, each with the kind of its values; see `kind_of_column`.
    """
    lib = arrow("Parquet")
    types = {"bool": lib.bool_(), "int": lib.int64(), "float": lib.float64()}
    fields = [lib.field(name, types.get(kind, lib.string())) for name, kind in kinds.items()]
    schema = lib.schema([*fields, *_own_fields(lib)])
    rest = iter(records)
    with lib.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(islice(rest, ROWS_WRITTEN)):
            columns = [
                lib.array([_as_kind(record.get(name), kind) for record in some], field.type)
                for (name, kind), field in zip(kinds.items(), fields, strict=True)
            ]
            arrays = [*columns, *_own_arrays(lib, some)]
            writer.write_batch(lib.RecordBatch.from_arrays(arrays, schema=schema))


def write_joined(path: Path, reader: ParquetReader, records: Iterable[Record | None]) -> None:
    """Write the rows of the input, each with its record, as a Parquet file; leave out the rows without one.

    Args:
        records: one for each row of the input, in the same order.
    """
    lib = arrow("Parquet")
    assert reader.columns is not None
    fields = [field.with_name(name) for field, name in zip(reader.schema, reader.columns, strict=True)]
    schema = lib.schema([*fields, *_own_fields(lib)], metadata=_other_metadata(reader.schema.metadata))
    rest = iter(records)
    with lib.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in reader.batches(ROWS_WRITTEN):
            some = list(islice(rest, len(batch)))
            if len(some) < len(batch):
                raise FastGPT2Error("the input has got more rows since it was read; run the same command again")
            there = [at for at, record in enumerate(some) if record is not None]
            if len(there) < len(batch):
                batch = batch.take(lib.array(there, lib.int64()))
            arrays = [*batch.columns, *_own_arrays(lib, [record for record in some if record is not None])]
            writer.write_batch(lib.RecordBatch.from_arrays(arrays, schema=schema))


def _other_metadata(metadata: Any) -> Any:
    """Return a schema's metadata without what pandas and datasets say of all columns: there are more now."""
    return {name: value for name, value in (metadata or {}).items() if name not in (b"pandas", b"huggingface")} or None


def _own_fields(lib: Any) -> list[Any]:
    return [lib.field(name, lib.int64() if name in WHOLE_NUMBERS else lib.string()) for name in TABLE_COLUMNS]


def _own_arrays(lib: Any, records: list[Record]) -> list[Any]:
    rows = [to_table(record) for record in records]
    return [
        lib.array(
            [_as_kind(row[name], "int" if name in WHOLE_NUMBERS else "text") for row in rows],
            lib.int64() if name in WHOLE_NUMBERS else lib.string(),
        )
        for name in TABLE_COLUMNS
    ]


def kind_of_value(value: Any) -> str:
    """Return bool, int, float or text; json for what has parts, and empty for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(1 << 63) <= value < 1 << 63 else "json"
    return "float" if isinstance(value, float) else "text" if isinstance(value, str) else "json"


def join_kinds(one: str, other: str) -> str:
    """Return the kind of a column that has values of both kinds."""
    if one == other or not other:
        return one
    return other if not one else "float" if {one, other} == {"int", "float"} else "json"


def _as_kind(value: Any, kind: str) -> Any:
    if value is None or kind in ("bool", "int"):
        return value
    if kind == "float":
        return float(value)
    text = value if kind in ("text", "") else json.dumps(value)
    return text.encode("utf-8", "replace").decode("utf-8")
