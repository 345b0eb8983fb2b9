"""Many streams of an endpoint at once, read by as little code as possible: the other side is what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stream:
    """The answer to one request.

    Attributes:
        events: how many there were.
        first: seconds from the request to the first event.
        gaps: seconds between two successive events.
        began_at, ended_at: of the request and of the end of the stream, on `time.perf_counter`'s clock.
        done: whether the stream ended with the mark of a complete one.
    """

    events: int = 0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    began_at: float = 0.0
    ended_at: float = 0.0
    done: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at


async def _read(port: int, body: bytes) -> Stream:
    """Send one request and read its stream to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    found = Stream(began_at=time.perf_counter())
    last = found.began_at
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            found.done, found.ended_at = True, time.perf_counter()
            break
        now = time.perf_counter()
        if found.events == 0:
            found.first = now - last
        else:
            found.gaps.append(now - last)
        found.events += 1
        last = now
    writer.close()
    return found


def read_all(port: int, prompts: Sequence[list[int]], tokens: int, clients: int | None = None) -> list[Stream]:
    """Ask for a stream for each prompt, and read all of them to their ends.

    Args:
        clients: how many streams there are at once: each client asks for the next one when its last one has ended.
            None for all at once.

    Returns:
        The streams, in the order of their prompts.
    """

    async def run() -> list[Stream]:
        gate = asyncio.Semaphore(clients or len(prompts))

        async def read(prompt: list[int]) -> Stream:
            body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
            async with gate:
                return await _read(port, json.dumps(body).encode())

        return await asyncio.gather(*map(read, prompts))

    return asyncio.run(run())
