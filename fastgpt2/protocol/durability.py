"""How durable it is what has been written: the words for it, and what Redis is asked.

Redis is asked on a connection that has written, behind what was written. WAIT tells how many replicas have all of it,
WAITAOF whether it is in the append-only file on disk (fsync).
"""

from __future__ import annotations

from typing import Any

from fastgpt2.errors import RedisAccessDenied, RedisUnfit

MEMORY, DISK, REPLICA = "memory", "disk", "replica"


def confirming(durability: str, seconds: float) -> tuple[Any, ...]:
    """Return the words of the command that waits until the disk, or one replica, has what was written.

    Args:
        durability: `DISK` or `REPLICA`.
        seconds: how long Redis may take.
    """
    words = ("WAIT", 1) if durability == REPLICA else ("WAITAOF", 1, 0)
    return *words, int(seconds * 1000)


def count_confirmed(reply: Any) -> int:
    """Return how many replicas, or disks, have what was written, from the reply to that command."""
    return int(reply[0] if isinstance(reply, list) else reply)


def why_unfit(place: str, durability: str, error: Exception) -> RedisUnfit | None:
    """Return what to tell of a Redis that cannot confirm at all, from its error; None if it may only be away.

    Args:
        place: what to call this Redis.
    """
    from redis.exceptions import NoPermissionError

    text = str(error)
    command = "WAIT" if durability == REPLICA else "WAITAOF"
    if "appendonly is disabled" in text:
        return RedisUnfit(
            f"{place} keeps no append-only file, which the durability disk waits for; set `appendonly yes` there, or "
            "ask for the durability replica or memory"
        )
    if isinstance(error, NoPermissionError):
        return RedisAccessDenied(
            f"{place} does not let this user ask {command}, which the durability {durability} needs; give the user "
            "that right (deploy/redis.acl), or ask for the durability memory"
        )
    if "unknown command" in text.lower():
        needed = command if durability == REPLICA else "WAITAOF, which Redis 7.2 and valkey have"
        return RedisUnfit(
            f"{place} does not know the command {needed}, which the durability {durability} needs; use a newer Redis, "
            "or ask for another durability"
        )
    return None
