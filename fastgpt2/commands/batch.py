"""`fastgpt2 batch`: a file of prompts through the queue, one line of JSON for each.

A run that was broken off goes on after the last line of its output. Input and output are never held whole: this module
reads one line, sends it, and writes its result.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.api.client.bulk import BULK_RESULT_TTL_SECONDS, BulkRun, Item, ProgressBar, run_bulk
from fastgpt2.api.client.enqueue import NO_OPTIONS, JobPlan, plan_job
from fastgpt2.api.client.flow import Driver
from fastgpt2.api.client.outcome import Outcome
from fastgpt2.api.client.session import Session
from fastgpt2.commands.prompts import note_idle_options, request_fields
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed, JobNotFound
from fastgpt2.fields import fields_of, why_no_json
from fastgpt2.foreign_fields import refuse_unknown
from fastgpt2.process import on_stop_signals
from fastgpt2.protocol.messages import job_to_kwargs, result_to_json
from fastgpt2.system.own_pool import pool_of_run

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
MAX_LINE_BYTES = 8 << 20
MAX_ID_CHARACTERS = 256
DIGEST_DIGITS = 16

# Lines that are read ahead of a pipe, each of up to `MAX_LINE_BYTES`.
READ_AHEAD = 8

# What a line may have: the prompt and what it asks for, its time, and the caller's own name for it.
_LINE_FIELDS = (*fields_of(GenerationRequest), "timeout", "id")


def run(values: dict[str, Any]) -> int:
    """Run the command.

    Returns:
        0, 1 if some lines are errors, 130 if interrupted.

    Raises:
        BadRequest: an option is out of bounds, or the output holds something else.
        FastGPT2Error: a file cannot be read or written.
        QueueUnavailable: Redis stays away, or does not become as durable as asked for; what has been written stays.
        JobNotFound: a job is gone; what has been written stays.
    """
    # However the command is told to end, what is in flight is cancelled.
    on_stop_signals(signal.default_int_handler)
    source = None if values["file"] == "-" else Path(values["file"])
    target = None if values["output"] in (None, "-") else Path(values["output"])
    if source is not None and target is not None and target.exists() and source.exists() and source.samefile(target):
        raise BadRequest(f"{source} is both input and output; name another file with -o")
    is_json, fields = _is_json(values["format"], source), _job_fields(values)
    reader = LineReader(is_json, fields)
    if not is_json:  # a line of JSON may say more
        note_idle_options(plan_job("", fields).request)
    pool = pool_of_run(values)
    with (
        _open(source) as file,
        closing(Results(target, values["restart"])) as results,
    ):
        lines = reader.read(file)
        try:
            results.resume(lines)
            with pool, closing(Driver(pool.redis_url, pool.check)) as driver:
                session = Session(pool.redis_url, values["queue"], values["max_queue"], values["durability"])
                _send(session, driver, lines, results, source, values["in_flight"], pool.is_own)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {_progress_text(results, target)}", file=sys.stderr)
            return 130
        except FastGPT2Error as error:
            if results.done and not isinstance(error, BadRequest):
                print(_progress_text(results, target), file=sys.stderr)
            raise
        if results.errors:
            print(f"{results.errors} of {results.done} lines are errors", file=sys.stderr)
        return 1 if results.errors else 0


def _is_json(form: str, source: Path | None) -> bool:
    if form == "auto":
        return source is not None and source.suffix.lower() in JSON_ENDINGS
    return form == "jsonl"


def _job_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the `JobFields` that the options give."""
    return {
        **request_fields(values),
        "timeout": values["deadline"],
        "priority": values["priority"],
        "result_ttl": BULK_RESULT_TTL_SECONDS,
    }


def _open(source: Path | None) -> AbstractContextManager[BinaryIO]:
    if source is None:
        return nullcontext(sys.stdin.buffer)  # closing it would wait for whoever reads it
    try:
        return source.open("rb")
    except OSError as reason:
        raise FastGPT2Error(f"{source}: cannot be read ({reason.strerror})") from None


