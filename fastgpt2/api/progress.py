"""A bar on standard error: how many jobs have ended, and tokens a second."""

from __future__ import annotations

import time
from typing import Any, Self

from fastgpt2.api.outcome import Outcome
from fastgpt2.engine.generation import GenerationResult


class Progress:
    """tqdm, imported when the first bar is made.

    Args:
        total: how many jobs there are, if that is known; without, no end is foretold.
        done: how many of them had ended before.
        shown: whether there is a bar at all.
    """

    def __init__(self, total: int | None, shown: bool, done: int = 0) -> None:
        self._bar: Any = None
        self._tokens = 0
        self._started = time.monotonic()
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="job", dynamic_ncols=True)

    def add(self, outcome: Outcome) -> None:
        """One more has ended."""
        if self._bar is None:
            return
        if isinstance(outcome, GenerationResult):
            self._tokens += outcome.usage.completion_tokens
        rate = self._tokens / max(1e-3, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def length_of(prompts: object) -> int | None:
    """How many prompts there are, of a collection that knows."""
    try:
        return len(prompts)  # type: ignore[arg-type]
    except TypeError:
        return None
