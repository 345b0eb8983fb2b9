"""`/v1/jobs`: a client enqueues a job, leaves, and asks for it later, follows its text, or cancels it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast
from urllib.parse import quote, unquote

from redis.exceptions import ResponseError
from rq.job import JobStatus
from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import JSON, KEEP_ALIVE, EventStream, error_object, event
from fastgpt2.api.http.service import PendingJobs, Service, read_idempotency_keys
from fastgpt2.api.pool.job_details import StoredJob, describe_failure, describe_in_full, read_jobs, without_prompt
from fastgpt2.engine.decoding.options import MAX_TEXTS, ChoiceIndex
from fastgpt2.engine.decoding.records import Count, Usage
from fastgpt2.errors import BadRequest, FastGPT2Error, JobFailed, JobNotFound
from fastgpt2.fields import fields_of, one_of, refusal
from fastgpt2.foreign_fields import take_known
from fastgpt2.protocol.connection import redis_errors
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, Priority, is_queue_of, job_key
from fastgpt2.protocol.messages import Piece, ResultObject, result_to_json
from fastgpt2.protocol.stored_jobs import HIDDEN
from fastgpt2.protocol.untrusted import epoch_seconds, is_of_entry, text, whole

EXAMPLE = '{"prompt": "Once upon a time", "max_new_tokens": 20}'
MAX_LISTED = 100
DEFAULT_LISTED = 20
MAX_WAIT_SECONDS = 60.0

# The index of a text, and how many of its characters were read.
_PART = "[0-9]{1,10}:[0-9]{1,9}"
# What a result has of each token, and which may come to hundreds of megabytes.
_OF_TOKENS = ("logprobs", "prompt_logprobs")
# RQ's, and one for a job of which nothing is left by the time that it is described.
_STATUSES = (*(status.value for status in JobStatus), "expired")


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class EndEvent(TypedDict):
    """The end of a job: its result, or its error and what there is of a result. Both are null before the end."""

    result: Annotated[dict[str, Any], ResultObject, "Of a job that was cut short, what there is of it."] | None
    error: ErrorObject | None


class JobDetails(TypedDict):
    """What else is known of a job: how it was enqueued, what it asks for, and its failure in full."""

    queue: Annotated[str, "The RQ queue that it was enqueued into."]
    priority: Priority
    model: Annotated[str | None, "The model that it names."]
    created_at: float | None
    crashes: Annotated[Count, "How many workers died while they ran it."]
    retries_left: int | None
    job_timeout: int | None
    result_ttl: int | None
    depends_on: list[str]
    request: Annotated[dict[str, Any], "Its fields; the prompt among them if the operator shows prompts."] | None
    shows_prompts: bool
    failure: Annotated[str | None, "The text that is kept of its failure: of a defect, with the traceback."]


class JobBody(EndEvent):
    """A job; its moments are in seconds since 1970."""

    id: str
    object: Literal["job"]
    status: Annotated[str, one_of(*_STATUSES)]
    enqueued_at: float | None
    started_at: float | None
    ended_at: float | None
    worker: str | None
    attempts: Count
    cancelled: NotRequired[bool]
    details: NotRequired[Annotated[JobDetails, "With `details`."]]


class TextEvent(TypedDict):
    """New text of a job, and how many characters come before it; of several texts, those of each by itself."""

    text: str
    at: Count
    choice_index: NotRequired[Annotated[ChoiceIndex, "The index of the text, if it is not 0."]]
    usage: NotRequired[Annotated[dict[str, Any], Usage, "With `stream_usage`: the tokens of this text so far."]]


class Progress:
    """The part of a job's texts that a reader has. As the id of an event, it is where a reader goes on who comes again.

    As text it is the number of characters of the one text whose index is 0, else an index and a number for each text:
    "0:120,1:87".

    Attributes:
        by_index: the number of characters of each text.
    """

    PATTERN = f"^([0-9]{{1,9}}|{_PART}(,{_PART}){{0,{MAX_TEXTS - 1}}})$"

    def __init__(self, known: Mapping[int, int]) -> None:
        self.by_index = dict(known)

    @classmethod
    def parse(cls, text: str) -> Progress:
        """Read the id of an event.

        Raises:
            BadRequest: it is none.
        """
        if not re.fullmatch(cls.PATTERN, text):
            raise BadRequest("last-event-id must be the id of an event of this stream: how many characters were read")
        if text.isdigit():
            return cls({0: int(text)})
        pairs = (part.split(":") for part in text.split(","))
        return cls({int(index): int(characters) for index, characters in pairs})

    def __str__(self) -> str:
        if self.by_index.keys() <= {0}:
            return str(self.by_index.get(0, 0))
        return ",".join(f"{index}:{characters}" for index, characters in sorted(self.by_index.items()))


class Jobs:
    """The routes of jobs."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._client = service.client

    async def create(self, request: Request) -> Response:
        """Answer `POST /v1/jobs`: with 202, and where to ask for the job."""
        body = await read_object(request, self._service.bounds.body_timeout, EXAMPLE)
        fields = take_known(body, fields_of(JobPlan))
        if "prompt" not in body and "messages" not in fields:
            raise BadRequest(f"prompt is missing: send {EXAMPLE}")
        prompt = fields.pop("prompt", "" if "messages" in fields else None)
        plan = plan_job(prompt, fields)
        keys = read_idempotency_keys(request, 1, plan, prefix="job ")
        (job,) = await self._service.send(request, [plan], keys)
        job_id = job.id
        return JSON(await self._describe(job_id), 202, {"location": f"/v1/jobs/{job_id}", "x-job-id": job_id})

    async def show(self, request: Request) -> Response:
        """Answer `GET /v1/jobs/{id}`: with `?wait=SECONDS`, when the job has ended or the time is up.

        With `?details=true`, for a person: it tells more of the job, and leaves log probabilities out.
        """
        job_id = await self._known(request)
        wait, details = _parse_wait(request), parse_flag(request, "details")
        if wait:
            with self._service.attend(request, job_id, streamed=False, timeout=wait) as waiting:
                await waiting.wait()
        body = await self._describe(job_id)
        if details:
            body = await self._add_details(body)
        return JSON(body, headers=_headers(job_id))

    async def follow(self, request: Request) -> Response:
        """Answer `GET /v1/jobs/{id}/stream`: with the job's text as it comes, from where `Last-Event-ID` says."""
        job_id = await self._known(request)
        last = request.headers.get("last-event-id")
        known = Progress({}) if last is None else Progress.parse(last)
        return EventStream(self._events(request, job_id, known), _error_event)

    async def cancel(self, request: Request) -> Response:
        """Answer `DELETE /v1/jobs/{id}`."""
        job_id = await self._known(request)
        cancelled = await self._client.cancel(job_id)
        return JSON({**await self._describe(job_id), "cancelled": cancelled}, headers=_headers(job_id))

    async def requeue(self, request: Request) -> Response:
        """Answer `POST /v1/jobs/{id}/requeue`: with 202, and the job that runs again, or a new one in its place."""
        job_id = await self._known(request)
        keys = read_idempotency_keys(request, 1, job_id, prefix="again ")
        again = await self._service.run_again(request, job_id, keys)
        place = {"location": f"/v1/jobs/{quote(again.job_id, safe='')}", **_headers(again.job_id)}
        return JSON(await self._describe(again.job_id), 202, place)

    @asynccontextmanager
    async def _events(
        self, request: Request, job_id: str, known: Progress
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        with self._service.attend(request, job_id, streamed=True) as waiting:
            yield _headers(job_id), _text_events(waiting, known)

    async def _known(self, request: Request) -> str:
        """Return the id in the path.

        Raises:
            JobNotFound: it is not the id of a job of this pool.
        """
        # Not the parameter of the route, in which a slash stays written as %2F: an id may have that, too.
        job_id = unquote(request.scope["raw_path"].split(b"/")[3].decode("ascii"))
        with redis_errors(self._client.redis_url):
            origin = await self._origin_of(job_id)
        if origin is None or not is_queue_of(self._client.queue_name, origin.decode("utf-8", "replace")):
            raise JobNotFound.by(job_id)
        return job_id

    async def _origin_of(self, job_id: str) -> bytes | None:
        """Return the queue that a job was enqueued into; None if there is no job of this id."""
        try:
            origin: Any = await self._client.connection.hget(job_key(job_id), "origin")
        except ResponseError as reason:
            if not is_of_entry(reason):
                raise
            return None  # what stands there is no job
        return origin if isinstance(origin, bytes) else None

    async def _describe(self, job_id: str) -> JobBody:
        names = ("status", "enqueued_at", "started_at", "ended_at", "worker_name", ATTEMPTS_FIELD)
        with redis_errors(self._client.redis_url):
            fields: Any = await self._client.connection.hmget(job_key(job_id), list(names))
        status, enqueued_at, started_at, ended_at, worker, attempts = fields
        end = _end(await self._service.driver.run(self._service.session.outcome(job_id)))
        return {
            "id": job_id,
            "object": "job",
            "status": text(status) or "expired",
            "enqueued_at": epoch_seconds(enqueued_at),
            "started_at": epoch_seconds(started_at),
            "ended_at": epoch_seconds(ended_at),
            "worker": text(worker) or None,
            "attempts": whole(attempts) or 0,
            "result": end["result"],
            "error": end["error"],
        }

    async def _add_details(self, body: JobBody) -> JobBody:
        """Return a job's body as a person reads it."""
        show_prompts = self._service.bounds.show_prompts
        with redis_errors(self._client.redis_url):
            (job,) = await read_jobs(self._client.connection, [body["id"].encode("utf-8", "surrogateescape")])
        # In a thread: a prompt may have a megabyte, and a failure much text.
        return await asyncio.to_thread(_with_details, body, job, self._client.queue_name, show_prompts)


def _with_details(body: JobBody, job: StoredJob, pool: str, show_prompts: bool) -> JobBody:
    details = describe_in_full(job, pool, show_prompts)
    found: JobBody = {**body, "result": _shorten_result(body["result"]), "details": cast(JobDetails, details)}
    if show_prompts:
        return found
    if found["error"] is not None and without_prompt(job) != job.failure:
        _, message = describe_failure(job, show_prompts)
        found["error"] = {**found["error"], "message": message or HIDDEN}
    if found["result"] is not None and (details["request"] or {}).get("echo"):
        found["result"] = _without_echo(found["result"], job.prompt)
    return found


def _shorten_result(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a result without its log probabilities."""
    if result is None:
        return None
    found = {name: value for name, value in result.items() if name not in _OF_TOKENS}
    if "alternatives" in found:
        found["alternatives"] = [_shorten_result(one) for one in found["alternatives"]]
    return found


def _without_echo(result: dict[str, Any], prompt: Any) -> dict[str, Any]:
    """Return a result whose texts begin with the prompt without it; of token ids, nobody here knows the text."""
    known = isinstance(prompt, str) and result["text"].startswith(prompt)
    found = {**result, "text": HIDDEN + result["text"][len(prompt) :] if known else HIDDEN}
    if "alternatives" in found:
        found["alternatives"] = [_without_echo(one, prompt) for one in found["alternatives"]]
    return found


def _headers(job_id: str) -> dict[str, str]:
    """Return the header that names a job, as it stands in a path: an id of an older RQ may hold any character."""
    return {"x-job-id": quote(job_id, safe="")}


async def _text_events(waiting: PendingJobs, known: Progress) -> AsyncIterator[bytes]:
    """Yield the events of a job's texts, of which a reader knows some already, and of its end."""
    progress = Progress(known.by_index)
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        what = item[1]
        if isinstance(what, Piece):
            start = max(what.at, known.by_index.get(what.choice_index, 0))
            new = what.text[start - what.at :]
            if new:
                progress.by_index[what.choice_index] = start + len(new)
                body: TextEvent = {"text": new, "at": start}
                if what.choice_index:
                    body["choice_index"] = what.choice_index
                if what.usage is not None:
                    body["usage"] = asdict(what.usage)
                yield event(body, event_id=str(progress))
        else:
            yield event(_end(unwrap(what)), "end")


def _end(outcome: Outcome | None) -> EndEvent:
    if outcome is None:
        return {"result": None, "error": None}
    if not isinstance(outcome, FastGPT2Error):
        return {"result": result_to_json(outcome, outcome.timings.queue_seconds), "error": None}
    partial = outcome.partial if isinstance(outcome, JobFailed) else None
    return {
        "result": None if partial is None else result_to_json(partial, partial.timings.queue_seconds),
        "error": error_object(outcome, openai=True)["error"],
    }


def _error_event(error: FastGPT2Error) -> bytes:
    return event(_end(error), "error")


def _parse_wait(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    try:
        value = float(text[:40])
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_WAIT_SECONDS:
        raise refusal("wait", f"a number of seconds from 0 to {MAX_WAIT_SECONDS:g}", text)
    return value


def parse_flag(request: Request, name: str) -> bool:
    """Return a query parameter that is true or false, and false if it is not given.

    Raises:
        BadRequest: it is neither.
    """
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise refusal(name, "true or false", text)
    return text in ("true", "1")
