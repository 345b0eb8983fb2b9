"""A fleet: some workers of one model on a queue of their own, and jobs for them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from benchmarks.capacity.redis_use import metered
from benchmarks.common import wait_until
from benchmarks.pool.pools import ANNOUNCE_SECONDS, enqueue, running_workers
from fastgpt2 import Client
from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.http.watch import Watch
from fastgpt2.bench import Values
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import registry_key, stream_key, workers_key

RUN_SECONDS = 1800.0
DEMO = "demo"


class Fleet:
    """Workers on a queue of their own, and a client of theirs.

    Attributes:
        processes: the workers' processes.
        connection: a connection to their Redis.
        client: a client of their queue.
        ids: the ids of the jobs of the last run.
    """

    def __init__(
        self, url: str, queue: str, connection: Any, client: Client, processes: Sequence[subprocess.Popen[bytes]]
    ) -> None:
        self.url, self.queue, self.processes = url, queue, processes
        self.connection, self.client = connection, client
        self.ids: list[str] = []

    def count(self, field: str) -> int:
        """Return the sum of one of the workers' counters, as of their last heartbeats."""
        keys = self.connection.smembers(workers_key(self.queue))
        return sum(int(self.connection.hget(key, field) or 0) for key in keys)

    def finished(self) -> int:
        """Return how many jobs are finished."""
        return int(self.connection.zcard(registry_key("finished", self.queue)))

    def await_finished(self, count: int) -> None:
        """Wait until `count` jobs are finished."""
        wait_until(lambda: self.finished() >= count, f"{count} jobs to be finished", RUN_SECONDS)

    def run_unread(self, prompts: Sequence[list[int]], tokens: int, stream: bool) -> Values:
        """Enqueue all prompts, read nothing, and wait until all are finished. Return what Redis did meanwhile."""
        before = self.finished()
        with self._counted(len(prompts) * tokens) as used:
            self.ids = [enqueue(self.client, prompt, tokens, stream).id for prompt in prompts]
            self.await_finished(before + len(prompts))
        return self._with_pieces(used, stream)

    def run_read(self, prompts: Sequence[list[int]], tokens: int, stream: bool, at_once: int) -> Values:
        """Do the same, and read as the HTTP endpoint reads: `at_once` jobs at a time, by one reader for all of them."""
        with self._counted(len(prompts) * tokens) as used:
            self.ids = asyncio.run(_watch_all(self.url, self.queue, prompts, tokens, stream, at_once))
        return self._with_pieces(used, stream)

    @contextmanager
    def _counted(self, tokens: int) -> Iterator[Values]:
        """Meter Redis within the block, and count the steps that the workers made for `tokens` tokens."""
        tokens_before, steps_before = self.count("tokens"), self.count("steps")
        with metered(self.connection) as used:
            yield used
        expected = tokens_before + tokens
        wait_until(lambda: self.count("tokens") == expected, f"workers to count {expected} tokens", ANNOUNCE_SECONDS)
        used.update(tokens=tokens, steps=self.count("steps") - steps_before)

    def _with_pieces(self, used: Values, stream: bool) -> Values:
        """Add the numbers of jobs and of pieces of text."""
        used.update(jobs=len(self.ids), jobs_per_s=len(self.ids) / used["seconds"])
        with self.connection.pipeline(transaction=False) as pipeline:
            for job_id in self.ids:
                pipeline.xlen(stream_key(job_id))
            # The last entry of each stream says that the job has ended.
            used["pieces"] = sum(max(0, count - 1) for count in pipeline.execute()) if stream else 0
        return used


async def _watch_all(
    url: str, queue: str, prompts: Sequence[list[int]], tokens: int, stream: bool, at_once: int
) -> list[str]:
    """Enqueue all prompts and read their ends and texts. Return the jobs' ids."""
    async with AsyncClient(url, queue) as client:
        watch, room = Watch(client), asyncio.Semaphore(at_once)

        async def one(prompt: list[int]) -> str:
            async with room:
                job = await client.enqueue(prompt, max_new_tokens=tokens, ignore_eos=True, stream=stream)
                signal = asyncio.Event()
                watched = watch.follow(job.id, stream, signal, new=True)
                while watched.outcome is None:
                    await signal.wait()
                    signal.clear()
                    for _ in watched.pieces():
                        pass
                if isinstance(watched.outcome, Exception):
                    raise watched.outcome
                return job.id

        reader = asyncio.create_task(watch.run())
        try:
            return await asyncio.gather(*(one(prompt) for prompt in prompts))
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader


@contextmanager
def fleet(url: str, queue: str, count: int, model: str = DEMO, threads: int = 1) -> Iterator[Fleet]:
    """Start `count` workers, and stop them afterwards."""
    command = [sys.executable, "-m", "fastgpt2", "worker", "--redis-url", url, "--queue", queue]
    command += ["--model", model, "--threads", str(threads), "--log-level", "warning"]
    # Any: redis-py's types say that each answer may be one of another protocol, or None.
    connection: Any = connect(url)
    with (
        closing(connection),
        running_workers(command, count, f"{count} workers", connection, queue) as processes,
        Client(url, queue) as client,
    ):
        yield Fleet(url, queue, connection, client, processes)
