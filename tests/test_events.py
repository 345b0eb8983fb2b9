"""Tests of `--log-format json`: whatever goes to standard error is one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from support.running import run

from fastgpt2 import events, settings
from fastgpt2.cli import COMMANDS
from fastgpt2.process import _OneLine, set_up_logging

log = logging.getLogger("fastgpt2.test")


class Events:
    """The events that this process logs, and the standard error to which it prints."""

    def __init__(self) -> None:
        self._raw = io.StringIO()
        self.stderr = events.EventWriter(self._raw)

    def __call__(self) -> list[dict[str, Any]]:
        """Return those that were written since the last call."""
        lines = self._raw.getvalue().splitlines()
        self._raw.seek(0)
        self._raw.truncate()
        return [json.loads(line) for line in lines]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Log events in this process."""
    read = Events()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "stderr", read.stderr.raw)
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv(events.VARIABLE, "")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.setattr(events, "_of_process", {})
    events.log_events("tests")
    set_up_logging("INFO")

    yield read
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("fastgpt2").setLevel(logging.NOTSET)


def test_an_event_tells_of_its_process_its_request_and_itself(read: Events) -> None:
    events.describe_process(worker="w-1")
    token = events.OF_REQUEST.set({"request_id": "r-1"})
    log.info("job %s finished", "j", extra=events.about(job_id="j", seconds=0.5, cut_short=True, none=None))
    events.OF_REQUEST.reset(token)
    log.debug("of no interest")
    (event,) = read()
    assert event.pop("time").endswith("Z")
    assert event.pop("pid") > 0
    assert event == {
        "level": "INFO", "logger": "fastgpt2.test", "message": "job j finished", "program": "tests", "worker": "w-1",
        "request_id": "r-1", "job_id": "j", "seconds": 0.5, "cut_short": True, "none": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines", "a\r\nb", "\u2028\u2029\x85\x0b\x0c\x1c", "\x00\x1b[31m", "\ud800 alone", "é 漢 \U0001f600",
        '"}\n{"time": "", "level": "", "message": ""}',
    ],
    ids=("line ends", "carriage return", "other ends", "controls", "surrogate", "letters", "event"),
)  # fmt: skip
def test_a_message_is_one_line_whatever_it_quotes(text: str) -> None:
    # Not logged: pytest would keep the message for its report, and cannot write a lone surrogate there.
    (line,) = events.make_event("WARNING", "fastgpt2", text, 0.0, {"job_id": text}).splitlines()
    assert line.isascii()
    event = json.loads(line)
    assert (event["message"], event["job_id"]) == (text, text)


def test_what_json_does_not_have_is_text_and_what_is_long_is_cut(read: Events) -> None:
    values: dict[str, Any] = {"a": float("nan"), "b": float("inf"), "c": {"d": 1}, "e": "x" * 20_000}
    log.info("y" * 5000, extra=events.about(**values))
    (event,) = read()
    assert (event["a"], event["b"], event["c"]) == ("nan", "inf", "{'d': 1}")
    assert event["e"] == "x" * 16_000 + "... (20000 characters)"
    assert event["message"] == "y" * 4000 + "... (5000 characters)"


def test_an_error_brings_its_traceback(read: Events) -> None:
    for program, is_cut in (("raise ValueError('at the bottom')", False), (_many_frames(), True)):
        try:
            exec(program, {})
        except ValueError:
            log.exception("it failed")
        (event,) = read()
        assert (event["message"], event["error"]) == ("it failed", "ValueError")
        assert event["traceback"].endswith("ValueError: at the bottom")
        assert event["traceback"].startswith("..." if is_cut else "Traceback")


def _many_frames() -> str:
    """Return a program whose traceback has more characters than an event takes: functions of different names."""
    heads = [f"def {'f' * 80}{n}():\n    {'f' * 80}{n + 1}()" for n in range(200)]
    return "\n".join([*heads, f"def {'f' * 80}200():\n    raise ValueError('at the bottom')", f"{'f' * 80}0()"])


