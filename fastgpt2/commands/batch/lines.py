"""Lines of text or JSON, and the job that each asks for: a prompt a line, or a string or an object a line."""

from __future__ import annotations

import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from fastgpt2.api.client.enqueue import NO_OPTIONS, JobPlan, plan_job
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import fields_of, why_no_json
from fastgpt2.foreign_fields import take_known
from fastgpt2.protocol.messages import job_to_kwargs

if TYPE_CHECKING:
    from fastgpt2.api.http.chat_request import Chat
    from fastgpt2.api.http.completion_request import Completion

MAX_LINE_BYTES = 8 << 20
MAX_ID_CHARACTERS = 256
DIGEST_DIGITS = 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# What a line may have: the prompt and what it asks for, of which model, its time, what asked for it, and the caller's
# own name for it.
_CONTEXT_FIELDS = ("request_id", "traceparent", "tracestate")
_LINE_FIELDS = (*fields_of(GenerationRequest), "model", "timeout", *_CONTEXT_FIELDS, "id")


@dataclass(frozen=True, slots=True)
class Line:
    """A line or a row of input.

    Attributes:
        item: the job that the line asks for, or what is wrong with the line.
        digest: of what determines the line's result, 16 hexadecimal digits.
        row: what stands beside the result in the output: the caller's own id, or the columns of a table.
        number: the line's number in its file, from 1, as an editor shows it.
        completion: the body of a line of OpenAI's; it may ask for several jobs.
    """

    item: JobPlan | BadRequest
    digest: str
    row: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0
    completion: Completion | Chat | None = None

    @property
    def items(self) -> list[JobPlan] | list[JobPlan | BadRequest]:
        """Return the jobs that the line asks for, or what is wrong with the line."""
        return [self.item] if self.completion is None else self.completion.plans


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line over `MAX_LINE_BYTES`, of which only this is kept."""

    size: int
    digest: str

    @property
    def error(self) -> BadRequest:
        return BadRequest(f"the line has {self.size} bytes; the limit is {MAX_LINE_BYTES}")


class RawLineReader(ABC):
    """Turns each line of a file into a job."""

    # No columns of the input are known before its lines are read.
    columns: list[str] | None = None
    is_joined = False

    def read(self, file: BinaryIO) -> Iterator[Line]:
        """Yield the lines of a file; no more than one is held at a time."""
        for number, raw in enumerate(raw_lines(file), 1):
            if isinstance(raw, TooLong):
                yield Line(self._too_long(raw.error), raw.digest, number=number)
            else:
                yield self._line(raw, number)

    @abstractmethod
    def _line(self, raw: bytes, number: int) -> Line:
        """Return the job that a line asks for, or what is wrong with the line."""

    def _too_long(self, error: BadRequest) -> BadRequest:
        """Return the error for a line that is too long, in the form that the output has for it."""
        return error


class LineReader(RawLineReader):
    """Turns prompts, or lines of JSON, into jobs.

    Args:
        is_json: the lines are JSON, not prompts.
        fields: the `JobFields` of all lines, unless a line says otherwise.
        with_prompt: the prompt stands beside the result in the output.

    Raises:
        BadRequest: a field is out of bounds.
    """

    def __init__(self, is_json: bool, fields: dict[str, Any], with_prompt: bool = False) -> None:
        plan_job("", fields)
        self._is_json = is_json
        self._fields = fields
        self._with_prompt = with_prompt

    def _line(self, raw: bytes, number: int) -> Line:
        row: dict[str, Any] = {}
        try:
            text = decode_line(raw)
            fields = _parse(text) if self._is_json else {"prompt": text}
            line_id = _check_id(fields.pop("id", None))
            if line_id is not None:
                row["id"] = line_id
            prompt = fields.pop("prompt", "")
            if self._with_prompt:
                row["prompt"] = fields.get("messages") or prompt
            plan = plan_prompt(prompt, {**self._fields, **fields})
        except BadRequest as error:
            return Line(error, digest_of(raw), row, number)
        return Line(plan, digest_of_plan(plan, line_id), row, number)


def plan_prompt(prompt: object, fields: Mapping[str, Any]) -> JobPlan:
    """Return the plan of a line's job.

    Raises:
        BadRequest: the prompt is no prompt, or a field is not known or out of bounds.
    """
    if not isinstance(prompt, str | list):
        raise BadRequest("prompt must be a string or a list of token ids")
    return plan_job(prompt, fields)


def decode_line(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise BadRequest(f"the line is not UTF-8 (byte {reason.start})") from None


def parse_json(text: str) -> Any:
    """Return the JSON value of a line.

    Raises:
        BadRequest: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise BadRequest(f"the line is not JSON ({why_no_json(reason)})") from None


def _parse(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise BadRequest("the line is neither a string nor an object with a prompt")
    if "custom_id" in value and "body" in value:
        raise BadRequest("the line is one of OpenAI's batches; give --format openai")
    known = take_known(value, _LINE_FIELDS)
    if "prompt" not in known and "messages" not in known:
        raise BadRequest("prompt is missing")
    return known


def _check_id(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and len(value) <= MAX_ID_CHARACTERS):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return value
    raise BadRequest(f"id must be a string of up to {MAX_ID_CHARACTERS} characters or a whole number")


def raw_lines(file: BinaryIO) -> Iterator[bytes | TooLong]:
    """Yield the lines without their ends; of a line that is too long, its size and digest.

    Raises:
        FastGPT2Error: the file cannot be read on, or is damaged.
    """
    is_first = True
    while line := read_line(file, MAX_LINE_BYTES + 2):
        if is_first:
            line, is_first = line.removeprefix(BYTE_ORDER_MARK), False
        if line.endswith(b"\n") or len(line) <= MAX_LINE_BYTES:
            yield line.removesuffix(b"\n").removesuffix(b"\r")
            continue
        whole, size = hashlib.sha256(), 0
        while line:
            whole.update(line.removesuffix(b"\n"))
            size += len(line.removesuffix(b"\n"))
            line = b"" if line.endswith(b"\n") else read_line(file, 1 << 20)
        yield TooLong(size, whole.hexdigest()[:DIGEST_DIGITS])


def read_line(file: BinaryIO, limit: int) -> bytes:
    """Return the next line, or at most `limit` bytes of it.

    Raises:
        FastGPT2Error: the file cannot be read on, or is damaged.
    """
    try:
        return file.readline(limit)
    except (EOFError, OSError, ValueError, zlib.error) as reason:
        why = "it was cut off" if isinstance(reason, EOFError) else getattr(reason, "strerror", None) or reason
        raise FastGPT2Error(f"the input cannot be read on ({why}); what came before is not lost") from None


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]


def digest_of_plan(plan: JobPlan, line_id: str | int | None = None) -> str:
    """Return the digest of what a job asks for. The times and the priority do not change its result."""
    model = {} if plan.options.model is None else {"model": plan.options.model}
    determines = {**job_to_kwargs(plan.request, NO_OPTIONS), **model, "id": line_id}
    return digest_of(json.dumps(determines, sort_keys=True).encode())


def mark_of_options(fields: Mapping[str, Any]) -> str:
    """Return a digest of the options that are for all lines, by which results tell whether others were given."""
    return digest_of_plan(plan_job("", fields))[:6]
