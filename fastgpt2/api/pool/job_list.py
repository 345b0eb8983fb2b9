"""The list of jobs that people see: those that workers have claimed, then those that ended last."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2.api.pool.job_details import MAX_LISTED_DATA_BYTES, short_prompt
from fastgpt2.protocol.connection import redis_errors
from fastgpt2.protocol.keys import MAX_LATEST, job_key, latest_key
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.stored_jobs import read_call
from fastgpt2.protocol.untrusted import check_replies, epoch_seconds, real, text, whole

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from fastgpt2.api.client.async_client import AsyncClient

# The limit for one worker's record of a job, far beyond what a worker writes.
_MAX_RECORD_BYTES = 4096
# The fields of a listed job, by the kind of their values.
TEXTS = ("id", "status", "finish_reason", "error", "worker")
WHOLES = ("prompt_tokens", "cached_tokens", "completion_tokens", "steps", "drafted", "accepted")
REALS = ("queue_seconds", "prefill_seconds", "decode_seconds", "ended_at")
_UNKNOWN: dict[str, Any] = dict.fromkeys((*TEXTS, *WHOLES, *REALS))
MAX_PROMPTS = 100
_READ_DATA = Script(__file__, "read_data")


async def list_jobs(
    client: AsyncClient, workers: list[dict[str, Any]], limit: int, show_prompts: bool
) -> list[dict[str, Any]]:
    """Return the jobs that the workers have claimed, then the latest that have ended.

    Args:
        workers: those of `read_status`.
        limit: the most jobs to return.
        show_prompts: add each job's prompt.
    """
    with redis_errors(client.redis_url):
        jobs = await _read_claimed(client.connection, workers, limit)
        if len(jobs) < limit:
            ended = await read_latest(client.connection, client.queue_name, limit - len(jobs))
            known = {job["id"] for job in ended}
            jobs = [*(job for job in jobs if job["id"] not in known), *ended]
        if show_prompts:
            prompts = await read_prompts(client.connection, [job["id"] for job in jobs])
            jobs = [{**job, "prompt": prompts.get(job["id"])} for job in jobs]
    return jobs


async def _read_claimed(connection: Redis, workers: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Return what Redis says of each claimed job. A job that is being cancelled or has just ended is still claimed."""
    pairs = [(job_id, worker["name"]) for worker in workers for job_id in worker["jobs"]][:limit]
    async with connection.pipeline(transaction=False) as pipeline:
        for job_id, _ in pairs:
            pipeline.hmget(job_key(job_id), ["status", "enqueued_at", "started_at"])
        answers = await pipeline.execute(raise_on_error=False) if pairs else []
    found = []
    for (job_id, worker), fields in zip(pairs, answers, strict=True):
        if isinstance(fields, list) and fields[0] is not None:
            status = fields[0].decode("utf-8", "replace")
            enqueued_at, started_at = map(epoch_seconds, fields[1:])
            waited = None if enqueued_at is None or started_at is None else round(max(0.0, started_at - enqueued_at), 3)
            found.append({**_UNKNOWN, "id": job_id, "status": status, "worker": worker, "queue_seconds": waited})
    return found


async def read_latest(connection: Redis, queue: str, limit: int) -> list[dict[str, Any]]:
    """Return the jobs that workers ended last, the latest first: at most `limit`, and at most a hundred.

    Returns:
        For each job `id`, `status` (RQ's), `finish_reason` or `error` (its kind), `prompt_tokens`, `cached_tokens`,
        `completion_tokens`, `steps`, `drafted`, `accepted` (as `Drafting` has them), `queue_seconds`,
        `prefill_seconds`, `decode_seconds`, `ended_at` (seconds since 1970), `worker`. A field that is not known is
        None. An entry that is not a worker's record is left out; of a job that was run again, all but its latest end.
    """
    if limit < 1:
        return []
    pipeline = connection.pipeline(transaction=False)
    pipeline.lrange(latest_key(queue), 0, MAX_LATEST - 1)
    (entries,) = check_replies(await pipeline.execute(raise_on_error=False))
    found: dict[str, dict[str, Any]] = {}
    for entry in entries or ():
        if len(found) < limit and (record := _parse_record(entry)) is not None:
            found.setdefault(record["id"], record)
    return list(found.values())


def _parse_record(entry: bytes) -> dict[str, Any] | None:
    if len(entry) > _MAX_RECORD_BYTES:
        return None
    try:
        value = json.loads(entry)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not text(value.get("id")) or not text(value.get("status")):
        return None
    return {
        **{name: text(value.get(name)) or None for name in TEXTS},
        **{name: whole(value.get(name)) for name in WHOLES},
        **{name: real(value.get(name)) for name in REALS},
    }


async def read_prompts(connection: Redis, job_ids: Sequence[str]) -> dict[str, str | list[int]]:
    """Return the prompts of jobs by their ids: at most 200 characters of text or of a chat, or at most 200 token ids.

    Left out are jobs that are gone, jobs whose entry cannot be read or has more than 64 KiB of arguments, and all jobs
    after the first hundred.
    """
    ids = list(dict.fromkeys(job_ids))[:MAX_PROMPTS]
    if not ids:
        return {}
    packed = await _READ_DATA.run_async(connection, (), (MAX_LISTED_DATA_BYTES, *map(job_key, ids)))
    # In a thread, as it takes a while to look through a hundred pickles.
    prompts = await asyncio.to_thread(lambda: [_find_prompt(data) for data in packed])
    return {job_id: prompt for job_id, prompt in zip(ids, prompts, strict=True) if prompt is not None}


def _find_prompt(data: bytes) -> str | list[int] | None:
    call = read_call(data, MAX_LISTED_DATA_BYTES)
    return None if call is None else short_prompt(call.prompt)
