"""The HTTP endpoint: is it alive, what does the pool do, and the two routes of the original. Small, no Flask."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fastgpt2.api.access import Access
from fastgpt2.api.async_client import AsyncClient, AsyncJob
from fastgpt2.api.planning import plan_job
from fastgpt2.api.status import read_status
from fastgpt2.engine.generation import GenerationResult
from fastgpt2.errors import (
    BadRequest,
    FastGPT2Error,
    ForbiddenOrigin,
    QueueFull,
    RequestTooLarge,
    ServiceBusy,
    ServiceStopping,
    Unauthorized,
)
from fastgpt2.worker.connection import redis_errors
from fastgpt2.worker.job import refuse_unknown, result_to_json

log = logging.getLogger("fastgpt2.http")

MAX_BODY_BYTES = 8 << 20
# Each holds a connection to Redis.
MAX_WAITING = 1000
# How long requests in hand may go on once the endpoint is told to stop.
GRACE_SECONDS = 5.0
# How often it is looked whether a client has hung up, and whether the endpoint is to stop.
WATCH_SECONDS = 0.5
# What a client is told to wait when the queue is full.
RETRY_AFTER_SECONDS = 1


class Endpoint:
    """The routes, and the client that they share.

    Args:
        redis_url, queue: where the jobs go.
        timeout: seconds that `POST /` waits for its result.
        stopping: whether the server is being stopped; a request may then wait for `GRACE_SECONDS` more.
        max_queue: refuse requests while so many jobs wait.
    """

    def __init__(
        self, redis_url: str, queue: str, timeout: float, stopping: Callable[[], bool], max_queue: int | None = None
    ) -> None:
        self.client = AsyncClient(redis_url, queue, max_queue)
        self.timeout = timeout
        self.stopping = stopping
        self.waiting = 0

    async def alive(self, _request: Request) -> Response:
        """`GET /`, as the original has it."""
        return PlainTextResponse("Ok")

    async def health(self, _request: Request) -> Response:
        """`GET /health`: this process answers. Says nothing of Redis or of workers; `/status` does."""
        return JSONResponse({"status": "ok"})

    async def status(self, _request: Request) -> Response:
        """`GET /status`: the queue, its jobs by state, its workers."""
        with redis_errors(self.client.redis_url):
            return JSONResponse(await read_status(self.client.connection, self.client.queue_name))

    async def generate(self, request: Request) -> Response:
        """`POST /` with `{"inputs": "...", "parameters": {...}}`: through the queue, `[{"generated_text": "..."}]`.

        `generated_text` is the prompt and its continuation, as in the original; with the parameter `return_full_text`
        set to false, the continuation alone. The other parameters are the `JobFields`, `stream` apart. With `logprobs`
        these stand beside the text.
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
        for name in ("prompt", "stream"):
            if name in parameters:
                hint = "; the prompt goes into inputs" if name == "prompt" else ""
                raise BadRequest(f"unknown field {name!r} in parameters{hint}")
        plan = plan_job(body["inputs"], parameters)
        prompt = plan.request.prompt
        if full_text and not isinstance(prompt, str):
            # What token ids read as, only the worker can tell.
            plan = replace(plan, request=replace(plan.request, echo=True))
        if self.waiting >= MAX_WAITING:
            raise ServiceBusy(f"{MAX_WAITING} requests wait already; nothing was enqueued, try again later")
        self.waiting += 1
        try:
            job = await self.client.enqueue_plan(plan)
            result = await self.wait(job, request.is_disconnected)
        finally:
            self.waiting -= 1
        text = f"{prompt}{result.text}" if full_text and not plan.request.echo else result.text
        answer: dict[str, Any] = {"generated_text": text}
        if result.logprobs is not None:
            answer["logprobs"] = result_to_json(result)["logprobs"]
        return JSONResponse([answer], headers={"x-job-id": job.id})

    async def wait(self, job: AsyncJob, gone: Callable[[], Awaitable[bool]]) -> GenerationResult:
        """The job's result, waited for as long as the client is not `gone`; if it is, the job is cancelled.

        Raises what `Job.result` raises.
        """
        result = asyncio.create_task(job.result(self.timeout))
        watch = asyncio.create_task(self._watch(job, gone))
        try:
            await asyncio.wait({result, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                await watch
            return await result
        finally:
            for task in (result, watch):
                task.cancel()
            await asyncio.gather(result, watch, return_exceptions=True)

    async def _watch(self, job: AsyncJob, gone: Callable[[], Awaitable[bool]]) -> None:
        """Ends only by raising, when there is no more use or no more time in waiting."""
        stop_at = math.inf
        while True:
            if await gone():
                await job.cancel()
                raise BadRequest("the client hung up")
            if self.stopping() and stop_at == math.inf:
                stop_at = time.monotonic() + GRACE_SECONDS
            if time.monotonic() >= stop_at:
                raise ServiceStopping(f"the endpoint is being stopped; job {job.id} goes on")
            await asyncio.sleep(WATCH_SECONDS)

    async def close(self) -> None:
        await self.client.aclose()


def create_app(
    redis_url: str,
    queue: str,
    timeout: float,
    stopping: Callable[[], bool],
    max_queue: int | None = None,
    token: str | None = None,
    local: str | None = "localhost",
) -> Starlette:
    """The ASGI application; see `Endpoint`, and `Access` for the last two.

    Raises:
        BadRequest: not a Redis URL.
    """
    endpoint = Endpoint(redis_url, queue, timeout, stopping, max_queue)

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
        middleware=[Middleware(Access, token=token, local=local, refuse=_answer)],
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
    return _answer(error)


def _answer(error: FastGPT2Error) -> Response:
    headers = None
    if isinstance(error, QueueFull):
        headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    elif isinstance(error, Unauthorized):
        headers = {"www-authenticate": "Bearer"}
    return _error(error.http_status, type(error).__name__, str(error), headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, "HTTPException", message, error.headers)


async def _own_fault(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "InternalError", "an unforeseen error; the endpoint's log has the details")
