"""A job as it is put into the queue: what RQ would write, by one script that also looks at the queue's depth."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypedDict

from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now

from fastgpt2.api.client.flow import Call, call
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest, IdempotencyMismatch, PromptTooLong, QueueFull
from fastgpt2.fields import check_fields, refusal, whole
from fastgpt2.protocol.keys import COUNT, REFUSED, Priority, once_key, queue_of, queues_of, totals_key
from fastgpt2.protocol.messages import TASK, JobOptions, job_to_kwargs, parse_job

DEFAULT_JOB_TIMEOUT_SECONDS = 600
RESULT_TTL_SECONDS = 24 * 3600
Seconds = Annotated[int, whole(1, 10**8, "seconds")]
MODEL_LIMITS_SECONDS = 30.0
NO_OPTIONS = JobOptions()

# Answers 0; the depth of a queue that is full; or, of a request that was made before, the id of its job, or "" if it
# asked for something else. A job that is there already was sent by the same client, which did not hear the answer: that
# it may be sent twice is what lets a client ask again.
_ENQUEUE = f"""
-- KEYS: the job, its queue, the set of queues, the queues that count, what is kept of the request or the job once more.
-- ARGV: the job's id, the limit or 0, the totals of the pool, in which a refusal is counted, what the request asks for
-- or nothing, for how many seconds that is kept, and the job's fields.
{COUNT}
if redis.call("EXISTS", KEYS[1]) == 1 then
    return 0
