"""Workers of `bench_capacity.py`, as `fastgpt2 worker` starts them, and jobs for them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from common import Failed, environment, last_line
from pool_runs import ANNOUNCE_SECONDS, START_SECONDS, enqueue, stop, wait_until
from redis_use import metered

from fastgpt2 import Client
from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.http.watch import Watch
from fastgpt2.bench import Values
from fastgpt2.process import set_up_child
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import stream_key

RUN_SECONDS = 1800.0
DEMO = "demo"


class Fleet:
    """Workers on a queue of their own, and a client of theirs.

    Attributes:
        processes: of the workers.
        client: on their queue.
        ids: of the jobs of the last run.
    """

    def __init__(self, url: str, queue: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.url, self.queue, self.processes = url, queue, processes
        self.client = Client(url, queue)
        self.ids: list[str] = []
        # Any: redis-py's types have it that each answer may be one of another protocol, or none.
        self.connection: Any = connect(url)

    def told(self, field: str) -> int:
        """What all workers say of one of their counts, as of their last heartbeats."""
        keys = self.connection.smembers(f"rq:workers:{self.queue}")
        return sum(int(self.connection.hget(key, field) or 0) for key in keys)

    def finished(self) -> int:
        return int(self.connection.zcard(f"rq:finished:{self.queue}"))

    def await_finished(self, count: int) -> None:
        wait_until(lambda: self.finished() >= count, f"{count} jobs to be finished", RUN_SECONDS)

    def burst(self, prompts: Sequence[list[int]], tokens: int, stream: bool) -> Values:
        """Enqueue all, read nothing, and wait until all are finished: what Redis did for it."""
        before = self.finished()
        with self._counted(len(prompts) * tokens) as used:
            self.ids = [enqueue(self.client, prompt, tokens, stream).id for prompt in prompts]
            self.await_finished(before + len(prompts))
        return self._with_pieces(used, stream)

    def watched(self, prompts: Sequence[list[int]], tokens: int, stream: bool, at_once: int) -> Values:
        """The same, read as the HTTP endpoint reads: so many jobs at once, by one reader for all of them."""
        with self._counted(len(prompts) * tokens) as used:
            self.ids = asyncio.run(_watch_all(self.url, self.queue, prompts, tokens, stream, at_once))
        return self._with_pieces(used, stream)

    @contextmanager
    def _counted(self, tokens: int) -> Iterator[Values]:
        """Metered, and with the steps that the workers made for so many tokens."""
        tokens_before, steps_before = self.told("tokens"), self.told("steps")
        with metered(self.connection) as used:
            yield used
        expected = tokens_before + tokens
        wait_until(lambda: self.told("tokens") == expected, f"workers to tell of {expected} tokens", ANNOUNCE_SECONDS)
        used.update(tokens=tokens, steps=self.told("steps") - steps_before)

    def _with_pieces(self, used: Values, stream: bool) -> Values:
        used.update(jobs=len(self.ids), jobs_per_s=len(self.ids) / used["seconds"])
        with self.connection.pipeline(transaction=False) as pipeline:
            for job_id in self.ids:
                pipeline.xlen(stream_key(job_id))
            # The last entry of each says that there are no more.
            used["pieces"] = sum(max(0, count - 1) for count in pipeline.execute()) if stream else 0
        return used

    def close(self) -> None:
        self.client.close()
        self.connection.close()


async def _watch_all(
    url: str, queue: str, prompts: Sequence[list[int]], tokens: int, stream: bool, at_once: int
) -> list[str]:
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
    """So many workers, ready."""
    command = [sys.executable, "-m", "fastgpt2", "worker", "--redis-url", url, "--queue", queue]
    command += ["--model", model, "--threads", str(threads), "--log-level", "warning"]
    # The same prompts are sent in every round, and are to be read in every round.
    command += ["--prefix-memory", "0"]
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile(mode="w+") as log:
        try:
            for _ in range(count):
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment(FASTGPT2_POOL_WORKERS=str(count)),
                        stdout=log,
                        stderr=log,
                        preexec_fn=set_up_child,
                    )
                )
            workers = Fleet(url, queue, processes)

            def registered() -> bool:
                if any(process.poll() is not None for process in processes):
                    log.seek(0)
                    raise Failed(f"a worker ended: {last_line(log.read())}")
                time.sleep(0.1)
                return bool(workers.connection.scard(f"rq:workers:{queue}") >= count)

            wait_until(registered, f"{count} workers to be ready", START_SECONDS)
            yield workers
            workers.close()
        finally:
            for process in processes:
                process.terminate()  # all of them first: each takes a while
            for process in processes:
                stop(process)
