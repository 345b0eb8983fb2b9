"""The HTTP application: its routes, the middleware around them, and the handlers of errors."""

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

from fastgpt2.api.http.access import Access
from fastgpt2.api.http.completions import Completions
from fastgpt2.api.http.generate import Generate
from fastgpt2.api.http.jobs import Jobs
from fastgpt2.api.http.middleware import Crowd, LingeringClose, PlainPath, RequestLog
from fastgpt2.api.http.monitoring import Monitoring
from fastgpt2.api.http.openapi import show_document
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.responses import handle_error, handle_unforeseen, handle_unknown_route, respond
from fastgpt2.api.http.service import Bounds, Models, Service
from fastgpt2.api.http.tokens import Tokens
from fastgpt2.errors import FastGPT2Error

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    redis_url: str,
    queue: str,
    bounds: Bounds,
    stopping: Callable[[], bool],
    tokens: Tokens | None = None,
    local: str | None = "localhost",
    most_connections: int = 4000,
) -> Starlette:
    """Return the ASGI application of the endpoint.

    Args:
        bounds, stopping: see `Service`.
        tokens, local: see `Access`.
        most_connections: how many the server holds. An eighth of them is for probes, and for requests that are refused.

    Raises:
        BadRequest: the Redis URL cannot be used.
    """
    service = Service(redis_url, queue, bounds, stopping)
    metrics = RequestMetrics()
    monitoring = Monitoring(service, metrics, tokens)
    completions = Completions(service, Models(service.driver, queue))
    generate, jobs = Generate(service), Jobs(service)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with service.run():
            tasks = [asyncio.create_task(monitoring.keep_history())]
            if tokens is not None:
                tasks.append(asyncio.create_task(tokens.keep_fresh()))
            yield
            for task in tasks:
                task.cancel()

    routes: dict[str, dict[str, Handler]] = {
        "/": {"GET": monitoring.home, "POST": generate.original},
        "/generate": {"POST": generate.generate},
        "/generate_stream": {"POST": generate.generate_stream},
        "/v1/completions": {"POST": completions.create},
        "/v1/models": {"GET": completions.list_models},
        "/v1/models/{model:path}": {"GET": completions.show_model},
        "/v1/jobs": {"GET": monitoring.jobs, "POST": jobs.create},
        "/v1/jobs/{job_id}": {"GET": jobs.show, "DELETE": jobs.cancel},
        "/v1/jobs/{job_id}/stream": {"GET": jobs.follow},
        "/info": {"GET": monitoring.info},
        "/health": {"GET": monitoring.health},
        "/ready": {"GET": monitoring.ready},
        "/status": {"GET": monitoring.status},
        "/metrics": {"GET": monitoring.metrics},
        "/openapi.json": {"GET": show_document},
    }
    metrics.routes = [_route(path, handlers) for path, handlers in routes.items()]
    app = Starlette(
        routes=metrics.routes,
        middleware=[
            Middleware(PlainPath),
            Middleware(LingeringClose),
            # Refusals too are logged and counted.
            Middleware(RequestLog, metrics=metrics),
            Middleware(Crowd, most=most_connections - most_connections // 8, refuse=respond),
            Middleware(Access, tokens=tokens, local=local, refuse=respond),
        ],
        exception_handlers={
            FastGPT2Error: handle_error,
            HTTPException: handle_unknown_route,
            Exception: handle_unforeseen,
        },
        lifespan=lifespan,
    )
    app.state.request_metrics = metrics
    app.router.redirect_slashes = False  # `PlainPath` leaves nothing to redirect
    return app


def _route(path: str, handlers: Mapping[str, Handler]) -> Route:
    """Return one route for all methods of a path, so that the refusal of another method lists them all."""

    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, handle, methods=list(handlers))
