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
        done: whether the stream ended with the mark of a complete one.
    """

    events: int = 0
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    done: bool = False


async def _read(port: int, body: bytes) -> Stream:
    """Send one request and read its stream to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    found, last = Stream(), time.perf_counter()
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            found.done = True
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


def read_all(port: int, prompts: Sequence[list[int]], tokens: int) -> list[Stream]:
    """Ask for a stream for each prompt, all at once, and read all of them to their ends."""

    async def run() -> list[Stream]:
        bodies = [
            json.dumps({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
            for prompt in prompts
        ]
        return await asyncio.gather(*(_read(port, body) for body in bodies))

    return asyncio.run(run())
