"""The jobs of a pool in one state, page by page, however many there are."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2.api.pool.job_details import (
    MAX_LISTED_DATA_BYTES,
    StoredJob,
    describe_failure,
    read_jobs,
    read_queues,
    short_prompt,
)
from fastgpt2.errors import BadRequest
from fastgpt2.fields import refusal
from fastgpt2.protocol.connection import connect_async, redis_errors
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, REGISTRY_PREFIXES, queue_key, registry_key
from fastgpt2.protocol.untrusted import check_replies

if TYPE_CHECKING:
    from redis.asyncio import Redis

# The states whose jobs can be listed: RQ's words. A job that was stopped is among the failed ones.
STATES = ("queued", *REGISTRY_PREFIXES)

# A longer entry is no job's id.
_MAX_ID_BYTES = 1000

# The most jobs that are requeued at once; more take a second run.
MAX_REQUEUED = 100_000

# How many entries of one score are read to find where a page ended whose last job has left the set since.
_MAX_SAME_SCORE = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page begins: behind this entry.

    The jobs of all queues are in the order of their scores, the highest first; of one score, queue by queue. Of the
    waiting ones, the place is the number of those before it in its queue.

    Attributes:
        score: as Redis writes it.
        queue: of the pool's queues, by its name.
    """

    score: float
    queue: str
    entry: bytes

    @classmethod
    def parse(cls, written: str) -> Place:
        """Read a place from what `str` made of it.

        Raises:
            BadRequest: it is none.
        """
        try:
            score, queue, entry = json.loads(base64.urlsafe_b64decode(written.encode("ascii")))
            return cls(float(score), str(queue), str(entry).encode("latin-1"))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            raise BadRequest(
                "after must be the `next` of an earlier page of this list; leave it out to begin"
            ) from None

    def __str__(self) -> str:
        words = json.dumps([repr(self.score), self.queue, self.entry.decode("latin-1")])
        return base64.urlsafe_b64encode(words.encode("ascii")).decode("ascii")


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of the jobs in one state.

    Attributes:
        jobs: as JSON; see `describe`.
        next: where the next page begins; None if there is none.
        total: how many jobs the state has.
    """

    jobs: list[dict[str, Any]]
    next: str | None
    total: int


async def list_state(
    connection: Redis, redis_url: str, pool: str, state: str, limit: int, after: str | None, show_prompts: bool
) -> JobPage:
    """Return a page of the jobs in one state: the latest that ended first, of the waiting ones the next to be taken.

    A job of which nothing is left is passed over, so that a page may have fewer jobs than there could be.

    Args:
        state: one of `STATES`.
        after: the `next` of the page before.
        show_prompts: add each job's prompt; without it, prompts are also hidden in sentences.

    Raises:
        BadRequest: there is no such state, or `after` is no place.
        QueueUnavailable
    """
    if state not in STATES:
        raise refusal("state", f"one of {', '.join(STATES)}", state)
    place = None if after is None else Place.parse(after)
    with redis_errors(redis_url):
        queues = await read_queues(connection, pool)
        read = _read_waiting if state == "queued" else _read_registry
        entries, total = await read(connection, state, queues, limit + 1, place)
        more = str(entries[limit - 1]) if len(entries) > limit else None
        ids = [_id_of(place.entry, state) for place in entries[:limit] if len(place.entry) <= _MAX_ID_BYTES]
        found = await read_jobs(connection, ids, MAX_LISTED_DATA_BYTES)
    # In a thread, as prompts are looked for in failures of up to a megabyte.
    jobs = await asyncio.to_thread(lambda: [describe(job, show_prompts) for job in found if job.status])
    return JobPage(jobs, more, total)


async def read_failed_ids(redis_url: str, pool: str) -> tuple[list[str], int]:
    """Return the ids of a pool's failed jobs, the latest first, at most `MAX_REQUEUED`; and how many there are.

    An entry that is no text in UTF-8 is no job's id, and is left out.

    Raises:
        QueueUnavailable
    """
    connection = connect_async(redis_url)
    found: list[str] = []
    place: Place | None = None
    try:
        with redis_errors(redis_url):
            queues = await read_queues(connection, pool)
            while True:
                places, total = await _read_registry(connection, "failed", queues, _MAX_SAME_SCORE, place)
                for place in places:
                    with suppress(UnicodeDecodeError):
                        found.append(place.entry.decode("utf-8"))
                if len(places) < _MAX_SAME_SCORE or len(found) >= MAX_REQUEUED:
                    return found[:MAX_REQUEUED], total
    finally:
        await connection.aclose()


async def _read_waiting(
    connection: Redis, _state: str, queues: Sequence[str], count: int, place: Place | None
) -> tuple[list[Place], int]:
    """Return the places of waiting jobs, and how many wait in all.

    Each job is asked for by itself: an endpoint that is confined has no right to read a queue as a whole.
    """
    pipeline: Any = connection.pipeline(transaction=False)
    for name in queues:
        pipeline.llen(queue_key(name))
    depths = [depth or 0 for depth in check_replies(await pipeline.execute(raise_on_error=False))]
    first = queues.index(place.queue) if place is not None and place.queue in queues else 0
    start = int(min(max(place.score, 0), 2**53)) if place is not None and place.queue in queues else 0
    wanted: list[tuple[str, int]] = []
    for name, depth in zip(queues[first:], depths[first:], strict=True):
        wanted += [(name, at) for at in range(start, min(depth, start + count - len(wanted)))]
        start = 0
    for name, at in wanted:
        pipeline.lindex(queue_key(name), at)
    entries = check_replies(await pipeline.execute(raise_on_error=False)) if wanted else []
    # One that has been taken since is none.
    found = zip(wanted, entries, strict=True)
    return [Place(at + 1.0, name, entry) for (name, at), entry in found if entry is not None], sum(depths)


async def _read_registry(
    connection: Redis, state: str, queues: Sequence[str], count: int, place: Place | None
) -> tuple[list[Place], int]:
    """Return the places of jobs in one of RQ's registries, and how many it has in all."""
    keys = [registry_key(state, name) for name in queues]
    rank = None
    if place is not None and place.queue in queues:
        pipeline: Any = connection.pipeline(transaction=False)
        pipeline.zrevrank(registry_key(state, place.queue), place.entry)
        (rank,) = check_replies(await pipeline.execute(raise_on_error=False))
    pipeline = connection.pipeline(transaction=False)
    is_behind = False  # the queue comes behind that of the place
    for name, key in zip(queues, keys, strict=True):
        pipeline.zcard(key)
        if place is None:
            _add_from(pipeline, key, "+inf", count)
        elif name == place.queue:
            is_behind = True
            if rank is not None:
                _add_from(pipeline, key, "+inf", count, rank + 1)
            else:
                _add_from(pipeline, key, repr(place.score), _MAX_SAME_SCORE)
        else:
            _add_from(pipeline, key, repr(place.score) if is_behind else f"({place.score!r}", count)
    replies = check_replies(await pipeline.execute(raise_on_error=False))
    found = []
    for nth, (name, pairs) in enumerate(zip(queues, replies[1::2], strict=True)):
        for entry, score in pairs or ():
            if place is not None and name == place.queue and (score, entry) >= (place.score, place.entry):
                continue
            found.append((-score, nth, Place(score, name, entry)))
    found.sort(key=lambda one: one[:2])  # stable: of one queue, the order is Redis's
    return [one for _, _, one in found[:count]], sum(size or 0 for size in replies[::2])


