"""The ends and the texts of many jobs, read over one connection, however many there are.

A client that waits by itself (`Session.result`, `Following`) holds a connection for each job. An endpoint with hundreds
of streams does better with one reader for all: each of its reads brings whatever has come for any of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from fastgpt2.api.client.async_client import AsyncClient
from fastgpt2.api.client.flow import Pause, Talk, Together, call, entries_by_key, read_streams
from fastgpt2.api.client.outcome import Awaited, Entries, Outcome, job_key
from fastgpt2.api.client.reader import Assembly
from fastgpt2.api.client.session import LOOK_SECONDS, WAIT_SLICE_SECONDS
from fastgpt2.errors import FastGPT2Error
from fastgpt2.protocol.keys import stream_key, wake_key
from fastgpt2.protocol.messages import Piece, entry_to_piece
from fastgpt2.protocol.untrusted import is_of_entry

log = logging.getLogger("fastgpt2.http")

# Between two reads, for each job that is watched: what comes meanwhile is read together, at the price of one read.
PACE_SECONDS = 5e-5
LONGEST_PACE_SECONDS = 0.025
WAKE_TTL_SECONDS = 60


class Watched:
    """One job, and what has come of it.

    Attributes:
        outcome: how it ended; None while it has not.
    """

    def __init__(self, job_id: str, streamed: bool, signal: asyncio.Event) -> None:
        self.id = job_id
        self.outcome: Outcome | None = None
        self._pieces: deque[Piece] = deque()
        self._signal = signal
        self._job = Awaited(job_id)
        self._stream = stream_key(job_id) if streamed else None
        self._after: bytes | str = "0-0"
        self._assembly = Assembly()
        self.unclear = True

    @property
    def look(self) -> Together:
        return self._job.look()

    @property
    def letting_go(self) -> bool:
        return self._job.letting_go

    @property
    def keys(self) -> dict[str, bytes | str]:
        """What to wait for, each after the last entry that was read."""
        after = {self._job.key: self._job.after}
        return after if self._stream is None else {**after, self._stream: self._after}

    @property
    def kinds(self) -> dict[str, bytes]:
        """What each key that is read must hold, where it holds anything."""
        return {job_key(self.id): b"hash", **dict.fromkeys(self.keys, b"stream")}

    def pieces(self) -> Iterator[Piece]:
        """Those that have come since this was asked last."""
        while self._pieces:
            yield self._pieces.popleft()

    def seen(self, answers: Sequence[object]) -> None:
        """Take in the answer to `look`."""
        self.unclear = False
        self._end(self._job.seen(answers, time.monotonic()))

    def heard(self, reply: Mapping[str, Entries]) -> None:
        """Take in what has come for the job's keys."""
        if self._stream is not None:
            self._take(reply.get(self._stream, ()))
        news = reply.get(self._job.key, ())
        outcome = self._job.heard(news)
        self.unclear = self.unclear or (outcome is None and bool(news))
        self._end(outcome)

    def fail(self, error: FastGPT2Error) -> None:
        self._end(error)

    def _take(self, entries: Entries) -> None:
        for entry_id, fields in entries:
            self._after = entry_id
            try:
                piece = entry_to_piece(fields)
            except (KeyError, TypeError, ValueError):
                continue  # not of ours; what it may have stood for comes with the result
            if piece is None:
                self.unclear = True
            else:
                self._add(self._assembly.add(piece))

    def _end(self, outcome: Outcome | None) -> None:
        if outcome is None or self.outcome is not None:
            return
        if self._stream is not None and not isinstance(outcome, FastGPT2Error):
            self._add(self._assembly.complete(outcome.text, outcome.logprobs or ()))
        self.outcome = outcome
        self._signal.set()

    def _add(self, piece: Piece | None) -> None:
        if piece is not None:
            self._pieces.append(piece)
            self._signal.set()


