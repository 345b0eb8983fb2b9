"""The HTTP application: its routes, and what stands around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastgpt2.api.http import responses as answers
from fastgpt2.api.http.access import Access
from fastgpt2.api.http.completions import Completions
from fastgpt2.api.http.generate import Generate
from fastgpt2.api.http.jobs import Jobs
from fastgpt2.api.http.middleware import Lingering, RequestLog
from fastgpt2.api.http.monitoring import Observe
from fastgpt2.api.http.openapi import show_document
from fastgpt2.api.http.service import Bounds, Models, Service
from fastgpt2.errors import FastGPT2Error

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    redis_url: str,
    queue: str,
    bounds: Bounds,
    stopping: Callable[[], bool],
    token: str | None = None,
    local: str | None = "localhost",
) -> Starlette:
    """The ASGI application; see `Service`, and `Access` for the last two.

    Raises:
        BadRequest: not a Redis URL.
    """
    service = Service(redis_url, queue, bounds, stopping)
    observe, completions = Observe(service), Completions(service, Models(service.client))
    generate, jobs = Generate(service), Jobs(service)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with service.running():
            history = asyncio.create_task(observe.keep_history())
            yield
            history.cancel()

    routes: dict[str, dict[str, Handler]] = {
        "/": {"GET": observe.home, "POST": generate.original},
        "/generate": {"POST": generate.generate},
        "/generate_stream": {"POST": generate.generate_stream},
        "/v1/completions": {"POST": completions.create},
        "/v1/models": {"GET": completions.list_models},
        "/v1/models/{model:path}": {"GET": completions.show_model},
        "/v1/jobs": {"GET": observe.jobs, "POST": jobs.create},
        "/v1/jobs/{job_id}": {"GET": jobs.show, "DELETE": jobs.cancel},
        "/v1/jobs/{job_id}/stream": {"GET": jobs.follow},
        "/health": {"GET": observe.health},
        "/ready": {"GET": observe.ready},
        "/status": {"GET": observe.status},
        "/metrics": {"GET": observe.metrics},
        "/openapi.json": {"GET": show_document},
    }
    return Starlette(
        routes=[_route(path, handlers) for path, handlers in routes.items()],
        middleware=[
            Middleware(RequestLog),
            Middleware(Lingering),
            Middleware(Access, token=token, local=local, refuse=answers.answer),
        ],
        exception_handlers={
            FastGPT2Error: answers.refuse,
            HTTPException: answers.refuse_route,
            Exception: answers.own_fault,
        },
        lifespan=lifespan,
    )


def _route(path: str, handlers: Mapping[str, Handler]) -> Route:
    """One for all methods of a path, so that what is refused is told all that are not."""

    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, handle, methods=list(handlers))
