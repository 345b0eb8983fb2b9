"""`fastgpt2 batch`: a file of prompts through the queue, a line of JSON for each, and on from there when broken off."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from fastgpt2.api.client import Client
from fastgpt2.api.flight import RESULT_TTL_SECONDS, Item
from fastgpt2.api.outcome import Outcome
from fastgpt2.api.progress import Progress
from fastgpt2.commands.batch_files import Line, LineReader, Results, as_they_come, count_lines
from fastgpt2.commands.texts import request_fields
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed
from fastgpt2.worker.job import result_to_json
from fastgpt2.worker.process import on_stop_signals

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


def run(values: dict[str, Any]) -> int:
    """
    Returns:
        0, 1 if some lines are errors, 130 if interrupted.

    Raises:
        BadRequest: an option is out of bounds, or the output holds something else.
        FastGPT2Error: a file cannot be read or written.
        QueueUnavailable: Redis stays away; what has been written stays.
    """
    # However it is told to end, what is in flight is cancelled.
    on_stop_signals(signal.default_int_handler)
    source = None if values["file"] == "-" else Path(values["file"])
    output = values["output"]
    target = None if output in (None, "-") else Path(output)
    if source is not None and target is not None and target.exists() and source.exists() and source.samefile(target):
        raise BadRequest(f"{source} is both input and output; name another file with -o")
    reader = LineReader(_is_json(values["format"], source), _fields(values))
    with (
        Client(values["redis_url"], values["queue"], values["max_queue"]) as client,
        _open(source) as file,
        closing(Results(target, values["restart"])) as results,
    ):
        lines = reader.read(file)
        try:
            results.resume(lines)
            _send(client, lines, results, source, values["in_flight"])
        except KeyboardInterrupt:
            print(f"\ninterrupted: {_standing(results, target)}", file=sys.stderr)
            return 130
        except FastGPT2Error as error:
            if results.done and not isinstance(error, BadRequest):
                print(_standing(results, target), file=sys.stderr)
            raise
        if results.errors:
            print(f"{results.errors} of {results.done} lines are errors", file=sys.stderr)
        return 1 if results.errors else 0


def _is_json(form: str, source: Path | None) -> bool:
    if form == "auto":
        return source is not None and source.suffix.lower() in JSON_ENDINGS
    return form == "jsonl"


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    of_job = {"timeout": values["deadline"], "priority": values["priority"], "result_ttl": RESULT_TTL_SECONDS}
    return {**request_fields(values), **of_job}


def _open(source: Path | None) -> AbstractContextManager[BinaryIO]:
    if source is None:
        return nullcontext(sys.stdin.buffer)  # to close it would wait for whoever reads it
    try:
        return source.open("rb")
    except OSError as reason:
        raise FastGPT2Error(f"{source}: cannot be read ({reason.strerror})") from None


def _standing(results: Results, target: Path | None) -> str:
    if target is None:
        return f"{results.done} results have been written"
    return f"{target} holds {results.done} results; the same command goes on from there"


def _send(client: Client, lines: Iterator[Line], results: Results, source: Path | None, in_flight: int) -> None:
    """Lines in, results out."""
    if not client.workers():
        queue = client.queue_name
        print(f"no worker listens on the queue {queue!r} yet; waiting for `fastgpt2 up` or `pool`", file=sys.stderr)
    regular = source is not None and source.is_file()
    sent: deque[Line] = deque()

    def items() -> Iterator[Item]:
        for line in lines if regular else as_they_come(lines):
            if line is None:
                yield None
            else:
                sent.append(line)
                yield line.item

    with ExitStack() as stack:
        shown = sys.stderr.isatty()
        total = count_lines(source) if shown and regular and source is not None else None
        bar = stack.enter_context(Progress(total, shown, results.done))
        for _, outcome in stack.enter_context(closing(client.fly(items(), in_flight))):
            results.write(sent.popleft(), _as_json(outcome))
            bar.add(outcome)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, GenerationResult):
        return _result_as_json(outcome)
    value: dict[str, Any] = {"error": str(outcome), "error_type": type(outcome).__name__}
    if isinstance(outcome, JobFailed) and outcome.partial is not None:
        value["partial"] = _result_as_json(outcome.partial)
    return value


def _result_as_json(result: GenerationResult) -> dict[str, Any]:
    value = result_to_json(result, result.timings.queue_seconds)
    del value["token_ids"]
    return value
