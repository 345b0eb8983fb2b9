"""What callers give to either client, as plans of jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypedDict

from fastgpt2.api.enqueueing import JobPlan
from fastgpt2.engine.generation import GenerationRequest
from fastgpt2.errors import BadRequest
from fastgpt2.worker.job import JobOptions, parse_job
from fastgpt2.worker.names import Priority

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
