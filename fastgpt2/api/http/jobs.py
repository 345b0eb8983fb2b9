"""`/v1/jobs`: work that is left behind, asked for later, followed, cancelled."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.enqueueing import once_each
from fastgpt2.api.http.answers import JSON, error_object
from fastgpt2.api.http.caller import read_object
from fastgpt2.api.http.event_stream import KEEP_ALIVE, EventStream, event
from fastgpt2.api.http.service import Service, Waiting, idempotency_key
from fastgpt2.api.outcome import Outcome, job_key, unwrapped
from fastgpt2.api.planning import plan_job
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed, JobNotFound
from fastgpt2.worker.connection import redis_errors
from fastgpt2.worker.job import refuse_unknown, result_to_json
from fastgpt2.worker.names import ATTEMPTS_FIELD, queues_of
from fastgpt2.worker.stream import Piece

EXAMPLE = '{"prompt": "Once upon a time", "max_new_tokens": 20}'
MAX_LISTED = 100
DEFAULT_LISTED = 20
MAX_WAIT_SECONDS = 60.0
FIELDS = (
    "prompt", "max_new_tokens", "min_new_tokens", "stop", "ignore_eos", "logprobs", "prompt_logprobs", "echo",
    "timeout", "stream", "priority", "job_timeout", "result_ttl",
)  # fmt: skip


class Jobs:
    """The routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._client = service.client

    async def create(self, request: Request) -> Response:
        """`POST /v1/jobs`: 202, and where to ask for it."""
        body = await read_object(request, self._service.bounds.body_timeout, EXAMPLE)
        refuse_unknown(body, FIELDS)
        if "prompt" not in body:
            raise BadRequest(f"prompt is missing: send {EXAMPLE}")
        fields = {name: value for name, value in body.items() if name != "prompt" and value is not None}
        plan = plan_job(body["prompt"], fields)
        key = idempotency_key(request)
        once = None if key is None else once_each(f"job {key}", 1, plan)
        (job_id,) = await self._client.enqueue_all([plan], once)
        return JSON(await self._described(job_id), 202, {"location": f"/v1/jobs/{job_id}", "x-job-id": job_id})

    async def show(self, request: Request) -> Response:
        """`GET /v1/jobs/{id}`, with `?wait=SECONDS` when it has ended, or time is up."""
        job_id = await self._known(request)
        wait = _number(request, "wait", 0.0, MAX_WAIT_SECONDS)
        if wait:
            with self._service.attend(request, job_id, streamed=False, timeout=wait) as waiting:
                await waiting.settle()
        return JSON(await self._described(job_id), headers={"x-job-id": job_id})

    async def follow(self, request: Request) -> Response:
        """`GET /v1/jobs/{id}/stream`: its text as it comes, from where `Last-Event-ID` says."""
        job_id = await self._known(request)
        known = request.headers.get("last-event-id", "0")
        if not re.fullmatch(r"\d{1,9}", known):
            raise BadRequest("last-event-id must be the id of an event of this stream: a number of characters")
        return EventStream(self._events(request, job_id, int(known)), _error_event)

    async def cancel(self, request: Request) -> Response:
        """`DELETE /v1/jobs/{id}`"""
        job_id = await self._known(request)
        cancelled = await self._client.cancel(job_id)
        return JSON({**await self._described(job_id), "cancelled": cancelled}, headers={"x-job-id": job_id})

    @asynccontextmanager
    async def _events(
        self, request: Request, job_id: str, known: int
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        with self._service.attend(request, job_id, streamed=True) as waiting:
            yield {"x-job-id": job_id}, _text_events(waiting, known)

    async def _known(self, request: Request) -> str:
        """The id in the path, of a job of this pool.

        Raises:
            JobNotFound
        """
        job_id: str = request.path_params["job_id"]
        error = JobNotFound(f"no job {job_id[:100]!r}: it was never enqueued here, or its result has expired")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", job_id):
            raise error
        with redis_errors(self._client.redis_url):
            origin: Any = await self._client.connection.hget(job_key(job_id), "origin")
        if origin is None or origin.decode("utf-8", "replace") not in queues_of(self._client.queue_name):
            raise error
        return job_id

    async def _described(self, job_id: str) -> dict[str, Any]:
        names = ("status", "enqueued_at", "started_at", "ended_at", "worker_name", ATTEMPTS_FIELD)
        with redis_errors(self._client.redis_url):
            fields: Any = await self._client.connection.hmget(job_key(job_id), list(names))
        text = {
            name: value.decode("utf-8", "replace")
            for name, value in zip(names, fields, strict=True)
            if value is not None
        }
        described: dict[str, Any] = {
            "id": job_id,
            "object": "job",
            "status": text.get("status", "expired"),
            "enqueued_at": _epoch(text.get("enqueued_at")),
            "started_at": _epoch(text.get("started_at")),
            "ended_at": _epoch(text.get("ended_at")),
            "worker": text.get("worker_name") or None,
            "attempts": int(text.get(ATTEMPTS_FIELD, "0")) if text.get(ATTEMPTS_FIELD, "0").isdecimal() else 0,
        }
        return {**described, **_end(await self._client.outcome(job_id))}


async def _text_events(waiting: Waiting, known: int) -> AsyncIterator[bytes]:
    """Each event's id is how many characters there are with it, so that a reader who comes again goes on from there."""
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        what = item[1]
        if isinstance(what, Piece):
            start = max(what.at, known)
            new = what.text[start - what.at :]
            if new:
                yield event({"text": new, "at": start}, event_id=str(start + len(new)))
        else:
            yield event(_end(unwrapped(what)), "end")


def _end(outcome: Outcome | None) -> dict[str, Any]:
    """How a job ended: its result, or its error and what there is of a result."""
    if outcome is None:
        return {"result": None, "error": None}
    if not isinstance(outcome, FastGPT2Error):
        return {"result": result_to_json(outcome, outcome.timings.queue_seconds), "error": None}
    partial = outcome.partial if isinstance(outcome, JobFailed) else None
    return {
        "result": None if partial is None else result_to_json(partial, partial.timings.queue_seconds),
        **error_object(outcome, openai=True),
    }


def _error_event(error: FastGPT2Error) -> bytes:
    return event(_end(error), "error")


def _number(request: Request, name: str, low: float, high: float) -> float:
    text = request.query_params.get(name, "0")
    try:
        value = float(text[:40])
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise BadRequest(f"{name} must be a number from {low:g} to {high:g}, not {text[:40]!r}")
    return value


def _epoch(moment: str | None) -> float | None:
    """RQ notes moments as ISO 8601 in UTC."""
    try:
        then = datetime.fromisoformat(moment or "")
    except ValueError:
        return None
    return round((then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp(), 3)


async def listed(service: Service, workers: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The jobs that the workers have in hand, then the latest that have ended; their prompts only if they may be shown.

    Raises:
        QueueUnavailable
    """
    from fastgpt2.api.latest import read_latest, read_prompts

    client = service.client
    with redis_errors(client.redis_url):
        jobs = await _in_hand(service, workers, limit)
        if len(jobs) < limit:
            ended = await read_latest(client.connection, client.queue_name, limit - len(jobs))
            known = {job["id"] for job in ended}
            jobs = [*(job for job in jobs if job["id"] not in known), *({**_UNKNOWN, **job} for job in ended)]
        if service.bounds.show_prompts:
            prompts = await read_prompts(client.connection, [job["id"] for job in jobs])
            jobs = [{**job, "prompt": prompts.get(job["id"])} for job in jobs]
    return jobs


async def _in_hand(service: Service, workers: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """What Redis says of each: one that is being cancelled, or has just ended, is still in a worker's hands."""
    pairs = [(job_id, worker["name"]) for worker in workers for job_id in worker["jobs"]][:limit]
    async with service.client.connection.pipeline(transaction=False) as pipeline:
        for job_id, _ in pairs:
            pipeline.hmget(job_key(job_id), ["status", "enqueued_at", "started_at"])
        answers = await pipeline.execute(raise_on_error=False) if pairs else []
    found = []
    for (job_id, worker), fields in zip(pairs, answers, strict=True):
        if isinstance(fields, list) and fields[0] is not None:
            status, *moments = (None if field is None else field.decode("utf-8", "replace") for field in fields)
            enqueued_at, started_at = map(_epoch, moments)
            waited = None if enqueued_at is None or started_at is None else round(max(0.0, started_at - enqueued_at), 3)
            found.append({**_UNKNOWN, "id": job_id, "status": status, "worker": worker, "queue_seconds": waited})
    return found


_UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        "id", "status", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens", "steps",
        "drafted", "accepted", "queue_seconds", "prefill_seconds", "decode_seconds", "ended_at", "worker",
    )
)  # fmt: skip
