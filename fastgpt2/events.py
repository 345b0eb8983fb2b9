"""The log as JSON events, one a line: `--log-format json`.

Whatever a program would write to standard error becomes an event: lines of its log and of libraries' logs, Python's
warnings, the traceback of an error that nobody caught, and lines that are printed there.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

log = logging.getLogger("fastgpt2")

# A message is no longer, and neither is a field. Of a longer traceback the end is kept, which says what happened.
MAX_MESSAGE_CHARACTERS = 4000
MAX_FIELD_CHARACTERS = 16_000

# A line without an end, as a program may print it, becomes an event at this length.
MAX_LINE_CHARACTERS = 1 << 16

# The variable by which a program tells the processes that it starts.
VARIABLE = "FASTGPT2_LOG_FORMAT"

# The keys by which a line is known to be an event already, as a process that was started here writes it.
_EVENT_KEYS = ("time", "level", "message")

# What stands in every event of this process, such as the worker's name.
_of_process: dict[str, Any] = {}

# What stands in every event of the request that is served; each request has a context of its own.
OF_REQUEST: ContextVar[Mapping[str, Any]] = ContextVar("OF_REQUEST", default={})  # noqa: B039, nobody writes into it


def describe_process(**fields: Any) -> None:
    """Have these fields stand in every event of this process from now on."""
    _of_process.update(fields)


def about(**fields: Any) -> dict[str, Any]:
    """Return the `extra` of a call that logs: these fields stand in the event, beside the message."""
    return {"fields": fields}


def are_logged() -> bool:
    """Tell whether this process logs events."""
    return isinstance(sys.stderr, EventWriter)


def log_events(program: str) -> None:
    """Have all that this process writes to standard error be events from now on, and what its children write too.

    Args:
        program: the name by which events say which program wrote them.
    """
    if isinstance(sys.stderr, EventWriter):
        return
    os.environ[VARIABLE] = "json"
    # Progress bars are made of line ends that are none.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    describe_process(program=program, pid=os.getpid())
    sys.stderr = EventWriter(sys.stderr)
    logging.basicConfig(level=logging.WARNING, handlers=[event_handler()], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def event_handler() -> logging.Handler:
    """Return the handler that writes events to this process's standard error."""
    stream = sys.stderr
    handler = logging.StreamHandler(stream.raw if isinstance(stream, EventWriter) else stream)
    handler.setFormatter(EventFormatter())
    return handler


class EventFormatter(logging.Formatter):
    """The formatter: a record becomes one line of JSON.

    What the call that logs gives as `extra=about(...)` stands beside the message.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {**OF_REQUEST.get(), **getattr(record, "fields", {})}
        return make_event(record.levelname, record.name, record.getMessage(), record.created, fields, record.exc_info)


def make_event(
    level: str,
    logger: str,
    message: str,
    at: float,
    fields: Mapping[str, Any] | None = None,
    error: tuple[Any, Any, Any] | None = None,
) -> str:
    """Return an event as a line of JSON, in ASCII: nothing in it ends a line, whatever the message quotes.

    Args:
        at: when it happened, in seconds since 1970.
    """
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event: dict[str, Any] = {
        "time": moment,
        "level": level,
        "logger": logger,
        "message": _cut(message, MAX_MESSAGE_CHARACTERS),
    }
    for name, value in (*_of_process.items(), *(fields or {}).items()):
        event[name] = _plain(value)
    if error is not None and error[0] is not None:
        text = logging.Formatter().formatException(error)
        event["error"] = error[0].__name__
        event["traceback"] = text if len(text) <= MAX_FIELD_CHARACTERS else f"...{text[-MAX_FIELD_CHARACTERS:]}"
    return json.dumps(event)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _plain(value: Any) -> Any:
    """Return a field's value as JSON has it: what is no number of JSON, or no text, is written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return _cut(str(value), MAX_FIELD_CHARACTERS)


def read_event(line: str) -> dict[str, Any] | None:
    """Return the event that a line is; None if it is none."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and all(isinstance(event.get(key), str) for key in _EVENT_KEYS) else None


class EventWriter(io.TextIOBase):
    """The standard error of a process that logs events: each line that is printed there becomes one.

    A line that is an event already, as those of a worker that was started here, is written as it is.

    Attributes:
        raw: the stream below, to which events are written.
    """

    def __init__(self, raw: TextIO) -> None:
        super().__init__()
        self.raw = raw
        self._rest = ""
        # Held by a thread that may be interrupted by a signal, whose handler prints too.
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.raw.encoding

    def fileno(self) -> int:
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        """Return False: nobody wants a progress bar among events."""
        return False

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
            if len(self._rest) > MAX_LINE_CHARACTERS:
                lines, self._rest = [*lines, self._rest], ""
            for line in lines:
                self._write_line(line)
        return len(text)

    def flush(self) -> None:
        """Write what has been printed of a line whose end has not come."""
        with self._lock:
            rest, self._rest = self._rest, ""
            self._write_line(rest)
        self.raw.flush()

    def emit(self, level: str, message: str, **fields: Any) -> None:
        """Write an event of a level: for lines that are printed before there is a log."""
        with self._lock:
            self._write_event(make_event(level, "fastgpt2", message, time.time(), fields))

    def _write_line(self, line: str) -> None:
        if line.strip():
            is_event = read_event(line) is not None
            now = time.time()
            self._write_event(line if is_event else make_event("INFO", "stderr", line, now, OF_REQUEST.get()))

    def _write_event(self, line: str) -> None:
        self.raw.write(line + "\n")
        self.raw.flush()


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(hint: threading.ExceptHookArgs) -> None:
    if hint.exc_type is not SystemExit and hint.exc_value is not None:
        name = hint.thread.name if hint.thread is not None else "a thread"
        error = hint.exc_type, hint.exc_value, hint.exc_traceback
        log.error("%s ended by %s: %s", name, hint.exc_type.__name__, hint.exc_value, exc_info=error)


def _log_unraisable(hint: Any) -> None:
    message = hint.err_msg or "an error that cannot be raised"
    error = None if hint.exc_value is None else (hint.exc_type, hint.exc_value, hint.exc_traceback)
    log.error("%s: %.200r", message, hint.object, exc_info=error)
