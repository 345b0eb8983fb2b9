"""Whether the pool would serve a job now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgpt2.worker.lease import LEASE_SECONDS
from fastgpt2.worker.names import leases_key

if TYPE_CHECKING:
    from redis.asyncio import Redis

# ARGV: the leases, the length of one in ms. How many reach beyond this moment by Redis's clock, and no further than any
# can that was taken now. Not by KEYS, to which a user of Redis would need all rights.
_LIVING = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = redis.pcall('ZCOUNT', ARGV[1], '(' .. string.format('%.0f', now), string.format('%.0f', now + ARGV[2]))
if type(count) ~= 'number' then return 0 end
return count
"""


async def not_ready(connection: Redis, queue: str) -> str | None:
    """Why no job would be served now, as a sentence for everybody to read; None if at least one worker lives.

    A worker takes a lease when its model is loaded and warmed up, and loses it seconds after it was heard of last.

    Raises:
        RedisError: Redis cannot be reached, which is a reason of its own.
    """
    living: Any = await connection.eval(_LIVING, 0, leases_key(queue), int(LEASE_SECONDS * 1000))
    if living:
        return None
    return (
        "no worker that has loaded its model lives on this queue: start some with `fastgpt2 up` or `fastgpt2 pool`, or "
        "wait until those that start are ready"
    )
