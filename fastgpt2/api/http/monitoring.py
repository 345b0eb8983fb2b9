"""What an operator, a probe or Prometheus asks: alive, ready, status, metrics, the latest jobs; and the page."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastgpt2.api.http.jobs import DEFAULT_LISTED, MAX_LISTED
from fastgpt2.api.http.responses import JSON
from fastgpt2.api.http.service import Service
from fastgpt2.api.pool.job_list import listed
from fastgpt2.api.pool.status import not_ready, read_status, sample
from fastgpt2.errors import BadRequest, FastGPT2Error, QueueUnavailable
from fastgpt2.protocol.connection import redis_errors

log = logging.getLogger("fastgpt2.http")

# However many ask, Redis is asked so often at most.
FRESH_SECONDS = 0.5
SAMPLE_SECONDS = 10.0


class NotReady(FastGPT2Error):
    """No worker could take a job now."""

    http_status = 503


class Observe:
    """The routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._client = service.client
        self._statuses: dict[bool, tuple[float, dict[str, Any]]] = {}
        self._reading = asyncio.Lock()
        self._readiness: tuple[float, str | None] | None = None
        self._asking = asyncio.Lock()

    async def home(self, request: Request) -> Response:
        """`GET /`: the page for a browser; `Ok` for a program, as the original has it."""
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse("Ok", headers={"vary": "accept"})
        from fastgpt2.api.page import page

        body, headers = page()
        return Response(body, headers={**headers, "vary": "accept"})

    async def health(self, _request: Request) -> Response:
        """`GET /health`: this process answers. Says nothing of Redis or of workers; `/ready` does."""
        return JSON({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """`GET /ready`: whether a job that is sent now would be run. Open to strangers: no name or address is in it.

        Raises:
            NotReady
        """
        if self._service.stopping:
            raise NotReady("the endpoint is being stopped")
        reason = await self._why_not_ready()
        if reason is not None:
            raise NotReady(reason)
        return JSON({"status": "ready"})

    async def _why_not_ready(self) -> str | None:
        async with self._asking:
            if self._readiness is None or time.monotonic() - self._readiness[0] > FRESH_SECONDS:
                try:
                    with redis_errors(self._client.redis_url):
                        reason = await not_ready(self._client.connection, self._client.queue_name)
                except QueueUnavailable:
                    reason = "Redis cannot be used; /status says why"
                self._readiness = time.monotonic(), reason
            return self._readiness[1]

    async def status(self, request: Request) -> Response:
        """`GET /status`, with `?history=true` for the last minutes."""
        return JSON(await self._status(_flag(request, "history")))

    async def _status(self, history: bool) -> dict[str, Any]:
        async with self._reading:
            read_at, status = self._statuses.get(history, (0.0, {}))
            if not status or time.monotonic() - read_at > FRESH_SECONDS:
                with redis_errors(self._client.redis_url):
                    status = await read_status(self._client.connection, self._client.queue_name, history)
                self._statuses[history] = time.monotonic(), status
            return status

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        from fastgpt2.api.pool.prometheus import exposition

        with redis_errors(self._client.redis_url):
            kind, body = await exposition(
                self._client.connection, self._client.queue_name, request.headers.get("accept", "")
            )
        return Response(body, headers={"content-type": kind})

    async def jobs(self, request: Request) -> Response:
        """`GET /v1/jobs?limit=20`: those in hand, and the latest that have ended."""
        limit = _limit(request)
        status = await self._status(False)
        jobs = await listed(self._client, status["workers"], limit, self._service.bounds.show_prompts)
        return JSON({"object": "list", "data": jobs})

    async def keep_history(self) -> None:
        """A task: workers tell what they do, but only an endpoint sees a queue that nobody serves."""
        while True:
            try:
                with redis_errors(self._client.redis_url):
                    await sample(self._client.connection, self._client.queue_name)
            except QueueUnavailable:
                pass  # whoever asks is told
            except Exception:
                log.exception("unforeseen, while noting the queue's depth; going on")
            await asyncio.sleep(SAMPLE_SECONDS)


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise BadRequest(f"{name} must be true or false, not {text[:40]!r}")
    return text in ("true", "1")


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LISTED))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_LISTED:
        raise BadRequest(f"limit must be a whole number from 1 to {MAX_LISTED}, not {text[:40]!r}")
    return int(text[:9])