class Watch:
    """Reads for all jobs that are watched; `run` is its task."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._contact = client.contact
        self._watched: dict[Watched, None] = {}
        self._joined = asyncio.Event()
        self._wake_key = wake_key(uuid.uuid4().hex)
        self._woken: bytes | str = "0-0"
        self._blocked = False
        self._waking: set[asyncio.Task[None]] = set()
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._watched)

    def follow(self, job_id: str, streamed: bool, signal: asyncio.Event, new: bool) -> Watched:
        """Watch a job; the event is set when something has come of it.

        Args:
            streamed: read its text too.
            new: it has just been enqueued, so that there is no need to look whether it exists or has ended long since.
        """
        watched = Watched(job_id, streamed, signal)
        watched.unclear = not new
        self._watched[watched] = None
        self._joined.set()
        if self._blocked:
            # Once is enough. And as an entry stays, it does not matter whether the reader waits already.
            self._blocked = False
            task = asyncio.create_task(self._wake())
            self._waking.add(task)
            task.add_done_callback(self._waking.discard)
        return watched

    def drop(self, watched: Watched) -> None:
        """Watch it no longer."""
        self._watched.pop(watched, None)

    async def run(self) -> None:
        """Read, until cancelled. A Redis that stays away ends the jobs that are watched with its error."""
        while True:
            if not self._watched:
                self._joined.clear()
                await self._joined.wait()
            try:
                await self._client.carry_out(self._guarded_turn())
            except Exception as reason:
                error = reason if isinstance(reason, FastGPT2Error) else FastGPT2Error("an unforeseen error")
                if error is not reason:
                    log.exception("unforeseen, while reading for %d jobs", len(self._watched))
                for watched in list(self._watched):
                    watched.fail(error)
                    self.drop(watched)

    def _guarded_turn(self) -> Talk[None]:
        try:
            yield from self._turn()
        except RedisError as reason:
            if not (is_of_entry(reason) and (yield from self._weed_out())):
                raise

    def _weed_out(self) -> Talk[bool]:
        """End the jobs with a key of another kind than ours: it fails every read that other jobs' keys are in, too.

        Returns:
            Whether there were any.
        """
        before = len(self._watched)
        asked = [(watched, key, kind) for watched in self._watched for key, kind in watched.kinds.items()]
        types = Together(tuple(call("type", key) for _, key, _ in asked))
        for (watched, key, kind), found in zip(
            asked, (yield from self._contact.patiently(types, math.inf)), strict=True
        ):
            if found not in (kind, b"none"):
                text = f"Redis holds a {found.decode()} at {key}, where the {kind.decode()} of job {watched.id} belongs"
                watched.fail(FastGPT2Error(f"{text}: another program has written there"))
                self.drop(watched)
        return len(self._watched) < before

    def _turn(self) -> Talk[None]:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + WAIT_SLICE_SECONDS
            yield from self._look(list(self._watched))
        else:
            yield from self._look([watched for watched in self._watched if watched.unclear or watched.letting_go])
        waiting = list(self._watched)
        if not waiting:
            return
        seconds = max(0.0, self._look_at - time.monotonic())
        if any(watched.letting_go for watched in waiting):
            seconds = min(seconds, LOOK_SECONDS)
        if any(watched.unclear for watched in waiting):  # they have joined meanwhile
            seconds = 0.0
        reply = yield from self._read(waiting, seconds)
        for watched in waiting:
            if not reply.keys().isdisjoint(watched.keys):
                watched.heard(reply)
                self._drop_if_over(watched)
        if reply:
            yield Pause(min(LONGEST_PACE_SECONDS, PACE_SECONDS * len(waiting)))

    def _read(self, waiting: list[Watched], seconds: float) -> Talk[dict[str, list[tuple[Any, Any]]]]:
        keys: dict[str, bytes | str] = {self._wake_key: self._woken}
        for watched in waiting:
            keys.update(watched.keys)
        self._blocked = True
        try:
            answer = yield from self._contact.patiently(read_streams(keys, seconds), math.inf)
        finally:
            self._blocked = False
        reply = entries_by_key(answer)
        for entry_id, _ in reply.pop(self._wake_key, ()):
            self._woken = entry_id
        return reply

    def _look(self, jobs: list[Watched]) -> Talk[None]:
        if not jobs:
            return
        calls = tuple(call for watched in jobs for call in watched.look.calls)
        answers = yield from self._contact.patiently(Together(calls, at_once=True), math.inf)
        for watched, two in zip(jobs, zip(answers[::2], answers[1::2], strict=True), strict=True):
            watched.seen(two)
            self._drop_if_over(watched)

    def _drop_if_over(self, watched: Watched) -> None:
        if watched.outcome is not None:
            self.drop(watched)

    async def _wake(self) -> None:
        with suppress(Exception):  # it looks by itself within two seconds
            async with self._client.connection.pipeline(transaction=False) as pipeline:
                pipeline.xadd(self._wake_key, {"": ""}, maxlen=1)
                pipeline.expire(self._wake_key, WAKE_TTL_SECONDS)
                await pipeline.execute()
