"""Jobs' entries as they stand in Redis, fetched with a bound and read with care."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2.worker.rq_job import GenerationJob

if TYPE_CHECKING:
    from redis import Redis

# Far beyond what a request needs; what is larger is not even fetched.
MAX_ENTRY_BYTES = 64 << 20

# KEYS: jobs' hashes. ARGV: the most bytes that one may have. Of each its fields and values, its size if that is more,
# or what it is if it is no hash.
_FETCH = """
local found = {}
for i, key in ipairs(KEYS) do
    local kind, size = redis.call('TYPE', key).ok, 0
    if kind == 'hash' then
        for _, field in ipairs(redis.call('HKEYS', key)) do size = size + redis.call('HSTRLEN', key, field) end
    end
    if kind ~= 'hash' and kind ~= 'none' then found[i] = kind
    elseif size > tonumber(ARGV[1]) then found[i] = size
    else found[i] = redis.call('HGETALL', key) end
end
return found
"""


def fetch(connection: Redis, job_ids: Sequence[str], serializer: Any) -> list[GenerationJob | Exception | None]:
    """All of them in one round trip.

    Returns:
        Each one's job; None if there is none; what is the matter with it if it cannot be read.

    Raises:
        RedisError
    """
    keys = [GenerationJob.key_for(job_id) for job_id in job_ids]
    replies: Any = connection.eval(_FETCH, len(keys), *keys, MAX_ENTRY_BYTES) if keys else []
    return [_read(connection, pair[0], pair[1], serializer) for pair in zip(job_ids, replies, strict=True)]


def _read(connection: Redis, job_id: str, reply: Any, serializer: Any) -> GenerationJob | Exception | None:
    if isinstance(reply, int):
        return ValueError(f"{reply} bytes; the limit is {MAX_ENTRY_BYTES}")
    if not isinstance(reply, list):
        return ValueError(f"it is a {reply.decode()}, no hash")
    if not reply:
        return None
    try:
        job = GenerationJob(job_id, connection=connection, serializer=serializer)
        job.restore(dict(zip(reply[::2], reply[1::2], strict=True)))
    except Exception as reason:  # whatever RQ's parsing meets
        return reason
    return job