end
if ARGV[4] ~= "" then
    local known = redis.call("HMGET", KEYS[#KEYS], "job", "asked")
    local status = known[1] and redis.call("HGET", "rq:job:" .. known[1], "status")
    if status and known[2] ~= ARGV[4] then
        return ""
    elseif status and status ~= "canceled" then
        return known[1]
    end
end
local limit = tonumber(ARGV[2])
if limit > 0 then
    local depth = 0
    for i = 4, #KEYS - 1 do
        depth = depth + redis.call("LLEN", KEYS[i])
    end
    if depth >= limit then
        count(ARGV[3], "{REFUSED}", 1)
        return depth
    end
end
if ARGV[4] ~= "" then
    redis.call("HSET", KEYS[#KEYS], "job", ARGV[1], "asked", ARGV[4])
    redis.call("EXPIRE", KEYS[#KEYS], ARGV[5])
end
redis.call("SADD", KEYS[3], KEYS[2])
redis.call("HSET", KEYS[1], unpack(ARGV, 6))
redis.call("RPUSH", KEYS[2], ARGV[1])
return 0
"""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A job before it is enqueued, checked when made.

    Args:
        job_timeout: seconds that a worker may spend on it, from its start.
        result_ttl: seconds for which its end can be read.

    Raises:
        BadRequest: a time is no whole number of seconds or out of bounds, or there is no such priority.
    """

    request: GenerationRequest
    options: JobOptions = NO_OPTIONS
    priority: Priority = "normal"
    job_timeout: Seconds = DEFAULT_JOB_TIMEOUT_SECONDS
    result_ttl: Seconds = RESULT_TTL_SECONDS

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Once:
    """That a job is to be enqueued once, however often its client asks: the idempotency key of a request, digested.

    A job that was cancelled does not count: who asks again, having hung up, wants it after all.

    Args:
        redis_key: where the job is kept in mind.
        asked: a digest of what the request asks for; under the same key it must be the same.
    """

    redis_key: str
    asked: str


def once_each(key: str, count: int, asked: object) -> list[Once]:
    """For so many jobs of a request.

    Args:
        key: the client's.
        asked: what the request asks for, told apart by its `repr`.
    """
    # Once for all of them: it may have megabytes.
    digest = _digest(repr(asked))
    return [Once(once_key(_digest(f"{number} {key}")), digest) for number in range(count)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_max_queue(value: object) -> None:
    """Raise BadRequest unless the value is None or a number of jobs."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise refusal("max_queue", "a whole number from 1, or None for no limit", value)


def enqueue_call(
    plan: JobPlan, queue: str, max_queue: int | None, connection: Any, once: Once | None = None
) -> tuple[str, Call]:
    """The job's id, and the script that enqueues it; see `enqueued` for its answer.

    Writes the fields that `rq.Queue.enqueue` writes (rq/queue.py: create_job, _prepare_for_queue, _persist_job).
    `connection` is any of the redis library's: RQ's job wants one, and is asked nothing that would use it.
    """
    name = queue_of(queue, plan.priority)
    job = RQJob.create(
        TASK,
        kwargs=job_to_kwargs(plan.request, plan.options),
        connection=connection,
        result_ttl=plan.result_ttl,
        failure_ttl=plan.result_ttl,
        timeout=plan.job_timeout,
        status=JobStatus.QUEUED,
        # RQ would put the call, and so the prompt, into what `rq info` and logs show.
        description="generate",
        origin=name,
        serializer=JSONSerializer,
    )
    job.enqueued_at = now()
    fields = [part for pair in job.to_dict().items() if pair[1] is not None for part in pair]
    depths = [f"rq:queue:{counted}" for counted in queues_of(queue)]
    keys = [job.key, f"rq:queue:{name}", "rq:queues", *depths, job.key if once is None else once.redis_key]
    asked = "" if once is None else once.asked
    words = job.id, max_queue or 0, totals_key(queue), asked, plan.result_ttl
    return job.id, call("eval", _ENQUEUE, len(keys), *keys, *words, *fields)


def enqueued(job_id: str, answer: Any, queue: str, max_queue: int | None) -> str | QueueFull | IdempotencyMismatch:
    """What the script has answered: the id of the job that is there now, or why there is none."""
    if isinstance(answer, int):
        return QueueFull(queue, answer, max_queue or 0) if answer else job_id
    known = answer.decode("utf-8", "replace")
    return known or IdempotencyMismatch(
        "a request with this idempotency key was made before and asked for something else; take another key"
    )


class ModelLimits:
    """What the live workers' models can take, at best, as far as it has been read lately."""

    def __init__(self) -> None:
        self._known: tuple[float, int, int] = (0.0, 0, 1)

    def are_fresh(self) -> bool:
        return time.monotonic() < self._known[0]

    def note(self, answers: list[Any]) -> None:
        """Take over workers' answers, each [n_positions, longest token in bytes]."""
        positions, longest = 0, 1
        for n_positions, longest_token_bytes in answers:
            if n_positions and longest_token_bytes:
                positions = max(positions, int(n_positions))
                longest = max(longest, int(longest_token_bytes))
        # Without a worker the next job looks again.
        self._known = (time.monotonic() + MODEL_LIMITS_SECONDS if positions else 0.0, positions, longest)

    def check(self, request: GenerationRequest) -> None:
        """Refuse what surely cannot fit: a token has only so many bytes, so a text has at least so many tokens.

        Raises:
            PromptTooLong: the message says what would fit.
        """
        _, n_positions, longest_token_bytes = self._known
        if not n_positions:
            return
        if isinstance(request.prompt, str):
            size = len(request.prompt.encode())
            tokens = max(1, -(-size // longest_token_bytes))
            has, needs = f"{size} bytes, so at least {tokens} tokens", f"{tokens} or more"
        else:
            tokens = max(1, len(request.prompt))
            has, needs = f"{tokens} tokens", str(tokens)
        if tokens + request.least_room > n_positions:
            raise PromptTooLong(f"the prompt has {has}, over {request.describe_positions(n_positions)}: shorten it")
        room = n_positions - tokens
        for name, value in (("max_new_tokens", request.max_new_tokens), ("min_new_tokens", request.min_new_tokens)):
            if value is not None and value > room:
                raise PromptTooLong(
                    f"{name} is {value}; of the model's {n_positions} positions this prompt needs {needs}: "
                    f"ask for at most {room}"
                )


# NOTE api.planning: What callers give to either client, as plans of jobs.
Prompt: TypeAlias = str | list[int] | GenerationRequest
_OF_OPTIONS = ("timeout", "stream")
_OF_PLAN = ("priority", "job_timeout", "result_ttl")


class JobFields(TypedDict, total=False):
    """What may stand beside a prompt; `GenerationRequest` tells of the upper half.

    Attributes:
        timeout: seconds from being enqueued within which the job must be done.
        stream: publish the text as it comes, for `Job.stream`.
        priority: "high", "normal", the default, or "low"; the more urgent are taken first, and none waits for ever.
        job_timeout: seconds that a worker may spend on the job, from its start; default 600.
        result_ttl: seconds for which the job's end can be read; default a day.
    """

    max_new_tokens: int | None
    stop: str | Iterable[str]
    ignore_eos: bool
    min_new_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool

    timeout: float | None
    stream: bool
    priority: Priority
    job_timeout: int
    result_ttl: int


def plan_job(prompt: Prompt, fields: Mapping[str, Any]) -> JobPlan:
    """One prompt with its `JobFields`.

    Raises:
        BadRequest: a field is unknown, ill-typed or out of bounds, or given beside a request that has been made.
    """
    fields = _with_stops_listed(fields)
    of_plan = {name: fields[name] for name in _OF_PLAN if name in fields}
    others = {name: value for name, value in fields.items() if name not in _OF_PLAN}
    if not isinstance(prompt, GenerationRequest):
        request, options = parse_job([prompt], others)
        return JobPlan(request, options, **of_plan)
    for name in others:
        if name not in _OF_OPTIONS:
            raise BadRequest(f"{name[:100]} is given beside a request that has been made; put it in there")
    return JobPlan(prompt, JobOptions(**others), **of_plan)


def plan_each(prompts: Iterable[Prompt], fields: Mapping[str, Any]) -> Iterator[JobPlan | BadRequest]:
    """A plan for each prompt, or what is wrong with it. What is wrong with the fields is wrong with each."""
    fields = _with_stops_listed(fields)
    for prompt in prompts:
        try:
            yield plan_job(prompt, fields)
        except BadRequest as error:
            yield error


def _with_stops_listed(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """An iterator would be used up by the first look at it."""
    stop = fields.get("stop")
    if isinstance(stop, str | bytes | list | tuple | Mapping) or not isinstance(stop, Iterable):
        return fields
    return {**fields, "stop": tuple(stop)}
