"""A job before it is in its queue: what a caller gives as a plan, what is checked, and the command that enqueues it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now

from fastgpt2.api.client.flow import Command
from fastgpt2.engine.decoding.chat_options import is_messages
from fastgpt2.engine.decoding.records import GenerationRequest, RequestFields, list_stops, random_seed, split_prompt
from fastgpt2.errors import BadRequest, IdempotencyMismatch, ModelUnknown, QueueFull
from fastgpt2.fields import check_fields, whole
from fastgpt2.foreign_fields import is_neutral, refuse_unknown, take_known
from fastgpt2.protocol.keys import (
    QUEUES_KEY,
    TOKEN_FIELD,
    Priority,
    PriorityField,
    models_key,
    once_key,
    queue_key,
    queue_of,
    queues_of,
    totals_key,
)
from fastgpt2.protocol.messages import TASK, JobOptions, job_to_kwargs, parse_job, refuse_unstreamable
from fastgpt2.protocol.request_context import Traceparent, Tracestate, current_context
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import read_model_names

DEFAULT_JOB_TIMEOUT_SECONDS = 600
DEFAULT_RESULT_TTL_SECONDS = 24 * 3600
Seconds = Annotated[int, whole(1, 10**8, "seconds")]
NO_OPTIONS = JobOptions()

_ENQUEUE = Script(__file__, "enqueue")

# The place of the script's first key among the words of its command; the number of keys stands before it.
_FIRST_KEY = 3

# How often a job is enqueued again that Redis loses each time.
LOST_TRIES = 5

# RQ's job wants a connection, and is asked nothing here that would use it.
_NO_CONNECTION: Any = object()

# What a program may give as a prompt: a text, its token ids, the messages of a chat, a mapping of one of these beside
# other fields of its job, or a request that has been made.
PromptLike: TypeAlias = str | Iterable[int] | Iterable[Mapping[str, Any]] | Mapping[str, Any] | GenerationRequest

_PLAN_FIELDS = ("priority", "job_timeout", "result_ttl", "request_id", "traceparent", "tracestate")
_OPTION_FIELDS = ("timeout", "stream", "stream_usage", "model")


class JobFields(RequestFields, total=False):
    """The fields that may stand beside a prompt: those of the request, and those of the job.

    Attributes:
        timeout: seconds from being enqueued within which the job must be done.
        stream: publish the text as it comes, for `Job.stream`.
        stream_usage: its pieces tell how many tokens there are so far.
        model: the name of the model that is to generate the text; without it, the pool's first model does.
        priority: "high", "normal", the default, or "low"; the more urgent are taken first, and none waits for ever.
        job_timeout: seconds that a worker may spend on the job, from its start; default 600.
        result_ttl: seconds for which the job's end can be read; default a day.
        request_id: your name for what asked for the job, which workers' logs tell; up to 128 letters, digits and ._:-,
            any other text is passed over.
        traceparent, tracestate: the W3C trace context that the job's spans continue; by default that of the span that
            the program is in, if it uses OpenTelemetry.
    """

    timeout: float | None
    stream: bool
    stream_usage: bool
    model: str | None
    priority: Priority
    job_timeout: int
    result_ttl: int
    request_id: str | None
    traceparent: str | None
    tracestate: str | None


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A job before it is enqueued, checked when made; see `JobFields`.

    Raises:
        BadRequest: a time is no whole number of seconds or out of bounds, there is no such priority, or the best of
            several texts are to be streamed.
    """

    request: GenerationRequest
    options: JobOptions = NO_OPTIONS
    priority: PriorityField = "normal"
    job_timeout: Seconds = DEFAULT_JOB_TIMEOUT_SECONDS
    result_ttl: Seconds = DEFAULT_RESULT_TTL_SECONDS
    # Another request may ask for the same: these are not compared where an idempotency key is.
    request_id: str | None = field(default=None, repr=False)
    traceparent: Traceparent | None = field(default=None, repr=False)
    tracestate: Tracestate | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        refuse_unstreamable(self.request, self.options)


def plan_job(prompt: Any, fields: Mapping[str, Any]) -> JobPlan:
    """Return the plan of one job, from its prompt and its `JobFields`.

    Raises:
        BadRequest: a field is unknown, ill-typed or out of bounds, or given beside a request that has been made.
    """
    fields = list_stops(fields)
    refuse_unknown(fields, JobFields.__annotations__)
    plan_fields = {name: fields[name] for name in _PLAN_FIELDS if name in fields}
    others = {name: value for name, value in fields.items() if name not in _PLAN_FIELDS}
    if not isinstance(prompt, GenerationRequest):
        request, options = parse_job([prompt], others)
        return JobPlan(request, options, **plan_fields)
    for name in others:
        if name not in _OPTION_FIELDS and not is_neutral(name, others):
            raise BadRequest(f"{name[:100]} is given beside a request that has been made; put it in there")
    return JobPlan(prompt, JobOptions(**take_known(others, _OPTION_FIELDS)), **plan_fields)


def plan_prompt(prompt: PromptLike, fields: Mapping[str, Any]) -> JobPlan:
    """Return the plan of one job as a program gives it; see `plan_job`.

    The prompt may stand in a mapping, beside fields that count before the others; so may the messages of a chat, which
    may also be a list alone.
    """
    if is_messages(prompt):
        prompt = {"messages": prompt}
    if isinstance(prompt, Mapping):
        return plan_job(*split_prompt(prompt, fields))
    return plan_job(prompt, fields)


