"""Running a job again: a failed one under its own id, as RQ requeues it; of any other that has ended, a new job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis.exceptions import ResponseError
from rq.job import JobStatus
from rq.rate_limit import ACQUIRE_AND_ENQUEUE_SCRIPT
from rq.utils import current_timestamp, now, utcformat

from fastgpt2.api.client.admission import Admission
from fastgpt2.api.client.enqueue import (
    DEFAULT_JOB_TIMEOUT_SECONDS,
    DEFAULT_RESULT_TTL_SECONDS,
    IdempotencyKey,
    JobPlan,
)
from fastgpt2.api.client.flow import Command, Flow
from fastgpt2.api.client.outcome import Outcome
from fastgpt2.api.client.session import Session
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.errors import BadRequest, JobFailed, JobNotEnded, JobNotFound, ModelUnknown, QueueFull
from fastgpt2.protocol.keys import (
    JOB_PREFIX,
    PRIORITIES,
    QUEUE_PREFIX,
    RATE_LIMIT_PREFIX,
    TOKEN_FIELD,
    job_key,
    models_key,
    plain_queue_of,
    queue_of,
    queues_of,
    totals_key,
)
from fastgpt2.protocol.messages import MAX_TIMEOUT_SECONDS, TASK, parse_job
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.stored_jobs import read_call
from fastgpt2.protocol.untrusted import MAX_PAYLOAD_BYTES, is_of_entry, text, whole

_REQUEUE = Script(__file__, "requeue")

# The statuses of jobs that RQ has among the failed ones.
_REQUEUED = (JobStatus.FAILED.value.encode(), JobStatus.STOPPED.value.encode())


@dataclass(frozen=True, slots=True)
class Again:
    """A job that runs again.

    Attributes:
        job_id: its id.
        is_new: it is a new job with the request of the one that was named; that one stays as it ended.
    """

    job_id: str
    is_new: bool


def run_again(
    session: Session, job_id: str, keys: Sequence[IdempotencyKey] | None = None, admission: Admission | None = None
) -> Flow[Again]:
    """Run a job again: requeue it if it is among the failed ones, else enqueue a new job with the same request.

    A new job that draws has the seed of the earlier one, so that its text is the same.

    Args:
        keys: the idempotency key of the new job, if there is to be one.
        admission: asks first whether the limits of a token leave room. What runs again is that token's job.

    Raises:
        TokenLimitReached: they do not.
        JobNotFound: this pool has no such job.
        JobNotEnded: it waits or runs still.
        ModelUnknown: no worker serves the model that the job names.
        QueueFull: `max_queue` jobs wait already; the job stays as it is.
        BadRequest: the entry holds no request that could run again.
        NotDurable: the job is in its queue, and Redis has not confirmed in time that this will last.
    """
    if admission is not None:
        yield from _take_room(session, job_id, admission)
    has_room = False
    try:
        status, origin = yield from requeue(session, job_id, None if admission is None else admission.token)
        has_room = status == "requeued"
    except JobNotEnded:
        # Another request of the token may have requeued the job at the same moment, and then the room is the job's.
        has_room = admission is not None and (yield from _is_of_token(job_id, admission.token))
        raise
    finally:
        if admission is not None and not has_room:
            yield from admission.release([job_id])
    if has_room:
        return Again(job_id, is_new=False)
    plan = yield from _plan_again(session, job_id, status, origin)
    (job,) = yield from session.send_all([plan], keys, admission)
    return Again(job.id, is_new=True)


def _take_room(session: Session, job_id: str, admission: Admission) -> Flow[None]:
    """Take room for a failed job within the limits of a token; for another, room is taken when a new one is enqueued.

    Raises:
        TokenLimitReached: there is none.
    """
    try:
        status, origin = yield Command("hmget", (job_key(job_id), ["status", "origin"]))
    except ResponseError as error:
        if is_of_entry(error):
            return  # what stands there is no job
        raise
    if status not in _REQUEUED:
        return
    try:
        plan = yield from _plan_again(session, job_id, text(status), text(origin))
    except BadRequest:
        plan = JobPlan(GenerationRequest(""))  # it will fail at once
    yield from admission.ask([job_id], [plan], None)


def _is_of_token(job_id: str, token: str) -> Flow[bool]:
    found = yield Command("hget", (job_key(job_id), TOKEN_FIELD))
    return text(found) == token


def requeue(session: Session, job_id: str, token: str | None = None) -> Flow[tuple[str, str]]:
    """Requeue a job if it is among the failed ones.

    Args:
        token: the name of the token whose job it is from now on; None if that stays as it is.

    Returns:
        "requeued" and ""; if it has ended and is not among the failed ones, its status and its queue.

    Raises what `run_again` raises.
    """
    yield from session.durability.check()
    arguments = (
        job_id, utcformat(now()), current_timestamp(), session.max_queue or 0, totals_key(session.queue),
        models_key(session.queue), token or "", *queues_of(session.queue),
    )  # fmt: skip
    command = Command("execute_command", _REQUEUE.command([job_key(job_id)], arguments))
    missing = JobNotFound.by(job_id)
    try:
        (reply,), confirmation = yield from session.send([command])
    except ResponseError as error:
        if is_of_entry(error):
            raise missing from None  # what stands there is no job
        raise
    word, *rest = (part.decode("utf-8", "replace") if isinstance(part, bytes) else part for part in reply)
    match word:
        case "missing":
            raise missing
        case "active":
            raise JobNotEnded(f"job {job_id} is {rest[0]}, so it runs anyway: wait for its end, or cancel it first")
        case "unserved":
            raise ModelUnknown.among(rest[0], rest[1:])
        case "full":
            raise QueueFull(session.queue, int(rest[0]), session.max_queue or 0)
        case "ended":
            return rest[0], rest[1]
        case "limited":
            yield _fill_slots(rest[0], int(rest[1]))
    if confirmation is not None and not session.durability.is_confirmed(confirmation):
        raise session.durability.shortfall([job_id], confirmation)
    return "requeued", ""


def _fill_slots(limit: str, most: int) -> Command:
    """Return the command that lets jobs which wait under one of RQ's rate limits into their queues, as RQ does it."""
    key = f"{RATE_LIMIT_PREFIX}{limit}"
    arguments = most, current_timestamp(), utcformat(now()), QUEUE_PREFIX, JOB_PREFIX
    words = ACQUIRE_AND_ENQUEUE_SCRIPT, 2, f"{key}:allowed", f"{key}:rate_limited", *arguments
    return Command("execute_command", ("EVAL", *words))