def _add_from(pipeline: Any, key: str, score: str, count: int, skipped: int = 0) -> None:
    """Add the command that reads entries from a score down. By scores always: else the library sends ZREVRANGE."""
    pipeline.zrange(key, score, "-inf", desc=True, byscore=True, offset=skipped, num=count, withscores=True)


def _id_of(entry: bytes, state: str) -> bytes:
    """Return the id of a job, beside which RQ keeps that of its execution while it runs."""
    return entry.rpartition(b":")[0] if state == "started" and b":" in entry else entry


def describe(job: StoredJob, show_prompts: bool) -> dict[str, Any]:
    """Return a job of a list, as JSON.

    Returns:
        `id`, `status` (RQ's), `error` (the failure's kind) and `message` (its sentence), `queue`, `worker`, `attempts`,
        `enqueued_at`, `started_at` and `ended_at` (seconds since 1970), and `prompt`, if prompts are shown.
    """
    error, message = describe_failure(job, show_prompts)
    found = {
        "id": job.id,
        "status": job.status,
        "error": error,
        "message": message,
        "queue": job.queue,
        "worker": job.worker,
        "attempts": job.count(ATTEMPTS_FIELD) or 0,
        **{name: job.moment(name) for name in ("enqueued_at", "started_at", "ended_at")},
    }
    return {**found, "prompt": short_prompt(job.prompt)} if show_prompts else found