def plan_numbered(number: int, prompt: PromptLike, fields: Mapping[str, Any], call: str) -> JobPlan | BadRequest:
    """Return the plan of one prompt of many, or what is wrong with it. What is wrong with the fields is so with each.

    Args:
        number: the prompt's, from 0.
        call: what the caller called, such as "map".
    """
    try:
        return plan_prompt(prompt, fields)
    except BadRequest as error:
        error.name_prompt(number, prompt, call)
        return error


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The idempotency key of one job: the job is enqueued once, however often its client asks.

    A cancelled job does not count: a client that hung up and asks again wants the job after all.

    Args:
        redis_key: of the hash that keeps the job's id.
        asked: a digest of what the request asks for; with the same key it must be the same.
    """

    redis_key: str
    asked: str


def idempotency_keys(key: str, count: int, asked: object) -> list[IdempotencyKey]:
    """Return the idempotency keys of all `count` jobs of one request.

    Args:
        key: the client's.
        asked: what the request asks for; its `repr` is compared with that of an earlier request with the same key.
    """
    digest = _digest(repr(asked))  # once for all jobs: it may have megabytes
    return [IdempotencyKey(once_key(_digest(f"{number} {key}")), digest) for number in range(count)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def enqueue_command(
    plan: JobPlan, queue: str, max_queue: int | None, key: IdempotencyKey | None = None, token: str | None = None
) -> tuple[str, Command]:
    """Return a new job's id and the command that enqueues the job; see `enqueue.lua` and `read_enqueue_reply`.

    Args:
        token: the name of the endpoint's token by which it is enqueued.

    It writes the fields that `rq.Queue.enqueue` writes (rq/queue.py: create_job, _prepare_for_queue, _persist_job).

    A job that draws gets its seed here, so that each run of it draws the same. The plan has none yet: with an
    idempotency key, two plans are compared.
    """
    model = plan.options.model
    name = queue_of(queue, plan.priority, model)
    request = plan.request.with_seed(random_seed())
    job = RQJob.create(
        TASK,
        kwargs=job_to_kwargs(request, plan.options),
        connection=_NO_CONNECTION,
        result_ttl=plan.result_ttl,
        failure_ttl=plan.result_ttl,
        timeout=plan.job_timeout,
        status=JobStatus.QUEUED,
        # RQ would put the call, and so the prompt, into what `rq info` and logs show.
        description="generate",
        origin=name,
        serializer=JSONSerializer,
        meta=current_context(plan.request_id, plan.traceparent, plan.tracestate).to_meta(),
    )
    job.enqueued_at = now()
    fields = [part for pair in job.to_dict().items() if pair[1] is not None for part in pair]
    fields += [] if token is None else [TOKEN_FIELD, token]
    counted = [queue_key(other) for other in queues_of(queue)]
    keys = [job.key, queue_key(name), QUEUES_KEY, *counted, job.key if key is None else key.redis_key]
    asked = "" if key is None else key.asked
    of_model = model or "", models_key(queue)
    arguments = job.id, max_queue or 0, totals_key(queue), asked, plan.result_ttl, *of_model, *fields
    return job.id, Command("execute_command", _ENQUEUE.command(keys, arguments))


def read_enqueue_reply(
    job_id: str, reply: Any, queue: str, max_queue: int | None, model: str | None = None
) -> str | QueueFull | IdempotencyMismatch | ModelUnknown:
    """Return the id of the job that is there now, or why there is none, from the reply to `enqueue_command`.

    Args:
        model: the one that the job names.
    """
    if isinstance(reply, list):
        return ModelUnknown.among(model or "", read_model_names(reply))
    if isinstance(reply, int):
        return QueueFull(queue, reply, max_queue or 0) if reply else job_id
    known = reply.decode("utf-8", "replace")
    return known or IdempotencyMismatch(
        "a request with this idempotency key was made before and asked for something else; take another key"
    )


class SentJob:
    """A job that was enqueued here, and what it takes to enqueue it once more should Redis lose it.

    Args:
        job_id, command: what `enqueue_command` returned.

    Attributes:
        own_id: the id under which this job is enqueued.
        prompt: the job's prompt, by which an error tells of it.
        id: the id of the job that is waited for: that of an earlier request's, if one with the same idempotency key had
            enqueued it.
        sent_at: when the job was sent, on the monotonic clock.
        result_ttl: for how many seconds after its end the job can be read.
        history: the process of Redis that had the job then, as far as it is known; see `Recovery`.
        tries_left: how often the job may still be enqueued again.
        is_wanted: whether somebody still wants the job to run: it has neither been cancelled here nor been seen to end.
    """

    def __init__(self, job_id: str, command: Command, plan: JobPlan, history: str | None) -> None:
        self.own_id = self.id = job_id
        self.command = command
        self.prompt = plan.request.given
        self.sent_at = time.monotonic()
        self.result_ttl = plan.result_ttl
        self.history = history
        self.tries_left = LOST_TRIES
        self.is_wanted = True

    def command_again(self) -> Command:
        """Return the command without the limit on waiting jobs, and for a model that nobody serves just now, too.

        This job has been let in already: what lost it may have lost the names of the models, or their workers. It has
        the same id and, if the job draws, the same seed, so that the job's text is the same.
        """
        words = list(self.command.args)
        first_argument = _FIRST_KEY + words[_FIRST_KEY - 1]
        words[first_argument + 1], words[first_argument + 5] = 0, ""
        return Command(self.command.method, tuple(words))