def _progress_text(results: Results, target: Path | None) -> str:
    if target is None:
        return f"{results.done} results have been written"
    return f"{target} holds {results.done} results; the same command goes on from there"


def _send(
    session: Session,
    driver: Driver,
    lines: Iterator[Line],
    results: Results,
    source: Path | None,
    in_flight: int,
    forgets: bool,
) -> None:
    """Send all lines, and write their results as they come, in the order of the lines."""
    if not driver.run(session.workers()):
        print(
            f"no worker listens on the queue {session.queue!r} yet; waiting for `fastgpt2 up` or `pool` (--model ID "
            "starts workers for this run alone)",
            file=sys.stderr,
        )
    regular = source is not None and source.is_file()
    sent: deque[Line] = deque()
    items = _items(lines if regular else read_ahead(lines), sent)
    bulk = BulkRun(session, items, in_flight, ordered=True, forgets=forgets)
    shown = sys.stderr.isatty()
    total = count_lines(source) if shown and regular and source is not None else None
    with closing(run_bulk(driver, bulk, ProgressBar(total, shown, results.done))) as ends:
        for _, outcome in ends:
            if isinstance(outcome, JobNotFound):
                # This is no result of the line: the same command runs it again.
                raise outcome
            results.write(sent.popleft(), _outcome_to_json(outcome))


def _items(lines: Iterable[Line | None], sent: deque[Line]) -> Iterator[Item]:
    """Yield the job of each line, and note the line as sent."""
    for line in lines:
        if line is None:
            yield None
        else:
            sent.append(line)
            yield line.item


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, GenerationResult):
        return _result_without_ids(outcome)
    value: dict[str, Any] = {"error": str(outcome), "error_type": type(outcome).__name__}
    if isinstance(outcome, JobFailed) and outcome.partial is not None:
        value["partial"] = _result_without_ids(outcome.partial)
    return value


def _result_without_ids(result: GenerationResult) -> dict[str, Any]:
    value = result_to_json(result, result.timings.queue_seconds)
    for text in (value, *value.get("alternatives", ())):
        del text["token_ids"]
    return value


@dataclass(frozen=True, slots=True)
class Line:
    """A line of input.

    Attributes:
        item: the job that the line asks for, or what is wrong with the line.
        digest: of what determines the line's result.
        id: the caller's own, if there is one.
    """

    item: JobPlan | BadRequest
    digest: str
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class _TooLong:
    """A line over `MAX_LINE_BYTES`, of which only this is kept."""

    size: int
    digest: str


class LineReader:
    """Turns lines into jobs.

    Args:
        is_json: the lines are JSON, not prompts.
        fields: the `JobFields` of all lines, unless a line says otherwise.

    Raises:
        BadRequest: a field is out of bounds.
    """

    def __init__(self, is_json: bool, fields: dict[str, Any]) -> None:
        plan_job("", fields)
        self._is_json = is_json
        self._fields = fields

    def read(self, file: BinaryIO) -> Iterator[Line]:
        """Yield the lines of a file; no more than one is held at a time."""
        for number, raw in enumerate(_raw_lines(file)):
            if isinstance(raw, _TooLong):
                error = BadRequest(f"the line has {raw.size} bytes; the limit is {MAX_LINE_BYTES}")
                yield Line(error, raw.digest)
            else:
                yield self._line(raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw)

    def _line(self, raw: bytes) -> Line:
        line_id: str | int | None = None
        try:
            text = raw.decode("utf-8")
            fields = _parse(text) if self._is_json else {"prompt": text}
            line_id = _check_id(fields.pop("id", None))
            prompt = fields.pop("prompt")
            if not isinstance(prompt, str | list):
                raise BadRequest("prompt must be a string or a list of token ids")
            plan = plan_job(prompt, {**self._fields, **fields})
        except UnicodeDecodeError as reason:
            return Line(BadRequest(f"the line is not UTF-8 (byte {reason.start})"), _digest(raw))
        except BadRequest as error:
            return Line(error, _digest(raw), line_id)
        # The times and the priority are left out: they do not change the result.
        determines = {**job_to_kwargs(plan.request, NO_OPTIONS), "id": line_id}
        return Line(plan, _digest(json.dumps(determines, sort_keys=True).encode()), line_id)


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise BadRequest(f"the line is not JSON ({why_no_json(reason)})") from None
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise BadRequest("the line is neither a string nor an object with a prompt")
    refuse_unknown(value, _LINE_FIELDS)
    if "prompt" not in value:
        raise BadRequest("prompt is missing")
    return value


