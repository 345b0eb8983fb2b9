"""A line's result as a JSON object, a record: as it stands in an output of JSON lines, and as the columns of a table.

A record names its line by the digest of what determined its result, so that results are found again when lines have
been corrected, inserted or moved. `LINE_RECORDS` are those of this package, `OPENAI_RECORDS` those of OpenAI's batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fastgpt2.api.client.outcome import Outcome
from fastgpt2.commands.batch.lines import Line
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import JobFailed
from fastgpt2.protocol.messages import result_to_json

Record: TypeAlias = dict[str, Any]

# The columns of a table: the first before those of the input's, the others after them. What else a record has is JSON
# in `details`, but for the times and counts that are the same kind of thing in each line.
TABLE_COLUMNS = (
    "text", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "model", "error", "error_type", "details",
    "input",
)  # fmt: skip
WHOLE_NUMBERS = ("prompt_tokens", "completion_tokens", "seed")
_NOT_IN_TABLES = ("index", "version", "timings", "drafting", "usage")

# A record that takes the place of an earlier one says where that begins in the file.
REPLACES = "replaces"

# What a record of ours may have. Columns of the input that have these names are given others.
OURS = frozenset(
    (
        *TABLE_COLUMNS, *_NOT_IN_TABLES, REPLACES, "logprobs", "prompt_logprobs", "stop_reason", "choice_index",
        "cumulative_logprob", "alternatives", "partial",
    )
)  # fmt: skip
_RENAMED = "input_"

_NAMED_LINE = re.compile(r"([0-9a-f]{16})(?:-([0-9a-f]{6}))?")


@dataclass(frozen=True, slots=True)
class Origin:
    """Which line a record belongs to.

    Attributes:
        digest: the line's.
        mark: of the options that were given; empty in outputs of earlier releases.
        failed: the line has no result, but an error.
    """

    digest: int
    mark: str
    failed: bool


class RecordForm(Protocol):
    """One of the two forms that records have.

    Attributes:
        has_rows: what the input has beside its prompts stands in the records too.
    """

    has_rows: bool

    def make(self, line: Line, index: int, mark: str, outcomes: Sequence[Outcome]) -> Record:
        """Return the record of a line's end."""

    def origin(self, record: Any) -> Origin:
        """Return which line a record belongs to; raise ValueError, TypeError or KeyError if it is none of this form."""

    def error(self, record: Record) -> tuple[str, str]:
        """Return the name and the message of a failed line's error."""

    def tokens(self, record: Record) -> int:
        """Return how many tokens were generated."""


class LineRecords:
    """Records of this package: a result's own JSON, with the line's number and its own fields or columns before."""

    has_rows = True

    def make(self, line: Line, index: int, mark: str, outcomes: Sequence[Outcome]) -> Record:
        (outcome,) = outcomes
        return {"index": index, **line.row, **_outcome_to_json(outcome), "input": f"{line.digest}-{mark}"}

    def origin(self, record: Any) -> Origin:
        return read_name(record["input"], "error" in record)

    def error(self, record: Record) -> tuple[str, str]:
        return str(record.get("error_type")), str(record["error"])

    def tokens(self, record: Record) -> int:
        texts = (record, *record.get("alternatives", ())) if "usage" in record else ()
        return sum(text["usage"]["completion_tokens"] for text in texts)


LINE_RECORDS = LineRecords()


def read_name(name: str, failed: bool) -> Origin:
    """Return which line a record belongs to, from the name that it has for the line."""
    found = _NAMED_LINE.fullmatch(name)
    if found is None:
        raise ValueError("names no line")
    return Origin(int(found[1], 16), found[2] or "", failed)


def _outcome_to_json(outcome: Outcome) -> Record:
    if isinstance(outcome, GenerationResult):
        return _result_without_ids(outcome)
    value: Record = {"error": str(outcome), "error_type": type(outcome).__name__}
    if isinstance(outcome, JobFailed) and outcome.partial is not None:
        value["partial"] = _result_without_ids(outcome.partial)
    return value


def _result_without_ids(result: GenerationResult) -> Record:
    value = result_to_json(result, result.timings.queue_seconds)
    for text in (value, *value.get("alternatives", ())):
        del text["token_ids"]
    return value


def rename_columns(names: Iterable[str]) -> list[str]:
    """Return the names of the input's columns in the output: one that is also ours gets "input_" before it."""
    given = list(names)
    taken = {*given} - OURS
    renamed = []
    for name in given:
        new = name
        while new in OURS or (new != name and new in taken):
            new = _RENAMED + new
        taken.add(new)
        renamed.append(new)
    return renamed


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a record is the input's."""
    return {name: value for name, value in record.items() if name not in OURS}


def to_table(record: Record) -> dict[str, Any]:
    """Return the values of `TABLE_COLUMNS`, None where there is none."""
    usage = record.get("usage", {})
    flat = {**record, **{name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}}
    more = {
        name: value
        for name, value in record.items()
        if name in OURS and name not in TABLE_COLUMNS and name not in _NOT_IN_TABLES and name != REPLACES
    }
    if (seed := record.get("seed")) is not None and seed >= 1 << 63:  # it fits into no column of whole numbers
        flat["seed"], more["seed"] = None, seed
    flat["details"] = json.dumps(more) if more else None
    return {name: flat.get(name) for name in TABLE_COLUMNS}


def from_table(values: Mapping[str, Any], row: Mapping[str, Any]) -> Record:
    """Return the record of a row of a table that was written from it, without the line's number."""
    known = {name: values.get(name) for name in TABLE_COLUMNS}
    details = json.loads(known.pop("details") or "{}")
    usage = {name: known.pop(name) for name in ("prompt_tokens", "completion_tokens")}
    record = {**row, **{name: value for name, value in known.items() if value is not None}, **details}
    return record if usage["completion_tokens"] is None else {**record, "usage": usage}
