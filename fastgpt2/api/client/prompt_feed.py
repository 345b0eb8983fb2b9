"""Prompts of an asynchronous iterable, for a bulk run: it takes what has come, and waits for none."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.api.client.bulk import Item


class PromptFeed(Iterator["Item"]):
    """Gives a plan for each prompt, in their order, and None while no prompt has come.

    A task reads the prompts, from the first question on. It ends at the iterable's end, and what the iterable raises is
    raised by the question after its last prompt.

    Args:
        plan: makes the plan of a prompt, by its number from 0.
        ahead: the most prompts that are read before somebody asks for them.
    """

    def __init__(self, prompts: AsyncIterable[Any], plan: Callable[[int, Any], Item], ahead: int) -> None:
        self._prompts, self._plan = prompts, plan
        self._items: deque[Item] = deque()
        self._room = asyncio.Semaphore(ahead)
        self._task: asyncio.Task[None] | None = None

    def __next__(self) -> Item:
        if self._task is None:
            self._task = asyncio.create_task(self._read())
        if self._items:
            self._room.release()
            return self._items.popleft()
        if not self._task.done():
            return None
        self._task.result()
        raise StopIteration

    async def _read(self) -> None:
        number = 0
        await self._room.acquire()
        async for prompt in self._prompts:
            self._items.append(self._plan(number, prompt))
            number += 1
            await self._room.acquire()

    async def aclose(self) -> None:
        """Read no more."""
        if self._task is not None and self._task.cancel():
            await asyncio.wait([self._task])