def _check_id(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and len(value) <= MAX_ID_CHARACTERS):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return value
    raise BadRequest(f"id must be a string of up to {MAX_ID_CHARACTERS} characters or a whole number")


def _raw_lines(file: BinaryIO) -> Iterator[bytes | _TooLong]:
    """Yield the lines without their ends; of a line that is too long, its size and digest."""
    while line := file.readline(MAX_LINE_BYTES + 2):
        if line.endswith(b"\n") or len(line) <= MAX_LINE_BYTES:
            yield line.removesuffix(b"\n").removesuffix(b"\r")
            continue
        whole, size = hashlib.sha256(), 0
        while line:
            whole.update(line.removesuffix(b"\n"))
            size += len(line.removesuffix(b"\n"))
            line = b"" if line.endswith(b"\n") else file.readline(1 << 20)
        yield _TooLong(size, whole.hexdigest()[:DIGEST_DIGITS])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]


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


class Results:
    """The output: a file, locked against other runs and continued if it holds results, or standard output.

    Args:
        path: None for standard output.
        restart: begin anew.

    Attributes:
        done: how many lines the output has.
        errors: how many of them are errors.

    Raises:
        FastGPT2Error: the file cannot be written, or another run writes it.
    """

    def __init__(self, path: Path | None, restart: bool) -> None:
        self.done = self.errors = 0
        self._path = path
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            self._continues = path.is_file()
            if self._continues:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if restart:
                    self._file.truncate(0)
        except BlockingIOError:
            raise FastGPT2Error(f"{path} is being written by another run; wait for it, or name another file") from None
        except OSError as reason:
            raise FastGPT2Error(f"{path}: cannot be written ({reason.strerror})") from None

    def resume(self, lines: Iterable[Line]) -> None:
        """Skip the input lines whose results are there, and cut off a result that was not written to its end.

        Raises:
            BadRequest: the results belong to another input or other options.
        """
        if self._file is None or not self._continues:
            return
        end = 0
        wanted = iter(lines)
        with open(os.dup(self._file.fileno()), "rb") as file:  # noqa: PTH123 - a descriptor
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check(line, next(wanted, None))
                end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    def _check(self, result: bytes, line: Line | None) -> None:
        try:
            value = json.loads(result)
            matches = line is not None and (value["index"], value["input"]) == (self.done, line.digest)
            failed = "error" in value
        except (ValueError, TypeError, KeyError, RecursionError):
            matches = failed = False
        if not matches:
            raise BadRequest(
                f"{self._path} holds results of another input or of other options, from line {self.done + 1} on; "
                "begin anew with --restart, or name another file with -o"
            )
        self.done += 1
        self.errors += int(failed)

    def write(self, line: Line, value: dict[str, Any]) -> None:
        """Append the result of a line, at once.

        Raises:
            FastGPT2Error: the result cannot be written; what has been written stays.
        """
        own = {"index": self.done} if line.id is None else {"index": self.done, "id": line.id}
        text = json.dumps({**own, **value, "input": line.digest}) + "\n"
        if self._file is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            self._append(text.encode())
        self.done += 1
        self.errors += int("error" in value)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as reason:
            full = ": make room, and" if reason.errno in (errno.ENOSPC, errno.EDQUOT) else ";"
            raise FastGPT2Error(
                f"{self._path}: {reason.strerror} after {self.done} results{full} the same command goes on from there"
            ) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
