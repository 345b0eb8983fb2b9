"""The routes for an operator, a probe or Prometheus: alive, ready, status, metrics, the list of jobs; and the page."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastgpt2 import __version__
from fastgpt2.api.http.completion_request import MAX_PROMPTS
from fastgpt2.api.http.jobs import DEFAULT_LISTED, MAX_LISTED, parse_flag
from fastgpt2.api.http.models import most_common
from fastgpt2.api.http.request_metrics import RequestMetrics
from fastgpt2.api.http.responses import JSON, NotReady
from fastgpt2.api.http.service import MAX_WAITING, Service
from fastgpt2.api.http.tokens import Tokens
from fastgpt2.api.pool.job_list import list_jobs
from fastgpt2.api.pool.job_pages import list_state
from fastgpt2.api.pool.status import check_readiness, read_status, record_depth
from fastgpt2.engine.decoding.options import MAX_TEXTS
from fastgpt2.engine.decoding.records import MAX_STOP_STRINGS, Count
from fastgpt2.errors import BadRequest, QueueUnavailable
from fastgpt2.fields import refusal
from fastgpt2.protocol.connection import redis_errors
from fastgpt2.protocol.keys import SILENT

log = logging.getLogger("fastgpt2.http")

# Redis is asked at most once in this time for each figure, however many clients ask.
STATUS_FRESH_SECONDS = 0.5
DEPTH_SECONDS = 10.0

T = TypeVar("T")


class InfoBody(TypedDict):
    """The model and the limits, by the names that text-generation-inference 1 to 3 has had for them.

    Where workers serve several models, these are those of the model that has requests without a name.
    """

    model_id: str
    model_sha: Annotated[str | None, "Workers do not tell their revision: null."]
    model_dtype: Annotated[str | None, "The form of the stored weights, as `float32` or `int8`."]
    model_device_type: Literal["cpu"]
    model_pipeline_tag: Literal["text-generation"]
    max_concurrent_requests: Annotated[Count, "How many jobs this endpoint waits for at once."]
    max_best_of: Count
    max_stop_sequences: Count
    max_input_length: Annotated[Count, "The older name of `max_input_tokens`."]
    max_input_tokens: Annotated[Count, "The most tokens that a prompt may have if a token is to follow."]
    max_total_tokens: Annotated[Count, "The most tokens that a prompt and its continuation may have together."]
    max_batch_size: Annotated[Count, "How many texts a worker decodes together."]
    max_client_batch_size: Annotated[Count, "How many prompts one request to `/v1/completions` may have."]
    validation_workers: Annotated[Count, "The processes of this endpoint that check requests."]
    router: Literal["fastgpt2"]
    version: str
    sha: str | None
    docker_label: str | None


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

    def __init__(self, service: Service, request_metrics: RequestMetrics, tokens: Tokens | None = None) -> None:
        self._service = service
        self._request_metrics = request_metrics
        self._client = service.client
        self._tokens = tokens
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
        await self._require_ready()
        return JSON({"status": "ready"})

    async def _require_ready(self) -> None:
        if self._service.stopping():
            raise NotReady("the endpoint is being stopped")
        obstacle = await self._obstacle.get()
        if obstacle is not None:
            raise NotReady(obstacle)

    async def info(self, _request: Request) -> Response:
        """Answer `GET /info`, as text-generation-inference does.

        Raises:
            NotReady
        """
        await self._require_ready()
        return JSON(_describe_model((await self._status.get())["workers"]))

    async def _find_obstacle(self) -> str | None:
        try:
            return await self._ask(check_readiness)
        except QueueUnavailable:
            return "Redis cannot be used; /status says why"

    async def status(self, request: Request) -> Response:
        """Answer `GET /status`: the state of the pool, with `?history=true` also that of the last 15 minutes."""
        history = parse_flag(request, "history")
        return JSON(await (self._status_with_history if history else self._status).get())

    async def metrics(self, request: Request) -> Response:
        """Answer `GET /metrics`, for Prometheus."""
        from fastgpt2.api.pool.prometheus import Collector, render_metrics
        from fastgpt2.api.pool.token_metrics import read_token_metrics

        collectors: list[Collector] = [self._request_metrics]
        if self._tokens is not None:
            names, requests = self._tokens.names, self._tokens.requests
            collectors.append(await self._ask(read_token_metrics, names, requests))
        kind, body = await self._ask(render_metrics, request.headers.get("accept", ""), collectors)
        return Response(body, headers={"content-type": kind})

    async def jobs(self, request: Request) -> Response:
        """Answer `GET /v1/jobs?limit=20`: the jobs that workers have claimed, and the latest that have ended.

        With `?state=failed` or another of RQ's states, all jobs in that state, a page at a time.
        """
        limit = _parse_limit(request)
        state, after = request.query_params.get("state"), request.query_params.get("after")
        if state is not None:
            return JSON(await self._list_state(state, limit, after))
        if after is not None:
            raise BadRequest("after is given without a state; name one, as in ?state=failed")
        status = await self._status.get()
        jobs = await list_jobs(self._client, status["workers"], limit, self._service.bounds.show_prompts)
        return JSON({"object": "list", "data": jobs})

    async def _list_state(self, state: str, limit: int, after: str | None) -> dict[str, Any]:
        client = self._client
        show_prompts = self._service.bounds.show_prompts
        page = await list_state(
            client.connection, client.redis_url, client.queue_name, state, limit, after, show_prompts
        )
        more = {"has_more": page.next is not None, "next": page.next, "total": page.total}
        return {"object": "list", "data": page.jobs, **more}

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


def _describe_model(workers: list[dict[str, Any]]) -> InfoBody:
    """Return what is true for all workers, of those in `read_status`, that serve the model of requests without a name.

    If that is not one model, or no worker takes such requests, it is the model that most workers serve.

    Raises:
        NotReady: no worker tells of its model.
    """
    telling = [one for one in workers if one["state"] != SILENT and one["model"] and one["n_positions"]]
    if not telling:
        raise NotReady("no worker tells of its model yet: ask again in a second")
    takers = [worker for worker in telling if not worker["named_only"]] or telling
    model = most_common(worker["model"] for worker in takers)
    serving = [worker for worker in telling if worker["model"] == model]
    n_positions = min(worker["n_positions"] for worker in serving)
    weights = {worker["weights"] for worker in serving}
    return {
        "model_id": model,
        "model_sha": None,
        "model_dtype": weights.pop() if len(weights) == 1 else None,
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": MAX_WAITING,
        "max_best_of": MAX_TEXTS,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_input_length": n_positions - 1,
        "max_input_tokens": n_positions - 1,
        "max_total_tokens": n_positions,
        "max_batch_size": min(worker["max_batch"] for worker in serving),
        "max_client_batch_size": MAX_PROMPTS,
        "validation_workers": 1,
        "router": "fastgpt2",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _parse_limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LISTED))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_LISTED:
        raise refusal("limit", f"a whole number from 1 to {MAX_LISTED}", text)
    return int(text[:9])
