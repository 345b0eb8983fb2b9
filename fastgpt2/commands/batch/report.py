"""What a run says on standard error: the first error at once, how far it is, and a summary at its end."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from typing import Any

from fastgpt2.plurals import counted

# How often a run says how far it is where no bar can be shown.
INTERVAL_SECONDS = 60.0
_SHOWN_CHARACTERS = 500


class Report:
    """Counts the ends of lines, and tells of them.

    Args:
        total: the number of lines; None if it is not known.
        shows_bar: a bar tells how far the run is, and no lines of text.
        interval: seconds between two of these lines.

    Attributes:
        errors: how many lines are errors, by their kinds.
        unfinished: how many lines have no end that counts.
        kept: how many lines had their result before.
    """

    def __init__(self, total: int | None, shows_bar: bool, interval: float = INTERVAL_SECONDS) -> None:
        self.total = total
        self.errors: Counter[str] = Counter()
        self.unfinished = 0
        self.kept = 0
        self._results = 0
        self._tokens = 0
        self._has_told_error = False
        self._began = time.monotonic()
        self._bar: Any = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if shows_bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="line", dynamic_ncols=True)
        else:
            self._thread = threading.Thread(target=self._tell_now_and_then, args=(interval,), daemon=True)
            self._thread.start()

    def keep(self, error: tuple[str, str] | None) -> None:
        """Count a line that had its result, or its error, before."""
        self.kept += 1
        self._count(error)

    def add(self, number: int, error: tuple[str, str] | None, tokens: int) -> None:
        """Count a line that has ended now; tell of the first error."""
        self._tokens += tokens
        self._count(error)
        if error is not None and not self._has_told_error:
            self._has_told_error = True
            self.say(f"the first error, line {number}: {one_line(error[1])}")

    def _count(self, error: tuple[str, str] | None) -> None:
        if error is None:
            self._results += 1
        else:
            self.errors[error[0]] += 1
        if self._bar is not None:
            rate = self._tokens / max(1e-3, time.monotonic() - self._began)
            self._bar.set_postfix_str(f"{counted(self.errors.total(), 'error')}, {rate:.0f} tokens/s", refresh=False)
            self._bar.update()

    @property
    def done(self) -> int:
        return self._results + self.errors.total()

    def say(self, text: str) -> None:
        """Print a line on standard error, over a bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            # As one piece: two threads say something.
            print(f"{text}\n", end="", file=sys.stderr, flush=True)

    def _tell_now_and_then(self, interval: float) -> None:
        while not self._ended.wait(interval):
            self.say(self._progress())

    def _progress(self) -> str:
        lines = counted(self.done, "line") if self.total is None else f"{self.done} of {counted(self.total, 'line')}"
        seconds = time.monotonic() - self._began
        text = f"{lines}, {counted(self.errors.total(), 'error')}, {self._tokens / seconds:.0f} tokens/s"
        new = self.done - self.kept
        if self.total is not None and new:
            text += f", {_duration(seconds / new * max(0, self.total - self.done))} left"
        return text

    def summary(self, where: str, is_continued: bool) -> list[str]:
        """Return what there is to say at the end of a run.

        Args:
            where: the name of the output.
            is_continued: the same command can go on with this output.
        """
        seconds = time.monotonic() - self._began
        errors = self.errors.total()
        before = f" ({self.kept} of them from before)" if self.kept else ""
        lines = [
            f"{counted(self.done, 'line')} in {where}{before}: {counted(self._results, 'result')}, "
            f"{counted(self._tokens, 'token')} in "
            f"{_duration(seconds)}, {self._tokens / max(seconds, 1e-3):.0f} tokens/s"
        ]
        if errors:
            kinds = ", ".join(f"{times} {kind}" for kind, times in self.errors.most_common())
            again = "; --retry-errors tries them again" if is_continued else ""
            are = "is an error" if errors == 1 else "are errors"
            lines.append(f"{errors} of {counted(self.done, 'line')} {are}: {kinds}{again}")
        if self.unfinished:
            lines.append(
                f"{counted(self.unfinished, 'line has', 'lines have')} no result, as somebody cancelled or stopped the "
                "jobs, or they were lost; the same command tries again"
            )
        return lines

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    return f"{minutes} min" if minutes < 100 else f"{hours} h"
