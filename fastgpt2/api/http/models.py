"""Which models the live workers serve, looked up anew every few seconds."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from fastgpt2.api.async_client import AsyncClient
from fastgpt2.worker.connection import redis_errors

FRESH_SECONDS = 5.0
MAX_WORKERS = 1000


class Models:
    """Read from the workers' own entries."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._known: dict[str, int] = {}
        self._fresh_until = 0.0

    async def served(self) -> dict[str, int]:
        """Each model's id, and since when one serves it, in seconds since 1970; the first is the one that most serve.

        Raises:
            QueueUnavailable
        """
        if time.monotonic() < self._fresh_until:
            return self._known
        with redis_errors(self._client.redis_url):
            connection = self._client.connection
            names = await connection.smembers(f"rq:workers:{self._client.queue_name}")
            async with connection.pipeline(transaction=False) as pipeline:
                for name in sorted(names)[:MAX_WORKERS]:
                    pipeline.hmget(name, ["model", "birth"])
                answers = await pipeline.execute() if names else []
        self._known = _count(answers)
        self._fresh_until = time.monotonic() + FRESH_SECONDS if self._known else 0.0
        return self._known


def _count(answers: list[tuple[bytes | None, bytes | None]]) -> dict[str, int]:
    workers: dict[str, int] = {}
    since: dict[str, int] = {}
    for model, birth in answers:
        if model:
            name = model.decode("utf-8", "replace")
            workers[name] = workers.get(name, 0) + 1
            since[name] = min(since.get(name, 1 << 62), _seconds(birth))
    return {name: since[name] for name in sorted(workers, key=lambda name: (-workers[name], name))}


def _seconds(moment: bytes | None) -> int:
    """RQ notes moments as ISO 8601 in UTC."""
    try:
        then = datetime.fromisoformat((moment or b"").decode("ascii"))
    except ValueError:
        return 0
    return max(0, int((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp()))