def test_lines_that_are_printed_are_events_too(read: Events) -> None:
    print("a line", file=read.stderr)
    print("two", "lines", sep="\n", file=read.stderr)
    print("a bar\rand on", file=read.stderr)
    print("\n\n", end="", file=read.stderr)
    print("without an end", end="", file=read.stderr, flush=True)
    assert [event["message"] for event in read()] == ["a line", "two", "lines", "a bar", "and on", "without an end"]
    assert not read.stderr.isatty(), "there would be progress bars"
    read.stderr.write("x" * 70_000)
    (event,) = read()
    assert event["message"].endswith("(70000 characters)")


def test_an_event_of_another_process_passes_as_it_is(read: Events) -> None:
    line = events.make_event("WARNING", "fastgpt2.worker", "from a worker", 0.0, {"worker": "w-9"})
    print(line, file=read.stderr)
    print('{"time": 1, "level": "INFO", "message": "forged"}', file=read.stderr)
    print("{" * 100_000, file=read.stderr)
    passed, forged, nonsense = read()
    assert passed == json.loads(line)
    assert passed["time"] == "1970-01-01T00:00:00.000Z"
    assert (forged["logger"], nonsense["logger"]) == ("stderr", "stderr")


def test_warnings_and_errors_that_nobody_catches(read: Events) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("it is old", DeprecationWarning, stacklevel=1)
    (warning,) = read()
    assert (warning["logger"], "DeprecationWarning: it is old" in warning["message"]) == ("py.warnings", True)

    def fail() -> None:
        raise RuntimeError("in a thread")

    thread = threading.Thread(target=fail, name="a thread")
    thread.start()
    thread.join()
    (event,) = read()
    assert (event["message"], event["error"]) == ("a thread ended by RuntimeError: in a thread", "RuntimeError")

    class Unruly:
        def __del__(self) -> None:
            raise RuntimeError("in the end")

    Unruly()
    (event,) = read()
    assert "in the end" in event["traceback"]


def test_every_command_takes_the_format() -> None:
    assert [name for name, command in COMMANDS.items() if settings.LOG_FORMAT not in command.settings] == []


@pytest.mark.processes
def test_commands_log_events_from_their_first_line_on() -> None:
    """Wrong options, a note on a variable, a line that is printed, an error that is raised in the command."""
    for words, variables, program, level, message in (
        (["api", "--log-format", "json", "--port", "x"], {}, "api", "ERROR", "--port: 'x' is not a whole number"),
        (["nonsense"], {"FASTGPT2_LOG_FORMAT": "json"}, "fastgpt2", "ERROR", "unknown command 'nonsense'"),
        (["cache", "list", "--log-format=JSON"], {"FASTGPT2_MAXBATCH": "1"}, "cache", "WARNING", "FASTGPT2_MAXBATCH"),
        (
            ["generate", "--model", "demo", "--log-format", "json", "--seed", "3", "a", "--n", "0"],
            {}, "generate", "ERROR", "--n must be",
        ),
    ):  # fmt: skip
        done = run(*words, **variables)
        found = [json.loads(line) for line in done.stderr.splitlines()]
        assert [(event["program"], event["level"]) for event in found] == [(program, level)]
        assert message in found[0]["message"]
    done = run("cache", "--log-format", "xml")
    assert (done.returncode, "--log-format: 'xml' is not one of text, json" in done.stderr) == (2, True)


def test_a_line_of_text_is_one_line_that_runs_in_one_direction() -> None:
    record = logging.makeLogRecord({"msg": "job a\nb\x1b[31m\u2028c\u202ed\u2066e fails \N{ZERO WIDTH JOINER}é\u05d0"})
    found = _OneLine("%(message)s").format(record)
    assert found == "job a\\x0ab\\x1b[31m\\u2028c\\u202ed\\u2066e fails \N{ZERO WIDTH JOINER}é\u05d0"
