"""The routes for an operator, a probe or Prometheus: alive, ready, status, metrics, the list of jobs; and the page."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastgpt2.api.http.jobs import DEFAULT_LISTED, MAX_LISTED
from fastgpt2.api.http.responses import JSON
from fastgpt2.api.http.service import Service
from fastgpt2.api.pool.job_list import list_jobs
from fastgpt2.api.pool.status import check_readiness, read_status, record_depth
from fastgpt2.errors import FastGPT2Error, QueueUnavailable
from fastgpt2.fields import refusal
from fastgpt2.protocol.connection import redis_errors

log = logging.getLogger("fastgpt2.http")

# Redis is asked at most once in this time for each figure, however many clients ask.
STATUS_FRESH_SECONDS = 0.5
DEPTH_SECONDS = 10.0

T = TypeVar("T")


class NotReady(FastGPT2Error):
    """Raised if no worker can take a job now, or if the endpoint is being stopped."""

    http_status = 503


class FreshValue(Generic[T]):
    """A value that is read again once it is older than `STATUS_FRESH_SECONDS`, for one request at a time."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._reading = asyncio.Lock()
        self._read_at = -math.inf

    async def get(self) -> T:
        """Return the value; raise what reading it raises."""
        async with self._reading:
            if time.monotonic() - self._read_at > STATUS_FRESH_SECONDS:
                self._value = await self._read()
                self._read_at = time.monotonic()
            return self._value


class Monitoring:
    """The handlers of these routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._client = service.client
        self._obstacle = FreshValue(self._find_obstacle)
        self._status = FreshValue(lambda: self._ask(read_status))
        self._status_with_history = FreshValue(lambda: self._ask(read_status, True))

    async def _ask(self, read: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Return what one of the readers of `pool` finds.

        Raises:
            QueueUnavailable
        """
        with redis_errors(self._client.redis_url):
            return await read(self._client.connection, self._client.queue_name, *arguments)

    async def home(self, request: Request) -> Response:
        """Answer `GET /`: with the page for a browser, with `Ok` for a program, as the original does."""
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse("Ok", headers={"vary": "accept"})
        from fastgpt2.api.page import page

        body, headers = page()
        return Response(body, headers={**headers, "vary": "accept"})

    async def health(self, _request: Request) -> Response:
        """Answer `GET /health`: this process lives. Whether Redis and workers do is for `/ready` to tell."""
        return JSON({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """Answer `GET /ready`: a job that is sent now would be run. It names no host, as anybody may ask.

        Raises:
            NotReady
        """
        if self._service.stopping():
            raise NotReady("the endpoint is being stopped")
        obstacle = await self._obstacle.get()
        if obstacle is not None:
            raise NotReady(obstacle)
        return JSON({"status": "ready"})

    async def _find_obstacle(self) -> str | None:
        try:
            return await self._ask(check_readiness)
        except QueueUnavailable:
            return "Redis cannot be used; /status says why"

    async def status(self, request: Request) -> Response:
        """Answer `GET /status`: the state of the pool, with `?history=true` also that of the last 15 minutes."""
        history = _parse_flag(request, "history")
        return JSON(await (self._status_with_history if history else self._status).get())

    async def metrics(self, request: Request) -> Response:
        """Answer `GET /metrics`, for Prometheus."""
        from fastgpt2.api.pool.prometheus import render_metrics

        kind, body = await self._ask(render_metrics, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": kind})

    async def jobs(self, request: Request) -> Response:
        """Answer `GET /v1/jobs?limit=20`: the jobs that workers have claimed, and the latest that have ended."""
        limit = _parse_limit(request)
        status = await self._status.get()
        jobs = await list_jobs(self._client, status["workers"], limit, self._service.bounds.show_prompts)
        return JSON({"object": "list", "data": jobs})

    async def keep_history(self) -> None:
        """Record the queue's depth every ten seconds, until cancelled.

        Workers report what they do, but only an endpoint sees a queue that nobody serves.
        """
        while True:
            try:
                await self._ask(record_depth)
            except QueueUnavailable:
                pass  # whoever asks the endpoint is told
            except Exception:
                log.exception("an unforeseen error while the queue's depth was recorded; going on")
            await asyncio.sleep(DEPTH_SECONDS)


def _parse_flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise refusal(name, "true or false", text)
    return text in ("true", "1")


def _parse_limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LISTED))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_LISTED:
        raise refusal("limit", f"a whole number from 1 to {MAX_LISTED}", text)
    return int(text[:9])
