"""What a caller gives as many prompts: what can be one prompt only, or a table, is refused by a sentence.

Much that holds no prompts can be iterated all the same: a string gives its characters, a DataFrame the names of its
columns. A run over such would be a wrong one. The libraries of tables are known by what their objects have in common,
and are not imported.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable, Awaitable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from fastgpt2.errors import BadRequest
from fastgpt2.fields import is_listed, plain

# The names of a column that is likely to hold the prompts, for the remedy that a message names.
_LIKELY_COLUMNS = ("prompt", "prompts", "text", "inputs")

# Of a table's columns, as many are looked at.
_MOST_COLUMNS = 1000


def iterate_prompts(prompts: Any, expected: str = "a list or another iterable of prompts") -> Iterator[Any]:
    """Return an iterator over many prompts.

    Args:
        expected: what the prompts must be, for the message.

    Raises:
        BadRequest: this is no iterable, or one of something else than prompts; the message says what to give instead.
    """
    remedy = _remedy(prompts)
    if remedy is None:
        try:
            # Elements of pyarrow's columns are no strings before they are asked for.
            return iter(prompts.to_pylist() if hasattr(prompts, "to_pylist") else prompts)
        except TypeError:
            remedy = "give a list, such as [prompt]"
    kind = "null" if prompts is None else type(prompts).__name__
    raise BadRequest(f"prompts must be {expected}, not {kind}: {remedy}")


def is_token_ids(value: Any) -> bool:
    """Tell whether this is a list of numbers, or what another library has for one, as one prompt's token ids are."""
    if isinstance(value, type) or not is_listed(value):
        return False
    first = plain(next(iter(value), None))
    return isinstance(first, int | float) and first == first  # pandas' columns have NaN where a text is missing


def _remedy(prompts: Any) -> str | None:
    """Return what to give instead of what holds no prompts; None if this may hold some."""
    if isinstance(prompts, str):
        return "for one prompt, write [prompt]"
    if isinstance(prompts, bytes | bytearray | memoryview):
        return "write data.decode().splitlines() for a prompt a line"
    if isinstance(prompts, os.PathLike):
        return "write path.read_text().splitlines() for a prompt a line, or run `fastgpt2 batch FILE`"
    if hasattr(prompts, "readline"):
        return 'its lines have line ends, which no prompt should end with: write (line.rstrip("\\n") for line in file)'
    if isinstance(prompts, set | frozenset):
        return "it has no order, so that no result could be told from another's; write sorted(prompts)"
    if isinstance(prompts, Mapping):
        return _remedy_of_mapping(prompts)
    columns = _columns(prompts)
    if columns is not None:
        return f"it is a table; give one of its columns, such as {_column_of(prompts, columns)}"
    dimensions = getattr(prompts, "ndim", 1)
    if isinstance(dimensions, int) and dimensions > 1:
        rows = "list(prompts) if its rows are token ids"
        return f"it has {dimensions} dimensions; give one column, such as prompts[:, 0], or {rows}"
    if is_token_ids(prompts):
        return "it holds numbers; for the token ids of one prompt, write [token_ids]"
    if isinstance(prompts, Awaitable):
        return "await it first"
    if isinstance(prompts, AsyncIterable):
        return "an asynchronous iterable is for AsyncClient.map and AsyncClient.as_completed"
    return None


def _remedy_of_mapping(prompts: Mapping[Any, Any]) -> str:
    """Return what to give instead of a mapping: it is one prompt with its fields, or holds columns or tables."""
    for name, value in islice(prompts.items(), _MOST_COLUMNS):
        columns = _columns(value)
        if columns is not None:
            return f"it holds tables; give a column of one, such as prompts[{_quoted(name)}]{_column(columns)}"
    if "role" in prompts and "content" in prompts:
        return 'it is a message; for a chat of this one message, write [{"messages": [message]}]'
    if isinstance(prompts.get("prompt"), list | tuple) and not is_token_ids(prompts["prompt"]):
        return 'give the list that it holds, prompts["prompt"]'
    if "prompt" in prompts or "messages" in prompts:
        return "for one prompt with its fields, write [prompt]"
    return "give what it holds, list(prompts.values()), or [prompt] for one prompt with its fields"


def _columns(value: Any) -> list[Any] | None:
    """Return the names of a table's columns; None if this is no table.

    Those of pandas, polars, Dask, DuckDB and Spark have `columns`, those of datasets and pyarrow `column_names`.
    """
    if getattr(value, "ndim", None) == 1:  # Dask's columns have `columns` too
        return None
    for attribute in ("column_names", "columns"):
        if hasattr(type(value), attribute) or attribute in getattr(value, "__dict__", ()):
            # To ask a lazy table may mean work and warnings; that it has columns is enough then.
            lazy = hasattr(value, "collect")
            names = () if lazy else getattr(value, attribute)
            return list(islice(names, _MOST_COLUMNS)) if isinstance(names, Iterable) else []
    return None


def _column_of(table: Any, columns: list[Any]) -> str:
    first = "prompts.collect()" if hasattr(table, "collect") else "prompts"
    return first + _column(columns)


def _column(columns: list[Any]) -> str:
    likely = next((name for name in _LIKELY_COLUMNS if name in columns), None)
    return f"[{_quoted(likely or next(iter(columns), 'prompt'))}]"


def _quoted(name: Any) -> str:
    return f'"{name[:60]}"' if isinstance(name, str) else str(name)[:60]
