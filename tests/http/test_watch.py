"""The endpoint's reader of many jobs, on a real Redis, fed as a worker feeds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from redis import Redis

from fastgpt2.api.client import reader as reader_module
from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.client.reader import JobReader
from fastgpt2.api.http.watch import Watch
from fastgpt2.errors import FastGPT2Error, JobCancelled, JobNotFound
from fastgpt2.protocol import connection as connection_module
from fastgpt2.protocol.keys import stream_key
from fastgpt2.protocol.messages import Piece, piece_to_entry
from fastgpt2.system.redis_server import RedisServer


@asynccontextmanager
async def watching(redis_server: RedisServer, queue: str) -> AsyncIterator[tuple[AsyncClient, Watch]]:
    async with AsyncClient(redis_server.url, queue) as client:
        watch = Watch(client)
        task = asyncio.create_task(watch.run())
        yield client, watch
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], signal: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        while not condition():
            signal.clear()
            await signal.wait()


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


def text_of(watched: JobReader) -> str:
    return "".join(piece.text for piece in watched.pieces())


def test_who_joins_wakes_the_reader(
    redis_server: RedisServer, redis: Redis, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the reader would finish its blocking read first, each time."""
    monkeypatch.setattr(reader_module, "READ_SECONDS", 60.0)
    monkeypatch.setitem(connection_module._OPTIONS, "socket_timeout", 300.0)

    async def main() -> None:
        async with watching(redis_server, queue_name) as (client, watch):
            signal = asyncio.Event()
            began = time.monotonic()
            first = await client.enqueue("a")
            watch.follow(first.id, True, signal, new=True)
            for number in range(10):
                job = await client.enqueue("a")
                watched = watch.follow(job.id, True, signal, new=True)
                redis.xadd(stream_key(job.id), piece_to_entry(Piece(f"text {number}", 0, 1)))
                seen: list[str] = []

                def came(watched: JobReader = watched, seen: list[str] = seen) -> bool:
                    seen.append(text_of(watched))
                    return bool(seen[-1])

                await until(came, signal)
                assert seen[-1] == f"text {number}"
            assert time.monotonic() - began < 300, "ten reads that are sat out take at least nine minutes"

    run(main)


def test_a_job_that_is_none_and_one_that_ended_long_since(redis_server: RedisServer, queue_name: str) -> None:
    async def main() -> None:
        async with watching(redis_server, queue_name) as (client, watch):
            signal = asyncio.Event()
            job = await client.enqueue("a")
            await client.cancel(job.id)
            ended, none = (watch.follow(job_id, True, signal, new=False) for job_id in (job.id, "nothing"))
            await until(lambda: ended.outcome and none.outcome, signal)
            assert isinstance(ended.outcome, JobCancelled)
            assert isinstance(none.outcome, JobNotFound)
            assert len(watch) == 0

    run(main)


def test_what_is_no_entry_of_a_stream_is_passed_over(redis_server: RedisServer, redis: Redis, queue_name: str) -> None:
    async def main() -> None:
        async with watching(redis_server, queue_name) as (client, watch):
            signal = asyncio.Event()
            job = await client.enqueue("a")
            watched = watch.follow(job.id, True, signal, new=True)
            for entry in (
                {"x": "y"},
                {"text": b"\xff", "at": 0, "attempt": 1},
                {"text": "a", "at": "b", "attempt": 1},
                {"text": "a", "at": 0, "attempt": 1, "token_at": 0, "logprobs": "3"},
            ):
                redis.xadd(stream_key(job.id), entry)  # type: ignore[arg-type]
            redis.xadd(stream_key(job.id), piece_to_entry(Piece("good", 0, 1)))
            seen: list[str] = []

            def came() -> bool:
                seen.append(text_of(watched))
                return bool(seen[-1])

            await until(came, signal)
            assert "".join(seen) == "good"
            await client.cancel(job.id)
            await until(lambda: watched.outcome, signal)

    run(main)


@pytest.mark.parametrize("key", ["rq:results:{}", "rq:job:{}", "fastgpt2:stream:{}"])
def test_a_key_of_the_wrong_kind_ends_its_own_job_and_no_other(
    redis_server: RedisServer, redis: Redis, queue_name: str, key: str
) -> None:
    """All jobs are read together, and for one such key Redis refuses the whole read."""

    async def main() -> None:
        async with watching(redis_server, queue_name) as (client, watch):
            signal = asyncio.Event()
            spoiled, *others = [watch.follow((await client.enqueue("a")).id, True, signal, new=True) for _ in range(3)]
            redis.set(key.format(spoiled.id), "a string")
            await until(lambda: spoiled.outcome, signal)
            assert type(spoiled.outcome) is FastGPT2Error
            assert f"Redis holds a string at {key.format(spoiled.id)}" in str(spoiled.outcome)
            assert [other.outcome for other in others] == [None, None]
            redis.xadd(stream_key(others[0].id), piece_to_entry(Piece("whole", 0, 1)))
            await until(lambda: text_of(others[0]) == "whole", signal)
            for other in others:
                await client.cancel(other.id)
            await until(lambda: all(other.outcome for other in others), signal)
            assert [type(other.outcome) for other in others] == [JobCancelled, JobCancelled]
            assert len(watch) == 0

    run(main)
