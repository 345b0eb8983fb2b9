"""The HTTP endpoint: is it alive, what does the pool do, and the two routes of the original. Small, no Flask."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastgpt2.api.client import WAIT_SLICE_SECONDS, Client, Job
from fastgpt2.api.outcome import has_ended, job_key, latest_entry_id, outcome, results_key
from fastgpt2.api.status import read_status
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    ForbiddenOrigin,
    JobNotFound,
    RequestTooLarge,
    ResultTimeout,
    ServiceBusy,
    ServiceStopping,
)
from fastgpt2.worker.connection import connect_async, redis_errors
from fastgpt2.worker.job import parse_request, refuse_unknown

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("fastgpt2.http")

MAX_BODY_BYTES = 8 << 20
# Each holds a connection to Redis.
MAX_WAITING = 1000
# How long requests in hand may go on once the endpoint is told to stop.
GRACE_SECONDS = 5.0


class Endpoint:
    """The routes and what they share: a client to enqueue with, and an asyncio connection to wait and look with.

    Args:
        redis_url, queue: where the jobs go.
        timeout: seconds that `POST /` waits for its result.
        stopping: whether the server is being stopped; a request may then wait for `GRACE_SECONDS` more.
    """

    def __init__(self, redis_url: str, queue: str, timeout: float, stopping: Callable[[], bool]) -> None:
        self.client = Client(redis_url, queue)
        self.timeout = timeout
        self.stopping = stopping
        self.waiting = 0
        self._redis: Redis | None = None

    @property
    def redis(self) -> Redis:
        # Made inside the running loop, to which its connections belong.
        if self._redis is None:
            self._redis = connect_async(self.client.redis_url)
        return self._redis

    async def alive(self, _request: Request) -> Response:
        """`GET /`, as the original has it."""
        return PlainTextResponse("Ok")

    async def health(self, _request: Request) -> Response:
        """`GET /health`: this process answers. Says nothing of Redis or of workers; `/status` does."""
        return JSONResponse({"status": "ok"})

    async def status(self, _request: Request) -> Response:
        """`GET /status`: the queue, its jobs by state, its workers."""
        with redis_errors(self.client.redis_url):
            return JSONResponse(await read_status(self.redis, self.client.queue_name))

    async def generate(self, request: Request) -> Response:
        """`POST /` with `{"inputs": "...", "parameters": {...}}`: through the queue, `[{"generated_text": "..."}]`.

        `generated_text` is the prompt and its continuation, as in the original; with the parameter `return_full_text`
        set to false, the continuation alone.
        """
        _refuse_foreign(request)
        body = await _json_object(request)
        refuse_unknown(body, ("inputs", "parameters"))
        parameters = body.get("parameters", {})
        if not isinstance(parameters, dict):
            raise BadRequest("parameters must be an object")
        full_text = parameters.pop("return_full_text", True)
        if not isinstance(full_text, bool):
            raise BadRequest("return_full_text must be true or false")
        if "inputs" not in body:
            raise BadRequest('inputs is missing: send {"inputs": "a prompt"}')
        if "prompt" in parameters:
            raise BadRequest("unknown field 'prompt' in parameters; the prompt goes into inputs")
        generation = parse_request([body["inputs"]], parameters)
        if self.waiting >= MAX_WAITING:
            raise ServiceBusy(f"{MAX_WAITING} requests wait already; nothing was enqueued, try again later")
        self.waiting += 1
        try:
            job = await anyio.to_thread.run_sync(self.client.enqueue_request, generation)
            result = await self.wait(job, request.is_disconnected)
        finally:
            self.waiting -= 1
        text = generation.prompt + result.text if full_text else result.text
        return JSONResponse([{"generated_text": text}], headers={"x-job-id": job.id})

    async def wait(self, job: Job, gone: Callable[[], Awaitable[bool]]) -> GenerationResult:
        """The job's result, waited for without holding a thread, as long as the client is not `gone`.

        Raises what `Job.result` raises.
        """
        deadline, stop_at = time.monotonic() + self.timeout, math.inf
        key = results_key(job.id)
        with redis_errors(self.client.redis_url):
            while True:
                entries = await self.redis.xrevrange(key, count=1)
                found = outcome(job.id, entries)
                if found is None and has_ended(job.id, await self.redis.hget(job_key(job.id), "status")):
                    found = outcome(job.id, await self.redis.xrevrange(key, count=1))
                    if found is None:
                        raise JobNotFound(f"job {job.id} has ended, but its result has expired or was not kept")
                if found is not None:
                    return found
                if await gone():
                    raise BadRequest("the client hung up")
                if self.stopping() and stop_at == math.inf:
                    stop_at = time.monotonic() + GRACE_SECONDS
                left = min(WAIT_SLICE_SECONDS, deadline - time.monotonic(), stop_at - time.monotonic())
                if left <= 0 and stop_at < deadline:
                    raise ServiceStopping(f"the endpoint is being stopped; job {job.id} goes on")
                if left <= 0:
                    raise ResultTimeout(f"job {job.id}: no result within {self.timeout:g} s")
                await self.redis.xread({key: latest_entry_id(entries)}, block=max(1, int(left * 1000)), count=1)

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()
        self.client.close()


def create_app(redis_url: str, queue: str, timeout: float, stopping: Callable[[], bool]) -> Starlette:
    """The ASGI application; see `Endpoint`.

    Raises:
        BadRequest: not a Redis URL.
    """
    endpoint = Endpoint(redis_url, queue, timeout, stopping)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await endpoint.close()

    return Starlette(
        routes=[
            Route("/", endpoint.alive, methods=["GET"]),
            Route("/", endpoint.generate, methods=["POST"]),
            Route("/health", endpoint.health, methods=["GET"]),
            Route("/status", endpoint.status, methods=["GET"]),
        ],
        exception_handlers={FastGPT2Error: _refuse, HTTPException: _refuse_route, Exception: _own_fault},
        lifespan=lifespan,
    )


async def _json_object(request: Request) -> dict[str, Any]:
    """The body, read only up to the limit."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RequestTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect:
        raise BadRequest("the client hung up") from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as reason:
        raise BadRequest(f"the body is not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise BadRequest('the body must be an object: {"inputs": "a prompt"}')
    return value


def _refuse_foreign(request: Request) -> None:
    """Raise ForbiddenOrigin for a request that a browser sends on behalf of a page from elsewhere."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ForbiddenOrigin(f"requests from pages of {origin[:100]!r} are refused")


def _error(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message, "error_type": kind}, status_code=status, headers=headers)


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, FastGPT2Error)
    return _error(error.http_status, type(error).__name__, str(error))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, "HTTPException", message, error.headers)


async def _own_fault(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "InternalError", "an unforeseen error; the endpoint's log has the details")
