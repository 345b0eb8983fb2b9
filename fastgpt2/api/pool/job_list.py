"""The jobs that ended last, and what jobs were asked: for who looks at the pool."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.connection import redis_errors
from fastgpt2.protocol.keys import MAX_LATEST, job_key, latest_key
from fastgpt2.protocol.untrusted import checked, read, real, text, whole

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from fastgpt2.api.client.async_client import AsyncClient


# Far beyond what a worker writes.
_MAX_RECORD_BYTES = 4096
_TEXTS = ("id", "status", "finish_reason", "error", "worker")
_WHOLES = ("prompt_tokens", "cached_tokens", "completion_tokens", "steps", "drafted", "accepted")
_REALS = ("queue_seconds", "prefill_seconds", "decode_seconds", "ended_at")
MAX_PROMPTS = 100
MAX_PROMPT_SHOWN = 200

# Of a job's data, packed or not: reading more of a hundred jobs at a time would keep the endpoint busy.
_MAX_DATA_BYTES = 64 << 10

# ARGV: the most bytes, the jobs' hashes. Of each its data, or nothing.
_DATA = """
local found = {}
for i = 2, #ARGV do
    local size = redis.pcall('HSTRLEN', ARGV[i], 'data')
    if type(size) == 'number' and size > 0 and size <= tonumber(ARGV[1]) then
        found[i - 1] = redis.call('HGET', ARGV[i], 'data')
    else
        found[i - 1] = ''
    end
end
return found
"""


async def read_latest(connection: Redis, queue: str, limit: int) -> list[dict[str, Any]]:
    """The jobs that workers ended last, the latest first; at most `limit`, and a hundred.

    Returns:
        Of each: `id`, `status` (RQ's), `finish_reason` or `error` (its kind), `prompt_tokens`, `cached_tokens`,
        `completion_tokens`, `steps`, `drafted`, `accepted` (as `Drafting` has them), `queue_seconds`,
        `prefill_seconds`, `decode_seconds`, `ended_at` (seconds since 1970), `worker`; None where it is not known. What
        is none of a worker's records is left out.

    Raises:
        RedisError
    """
    if limit < 1:
        return []
    pipeline = connection.pipeline(transaction=False)
    pipeline.lrange(latest_key(queue), 0, min(limit, MAX_LATEST) - 1)
    (entries,) = checked(await pipeline.execute(raise_on_error=False))
    return [record for entry in entries or () if (record := _record(entry)) is not None]


async def read_prompts(connection: Redis, job_ids: Sequence[str]) -> dict[str, str | list[int]]:
    """What jobs were asked, by their ids: text cut to 200 characters, or as many token ids.

    Left out are jobs that are gone, those whose entry cannot be read, those with more than 64 KiB of arguments, and
    all after the first hundred.

    Raises:
        RedisError
    """
    ids = list(dict.fromkeys(job_ids))[:MAX_PROMPTS]
    if not ids:
        return {}
    keys = [f"rq:job:{job_id}" for job_id in ids]
    # Not by KEYS, to which a user of Redis would need all rights.
    packed: Any = await connection.eval(_DATA, 0, _MAX_DATA_BYTES, *keys)
    # In a thread: a hundred pickles take a while to look through.
    prompts = await asyncio.to_thread(lambda: [_prompt(data) for data in packed])
    return {job_id: prompt for job_id, prompt in zip(ids, prompts, strict=True) if prompt is not None}


def _record(entry: bytes) -> dict[str, Any] | None:
    if len(entry) > _MAX_RECORD_BYTES:
        return None
    try:
        value = json.loads(entry)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not text(value.get("id")) or not text(value.get("status")):
        return None
    return {
        **{name: text(value.get(name)) or None for name in _TEXTS},
        **{name: whole(value.get(name)) for name in _WHOLES},
        **{name: real(value.get(name)) for name in _REALS},
    }


def _prompt(data: bytes) -> str | list[int] | None:
    """RQ keeps what a job calls, packed by zlib or not: (function, instance, args, kwargs)."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, _MAX_DATA_BYTES)
        if inflater.unconsumed_tail:
            return None
    except zlib.error:
        plain = data
    try:
        _, _, args, kwargs = read(plain)
        prompt = args[0] if args else kwargs["prompt"]
    except (ValueError, TypeError, LookupError):
        return None
    if isinstance(prompt, str):
        return prompt[:MAX_PROMPT_SHOWN]
    if not isinstance(prompt, list | tuple):
        return None
    ids = list(prompt[:MAX_PROMPT_SHOWN])
    return ids if all(isinstance(each, int) and not isinstance(each, bool) for each in ids) else None


def epoch(moment: str | None) -> float | None:
    """RQ notes moments as ISO 8601 in UTC."""
    try:
        then = datetime.fromisoformat(moment or "")
    except ValueError:
        return None
    return round((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp(), 3)


async def listed(
    client: AsyncClient, workers: list[dict[str, Any]], limit: int, show_prompts: bool
) -> list[dict[str, Any]]:
    """The jobs that the workers have in hand, then the latest that have ended; their prompts only if they may be shown.

    Raises:
        QueueUnavailable
    """
    with redis_errors(client.redis_url):
        jobs = await _in_hand(client, workers, limit)
        if len(jobs) < limit:
            ended = await read_latest(client.connection, client.queue_name, limit - len(jobs))
            known = {job["id"] for job in ended}
            jobs = [*(job for job in jobs if job["id"] not in known), *({**_UNKNOWN, **job} for job in ended)]
        if show_prompts:
            prompts = await read_prompts(client.connection, [job["id"] for job in jobs])
            jobs = [{**job, "prompt": prompts.get(job["id"])} for job in jobs]
    return jobs


async def _in_hand(client: AsyncClient, workers: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """What Redis says of each: one that is being cancelled, or has just ended, is still in a worker's hands."""
    pairs = [(job_id, worker["name"]) for worker in workers for job_id in worker["jobs"]][:limit]
    async with client.connection.pipeline(transaction=False) as pipeline:
        for job_id, _ in pairs:
            pipeline.hmget(job_key(job_id), ["status", "enqueued_at", "started_at"])
        answers = await pipeline.execute(raise_on_error=False) if pairs else []
    found = []
    for (job_id, worker), fields in zip(pairs, answers, strict=True):
        if isinstance(fields, list) and fields[0] is not None:
            status, *moments = (None if field is None else field.decode("utf-8", "replace") for field in fields)
            enqueued_at, started_at = map(epoch, moments)
            waited = None if enqueued_at is None or started_at is None else round(max(0.0, started_at - enqueued_at), 3)
            found.append({**_UNKNOWN, "id": job_id, "status": status, "worker": worker, "queue_seconds": waited})
    return found


_UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        "id", "status", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens", "steps",
        "drafted", "accepted", "queue_seconds", "prefill_seconds", "decode_seconds", "ended_at", "worker",
    )
)  # fmt: skip
