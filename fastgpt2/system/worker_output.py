"""What worker processes write to standard output and error: read from a pipe, and shown beside a progress bar."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from contextlib import suppress

from fastgpt2.events import read_event
from fastgpt2.process import stop_signals_held

# A longer line comes in parts. No event is longer.
MAX_LINE_BYTES = 1 << 20

# How many different lines are remembered, so that what all workers say alike is shown once.
MOST_REMEMBERED = 1000

# How long what was written may take to be read.
SETTLE_SECONDS = 2.0

_MARK = b"\0all of it\n"

# How `fastgpt2 worker` says why it ends.
_REASON = "fastgpt2 worker: "
_DATE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ ")
_FAILED_JOB = re.compile(r"WARNING \S+: job \S+ (of request \S+ )?failed: ")


class WorkerOutput:
    """A pipe that worker processes write to, and a thread that shows their lines on this process's standard error.

    A line that several workers write is shown once, be it text or an event. The reason for which a worker ends is kept
    for whoever supervises the workers, and shown on demand. That a job failed is not shown: its result says so, and
    there may be thousands.

    Args:
        shows_jobs: show lines about failed jobs, too.

    Attributes:
        writer: the descriptor for the workers.
        reason: why a worker ended, in its own words; empty if none has said so.
    """

    def __init__(self, shows_jobs: bool) -> None:
        self.reason = ""
        self._shows_jobs = shows_jobs
        self._withheld: list[str] = []
        self._shown: set[str] = set()
        self._settled = threading.Event()
        reader, self.writer = os.pipe()
        self._reader = os.fdopen(reader, "rb")
        self._thread = threading.Thread(target=self._run, daemon=True, name="output of workers")
        with stop_signals_held():  # they are the main thread's
            self._thread.start()

    def settle(self) -> None:
        """Wait until all that was written so far has been read."""
        self._settled.clear()
        os.write(self.writer, _MARK)
        self._settled.wait(SETTLE_SECONDS)

    def show_reasons(self) -> None:
        """Show why workers have ended, unless that was shown."""
        while self._withheld:
            show_beside_bar(self._withheld.pop(0))

    def close(self) -> None:
        """Show the rest, once all workers have ended."""
        os.close(self.writer)
        # A process that a killed worker has left behind may hold the pipe open.
        self._thread.join(SETTLE_SECONDS)

    def _run(self) -> None:
        with self._reader:
            while raw := self._reader.readline(MAX_LINE_BYTES):
                if raw == _MARK:
                    self._settled.set()
                else:
                    self._take(raw.decode("utf-8", "backslashreplace").rstrip("\n"))

    def _take(self, line: str) -> None:
        event = read_event(line)
        said = line if event is None else event["message"]
        text = _DATE.sub("", line, count=1) if event is None else f"{event['level']} {said}"
        is_repeated = text != line and text in self._shown
        if is_repeated or (_FAILED_JOB.match(text) and not self._shows_jobs):
            return
        if said.startswith(_REASON):
            self.reason = said.removeprefix(_REASON)
            if line not in self._withheld:
                self._withheld.append(line)
            return
        if len(self._shown) < MOST_REMEMBERED:
            self._shown.add(text)
        show_beside_bar(line)


class BesideBar(logging.Handler):
    """Shows this process's log on standard error, beside a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        show_beside_bar(self.format(record))


def show_beside_bar(line: str) -> None:
    """Write a line to standard error; a progress bar there makes way for it. Nobody may be there to read it."""
    # Only who shows a bar has imported tqdm, which takes long.
    bars = sys.modules.get("tqdm")
    with suppress(OSError, ValueError):
        if bars is not None:
            bars.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
