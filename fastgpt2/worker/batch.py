"""The jobs that a worker holds: those that are decoded together, and those that wait for room. No Redis here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastgpt2.engine.gpt2 import PREFILL_ROWS_BESIDE
from fastgpt2.worker.running import Running

if TYPE_CHECKING:
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.sequence import Sequence


class Batch:
    """First come, first served: a job that must wait for memory lets nobody past.

    Attributes:
        steps, tokens: taken and generated so far.
        sizes: how many of the steps had 0, 1, 2... sequences.
        step_seconds: spent in the steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._most = engine.max_batch
        self._decoder = engine.decoder
        self._waiting: deque[Running] = deque()
        self._running: dict[Sequence, Running] = {}
        self.steps = self.tokens = 0
        self.sizes = [0] * (self._most + 1)
        self.step_seconds = 0.0

    def __iter__(self) -> Iterator[Running]:
        """All of them, in the order in which they came."""
        yield from list(self._running.values())
        yield from list(self._waiting)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def running(self) -> list[Running]:
        return list(self._running.values())

    @property
    def waiting(self) -> list[Running]:
        return list(self._waiting)

    def add(self, running: Running) -> None:
        self._waiting.append(running)

    def admit(self) -> None:
        """Let in whom there is room for; they are decoded from the next step on."""
        while self._waiting and self._may_join(self._waiting[0]):
            running = self._waiting.popleft()
            running.sequence = self._decoder.admit(running.prompt)
            self._running[running.sequence] = running

    def _may_join(self, running: Running) -> bool:
        if self._running and (running.alone or self._is_one_alone()):
            return False
        return len(self._running) < self._most and self._decoder.has_room(running.prompt)

    def _is_one_alone(self) -> bool:
        return len(self._running) == 1 and next(iter(self._running.values())).alone

    def room(self) -> int:
        """How many more could begin now. None while prompts keep the next step busy: another worker might be free."""
        unread = sum(len(sequence.pending) for sequence in self._running if not sequence.token_ids)
        if self._waiting or unread >= PREFILL_ROWS_BESIDE or self._is_one_alone():
            return 0
        return self._most - len(self._running)

    def step(self) -> list[Running]:
        """Advance all of them. Returns those that ended by themselves, which are not held any more.

        Raises whatever the decoder raises; then none of them can go on.
        """
        if not self._running:
            return []
        began = time.perf_counter()
        before = [len(sequence.token_ids) for sequence in self._running]
        ended = self._decoder.step()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1
        self.sizes[len(before)] += 1
        self.tokens += sum(len(sequence.token_ids) for sequence in self._running) - sum(before)
        return [self._running.pop(sequence) for sequence in ended]

    def drop(self, running: Running) -> None:
        """Let go of a job; what it has generated stays readable."""
        if running.sequence is None:
            self._waiting.remove(running)
        elif self._running.pop(running.sequence, None) is not None:
            self._decoder.finish(running.sequence)
