"""The endpoint's reading for all jobs that its requests wait for, over one connection, however many there are.

A client that waits for a job by itself holds a connection for it. An endpoint with hundreds of streams does better with
one `ReadLoop` for all: each read brings whatever has come for any of the jobs.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress

from redis.exceptions import RedisError

from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.client.enqueue import SentJob
from fastgpt2.api.client.flow import Command, Flow, Pause, Pipeline
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.errors import FastGPT2Error
from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import job_key, wake_key
from fastgpt2.protocol.untrusted import is_of_entry

log = logging.getLogger("fastgpt2.http")

# The pause between two reads, for each job that is waited for: entries that come meanwhile are read together, at the
# price of one read.
PACE_SECONDS = 5e-5
LONGEST_PACE_SECONDS = 0.025

WAKE_TTL_SECONDS = 60


class Watch:
    """The reader of all jobs that requests wait for; `run` is its task."""

    def __init__(self, client: AsyncClient) -> None:
        self._session, self._driver = client._session, client._driver
        self._readers: dict[JobReader, None] = {}
        self._joined = asyncio.Event()
        self._wake_key = wake_key(uuid.uuid4().hex)
        self._loop = ReadLoop(self._session.recovery, wake_key=self._wake_key)
        self._waking: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._readers)

    def follow(self, job: SentJob | str, streamed: bool, signal: asyncio.Event, new: bool) -> JobReader:
        """Read for a job, and set the event when something has come of it.

        Args:
            job: as it was enqueued here, to be enqueued again if Redis loses it; or the id of any other.
            streamed: read its text too.
            new: the job was enqueued just now, so there is no need to ask whether it exists or has ended long since.
        """
        sent = None if isinstance(job, str) else job
        reader = JobReader(job if isinstance(job, str) else job.id, streamed, new, signal.set, sent)
        self._readers[reader] = None
        self._joined.set()
        if self._loop.blocked:
            # To wake the loop once is enough. As the entry stays, it does not matter whether the read has begun.
            self._loop.blocked = False
            task = asyncio.create_task(self._wake())
            self._waking.add(task)
            task.add_done_callback(self._waking.discard)
        return reader

    def drop(self, reader: JobReader) -> None:
        """Read for a job no longer."""
        self._readers.pop(reader, None)

    async def run(self) -> None:
        """Read until cancelled. A Redis that stays away ends the reading for all jobs with its error."""
        while True:
            if not self._readers:
                self._joined.clear()
                await self._joined.wait()
            try:
                await self._driver.run(self._turn())
            except Exception as reason:
                error = reason if isinstance(reason, FastGPT2Error) else FastGPT2Error("an unforeseen error")
                if error is not reason:
                    log.exception("unforeseen, while reading for %s", counted(len(self._readers), "job"))
                for reader in list(self._readers):
                    reader.end(error)
            self._drop_ended()

    def _turn(self) -> Flow[None]:
        try:
            if (yield from self._loop.turn(self._readers.keys())):
                self._drop_ended()
                yield Pause(min(LONGEST_PACE_SECONDS, PACE_SECONDS * len(self._readers)))
        except RedisError as error:
            if not (is_of_entry(error) and (yield from self._weed_out())):
                raise

    def _weed_out(self) -> Flow[bool]:
        """End the jobs with a key of another type than ours: such a key fails every read, also for other jobs.

        Returns:
            True if there were any.
        """
        hashes = [(reader, job_key(reader.id), b"hash") for reader in self._readers]
        asked = [*hashes, *((reader, key, b"stream") for reader in self._readers for key in reader.positions)]
        found = yield from self._session.retries.ask(Pipeline(tuple(Command("type", (key,)) for _, key, _ in asked)))
        before = len(self._readers)
        for (reader, key, kind), actual in zip(asked, found, strict=True):
            if actual not in (kind, b"none"):
                text = f"Redis holds a {actual.decode()} at {key}, where the {kind.decode()} of job {reader.id} belongs"
                reader.end(FastGPT2Error(f"{text}: another program has written there"))
                self.drop(reader)
        return len(self._readers) < before

    def _drop_ended(self) -> None:
        for reader in [reader for reader in self._readers if reader.outcome is not None]:
            self.drop(reader)

    async def _wake(self) -> None:
        with suppress(Exception):  # the loop queries all states by itself within two seconds
            async with self._driver.connection.pipeline(transaction=True) as pipeline:
                pipeline.xadd(self._wake_key, {"": ""}, maxlen=1)
                pipeline.expire(self._wake_key, WAKE_TTL_SECONDS)
                await pipeline.execute()
