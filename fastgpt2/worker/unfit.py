"""Keys that a worker needs and that somebody has written as another kind: told once a minute, and worked around."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.untrusted import is_of_entry

if TYPE_CHECKING:
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")
TELL_SECONDS = 60.0
MAX_TOLD = 1000
_told: dict[str, float] = {}


def tell(key: str, reason: object, what: str = "what belongs there is left out") -> None:
    """Say in the log that a key is not what it should be, unless this was said within the last minute."""
    now = time.monotonic()
    if now - _told.get(key, -TELL_SECONDS) < TELL_SECONDS:
        return
    if len(_told) >= MAX_TOLD:
        _told.clear()
    _told[key] = now
    message = "the key %.200s in Redis is not what it should be (%.200s): %s; look at what writes there, and delete it"
    log.warning(message, key, reason, what)


def execute_what_fits(pipeline: Pipeline) -> list[Any]:
    """Execute a pipeline, and tell of the keys that are not what they should be. Return the replies, errors among them.

    Raises:
        RedisError: Redis cannot be reached, or cannot serve.
    """
    commands = [words for words, _ in pipeline.command_stack]
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    for words, reply in zip(commands, replies, strict=True):
        if isinstance(reply, Exception):
            if not is_of_entry(reply):
                raise reply
            tell(str(words[1]), reply)
    return replies