def _plan_again(session: Session, job_id: str, status: str, origin: str) -> Flow[JobPlan]:
    """Return the plan of a new job with the request of one that has ended."""
    size = yield Command("hstrlen", (job_key(job_id), "data"))
    if size > MAX_PAYLOAD_BYTES:
        raise BadRequest(f"job {job_id} cannot run again: its data have {size} bytes; the limit is {MAX_PAYLOAD_BYTES}")
    data, timeout, ttl = yield Command("hmget", (job_key(job_id), ["data", "timeout", "result_ttl"]))
    call = read_call(data or b"")
    if call is None or call.function != TASK:
        what = "its data cannot be read" if call is None else f"it names the function {text(call.function)!r}"
        raise BadRequest(f"job {job_id} is {status} and cannot run again: {what}; enqueue it anew")
    request, options = parse_job(call.args, call.kwargs)
    if request.seed is None:
        # A client of ours gives each job that draws a seed of its own; of another's, the result tells the seed.
        request = replace(request, seed=_seed_of((yield from session.outcome(job_id))))
    plain = plain_queue_of(origin)
    priorities = [priority for priority in PRIORITIES if queue_of(session.queue, priority) == plain]
    # RQ's workers may keep results for ever, or give jobs no limit.
    job_timeout = _within(timeout, DEFAULT_JOB_TIMEOUT_SECONDS)
    priority = priorities[0] if priorities else "normal"
    return JobPlan(request, options, priority, job_timeout, _within(ttl, DEFAULT_RESULT_TTL_SECONDS))


def _seed_of(outcome: Outcome | None) -> int | None:
    result = outcome.partial if isinstance(outcome, JobFailed) else outcome
    return result.seed if isinstance(result, GenerationResult) else None


def _within(seconds: Any, default: int) -> int:
    """Return a time as it stands in a job's hash, if a job may be given it; else the default."""
    found = whole(seconds)
    return found if found and found <= MAX_TIMEOUT_SECONDS else default
