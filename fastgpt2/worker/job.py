"""A generation job as it travels through Redis: JSON in, JSON out, versioned, and nothing taken on trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from fastgpt2.engine.generation import GenerationRequest, GenerationResult, Timings, Usage
from fastgpt2.errors import BadRequest, FastGPT2Error

# The one function that a queue may name.
TASK = "fastgpt2.worker.tasks.generate"

RESULT_VERSION = 1

_FIELDS = tuple(field.name for field in fields(GenerationRequest))

# What other APIs call the means of choosing tokens at random, or of choosing among several texts.
_SAMPLING = frozenset(
    {
        "best_of", "beam_size", "do_sample", "frequency_penalty", "length_penalty", "logit_bias", "min_p", "n",
        "num_beams", "presence_penalty", "repetition_penalty", "seed", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip


def parse_request(args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationRequest:
    """The request that a job's arguments spell: the prompt first or by name, everything else by name.

    Raises:
        BadRequest: a field is unknown, missing, ill-typed or out of bounds; the message names it.
    """
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise BadRequest("the job's arguments are not a list and a mapping")
    if len(args) > 1:
        raise BadRequest(f"{len(args)} positional arguments; only the prompt may be given so, name the others")
    options = dict(kwargs)
    if args:
        if "prompt" in options:
            raise BadRequest("prompt is given twice, by position and by name")
        options["prompt"] = args[0]
    if "prompt" not in options:
        raise BadRequest("prompt is missing")
    refuse_unknown(options, _FIELDS)
    return GenerationRequest(**options)


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise BadRequest for the first option that is not known, by its name, with the reason if it is about sampling."""
    for name in options:
        if name in known:
            continue
        if name in _SAMPLING:
            raise BadRequest(
                f"{name} is refused: fastgpt2 decodes greedily, always taking the likeliest token, so there is nothing "
                "to sample or to choose from; leave it out"
            )
        raise BadRequest(f"unknown field {str(name)[:100]!r}; known are {', '.join(known)}")


def request_to_kwargs(request: GenerationRequest) -> dict[str, Any]:
    """The keyword arguments of the task: the prompt, and what differs from the defaults."""
    kwargs: dict[str, Any] = {"prompt": request.prompt}
    if request.max_new_tokens is not None:
        kwargs["max_new_tokens"] = request.max_new_tokens
    if request.stop:
        kwargs["stop"] = list(request.stop)
    if request.ignore_eos:
        kwargs["ignore_eos"] = True
    return kwargs


def result_to_json(result: GenerationResult, queue_seconds: float = 0.0) -> dict[str, Any]:
    """A JSON object of a result, with its version and the time that only the queue's side knows."""
    timed = replace(result, timings=replace(result.timings, queue_seconds=queue_seconds))
    return {"version": RESULT_VERSION, **asdict(timed), "token_ids": list(result.token_ids)}


def result_from_json(value: object) -> GenerationResult:
    """The result that a JSON object holds.

    Raises:
        FastGPT2Error: it is none, or of a version that this release does not know.
    """
    if not isinstance(value, dict) or value.get("version") != RESULT_VERSION:
        version = value.get("version") if isinstance(value, dict) else None
        raise FastGPT2Error(f"not a result that this release can read (version {version!r}, wanted {RESULT_VERSION})")
    try:
        return GenerationResult(
            text=value["text"],
            token_ids=tuple(value["token_ids"]),
            finish_reason=value["finish_reason"],
            usage=Usage(**value["usage"]),
            timings=Timings(**value["timings"]),
            model=value["model"],
        )
    except (KeyError, TypeError) as reason:
        raise FastGPT2Error(f"a damaged result: {reason}") from None


def describe_result(result: Mapping[str, Any]) -> str:
    """A JSON result in a line of the log: counts and times, no text."""
    usage, timings = result["usage"], result["timings"]
    return (
        f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, {result['finish_reason']}; "
        f"queue {timings['queue_seconds'] * 1e3:.1f} ms, prefill {timings['prefill_seconds'] * 1e3:.1f} ms, "
        f"decode {timings['decode_seconds'] * 1e3:.1f} ms"
    )
