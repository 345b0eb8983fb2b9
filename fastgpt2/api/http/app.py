"""The HTTP application: its routes, the middleware around them, and the handlers of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fastgpt2.api.http.access import Access
from fastgpt2.api.http.chat import Chats
from fastgpt2.api.http.completions import Completions
from fastgpt2.api.http.generate import Generate
from fastgpt2.api.http.jobs import Jobs
from fastgpt2.api.http.middleware import Crowd, LingeringClose, PlainPath
from fastgpt2.api.http.models import Models
from fastgpt2.api.http.monitoring import Monitoring
from fastgpt2.api.http.neighbours import handle_unknown_route
from fastgpt2.api.http.origins import OriginCheck, Origins, SharedAnswers
from fastgpt2.api.http.proxies import PublicPath, TrustedProxies
from fastgpt2.api.http.reference import Reference
from fastgpt2.api.http.request_log import RequestLog
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.responses import handle_error, handle_unforeseen, respond
from fastgpt2.api.http.service import Bounds, Service
from fastgpt2.api.http.tokens import Tokens
from fastgpt2.errors import FastGPT2Error

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Web:
    """By which names and from which pages the endpoint may be asked.

    Attributes:
        names: see `Access`.
        allow_origin, public_url, trusted_proxy: the settings of these names.
    """

    names: Collection[str] | None = ("localhost",)
    allow_origin: Sequence[str] = ()
    public_url: str | None = None
    trusted_proxy: Sequence[str] = ()


class Endpoint(Starlette):
    """The application, whose every answer pages of the allowed origins may read: Starlette's own to a defect too.

    Attributes:
        origins: which pages these are.
    """

    origins: Origins

    def build_middleware_stack(self) -> ASGIApp:
        """Return all that stands around the routes, for Starlette."""
        return SharedAnswers(super().build_middleware_stack(), self.origins)


def create_app(
    redis_url: str,
    queue: str,
    bounds: Bounds,
    stopping: Callable[[], bool],
    tokens: Tokens | None = None,
    web: Web = Web(),
    most_connections: int = 4000,
) -> Starlette:
    """Return the ASGI application of the endpoint.

    Args:
        bounds, stopping: see `Service`.
        tokens: see `Access`.
        web: by which names and from which pages the endpoint may be asked.
        most_connections: how many the server holds. An eighth of them is for probes, and for requests that are refused.

    Raises:
        BadRequest: the Redis URL cannot be used.
    """
    service = Service(redis_url, queue, bounds, stopping)
    metrics, models = RequestMetrics(), Models(service.driver, queue)
    monitoring = Monitoring(service, metrics, tokens)
    completions, chats = Completions(service, models), Chats(service, models)
    generate, jobs = Generate(service), Jobs(service)
    reference = Reference(web.public_url)
    public = urlsplit(web.public_url or "")
    origins = Origins(web.allow_origin, f"{public.scheme}://{public.netloc}" if web.public_url else None)

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
        "/v1": {"GET": reference.v1},
        "/v1/completions": {"POST": completions.create},
        "/v1/chat/completions": {"POST": chats.create},
        "/v1/models": {"GET": models.list_all},
        "/v1/models/{model:path}": {"GET": models.show},
        "/v1/jobs": {"GET": monitoring.jobs, "POST": jobs.create},
        "/v1/jobs/{job_id}": {"GET": jobs.show, "DELETE": jobs.cancel},
        "/v1/jobs/{job_id}/stream": {"GET": jobs.follow},
        "/v1/jobs/{job_id}/requeue": {"POST": jobs.requeue},
        "/info": {"GET": monitoring.info},
        "/health": {"GET": monitoring.health},
        "/ready": {"GET": monitoring.ready},
        "/status": {"GET": monitoring.status},
        "/metrics": {"GET": monitoring.metrics},
        "/version": {"GET": reference.version},
        "/docs": {"GET": reference.docs},
        "/openapi.json": {"GET": reference.document},
    }
    metrics.routes = [_route(path, handlers) for path, handlers in routes.items()]
    app = Endpoint(
        routes=metrics.routes,
        middleware=[
            Middleware(TrustedProxies, trusted=web.trusted_proxy),
            Middleware(PublicPath, prefix=public.path, routes=routes.keys()),
            Middleware(PlainPath),
            Middleware(LingeringClose),
            # Refusals too are logged and counted.
            Middleware(RequestLog, metrics=metrics),
            Middleware(Crowd, most=most_connections - most_connections // 8, refuse=respond),
            Middleware(OriginCheck, origins=origins, asks_token=tokens is not None, refuse=respond),
            Middleware(Access, tokens=tokens, names=web.names, refuse=respond),
        ],
        exception_handlers={
            FastGPT2Error: handle_error,
            HTTPException: handle_unknown_route,
            Exception: handle_unforeseen,
        },
        lifespan=lifespan,
    )
    app.state.request_metrics = metrics
    app.origins = origins
    app.router.redirect_slashes = False  # `PlainPath` leaves nothing to redirect
    return app


def _route(path: str, handlers: Mapping[str, Handler]) -> Route:
    """Return one route for all methods of a path, so that the refusal of another method lists them all."""

    async def handle(request: Request) -> Response:
        return await handlers["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, handle, methods=list(handlers))
