"""`POST /v1/completions` and `GET /v1/models`, as OpenAI's API has them, for a model that decodes greedily."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import (
    JSON,
    KEEP_ALIVE,
    Appended,
    BadField,
    EventStream,
    ModelUnknown,
    error_object,
    event,
)
from fastgpt2.api.http.service import Models, Service, Waiting
from fastgpt2.engine.decoding.records import MAX_NEW_TOKENS, GenerationResult, TokenLogprob
from fastgpt2.errors import BadRequest, FastGPT2Error, PromptTooLong
from fastgpt2.protocol.messages import Piece

EXAMPLE = '{"model": "gpt2", "prompt": "Once upon a time", "max_tokens": 16}'
DONE = b"data: [DONE]\n\n"


class Completions:
    """The routes."""

    def __init__(self, service: Service, models: Models) -> None:
        self._service = service
        self._models = models

    async def list_models(self, _request: Request) -> Response:
        """`GET /v1/models`"""
        return JSON(
            {"object": "list", "data": [_model_object(*pair) for pair in sorted((await self._models.served()).items())]}
        )

    async def show_model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`"""
        name = request.path_params["model"]
        served = await self._models.served()
        if name not in served:
            raise _unknown(name, served)
        return JSON(_model_object(name, served[name]))

    async def create(self, request: Request) -> Response:
        """`POST /v1/completions`"""
        body = await read_object(request, self._service.bounds.body_timeout, EXAMPLE)
        completion = parse_completion(body)
        served = await self._models.served()
        # Without a worker nobody knows: the job waits for one.
        if completion.model is not None and served and completion.model not in served:
            raise _unknown(completion.model, served)
        if completion.stream:
            return EventStream(self._events(request, completion), _error_event)
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                results = await waiting.results()
        except FastGPT2Error as error:
            raise in_this_apis_words(error) from None
        envelope = _envelope(waiting, results[0].model)
        envelope["choices"] = [
            _choice(number, result.text, result.finish_reason, _logprobs_of(result, completion))
            for number, result in enumerate(results)
        ]
        envelope["usage"] = _usage(results)
        return JSON(envelope, headers=_headers(waiting))

    @asynccontextmanager
    async def _events(
        self, request: Request, completion: Completion
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                served = await self._models.served()
                model = completion.model or next(iter(served), "")
                yield _headers(waiting), _chunks(waiting, completion, _envelope(waiting, model))
        except FastGPT2Error as error:
            raise in_this_apis_words(error) from None


async def _chunks(waiting: Waiting, completion: Completion, envelope: dict[str, Any]) -> AsyncIterator[bytes]:
    results, appended = [], Appended()
    usage = {"usage": None} if completion.include_usage else {}
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        number, what = item
        if isinstance(what, Piece):
            appended.add(number, what)
            logprobs = _logprobs(what.logprobs) if completion.logprobs is not None else None
            choice = _choice(number, what.text, None, logprobs)
        else:
            result = unwrap(what)
            results.append(result)
            if not completion.plans[number].options.stream:
                choice = _choice(number, result.text, None, _logprobs_of(result, completion))
                yield event({**envelope, "choices": [choice], **usage})
            choice = _choice(number, "", result.finish_reason, None)
        yield event({**envelope, "choices": [choice], **usage})
    if completion.include_usage:
        yield event({**envelope, "choices": [], "usage": _usage(results)})
    yield DONE


def _error_event(error: FastGPT2Error) -> bytes:
    return event(error_object(error, openai=True)) + DONE


def _unknown(name: str, served: Iterable[str]) -> ModelUnknown:
    return ModelUnknown(f"no worker serves the model {name[:200]!r}; served are: {', '.join(sorted(served)) or 'none'}")


def _model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "fastgpt2"}


def _headers(waiting: Waiting) -> dict[str, str]:
    """The job by which a request can be cancelled or looked up, if it is one."""
    return {"x-job-id": waiting.jobs[0].id} if len(waiting.jobs) == 1 else {}


def _envelope(waiting: Waiting, model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{waiting.jobs[0].id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        # What equal texts can be expected of.
        "system_fingerprint": f"fastgpt2-{__version__}",
    }


def _choice(number: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs_of(result: GenerationResult, completion: Completion) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    # What a stop string has cut from the text is not told of either.
    generated = [entry for entry in result.logprobs or () if entry.text_offset < len(result.text)]
    return _logprobs([*(result.prompt_logprobs or ()), *generated])


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's four lists. Of the top, in its object, tokens that read alike are one: the likelier."""
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top(entry) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _top(entry: TokenLogprob) -> dict[str, float | None] | None:
    """The likeliest tokens and the one that was taken; of the first of a prompt nothing is known."""
    if entry.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for other in (*entry.top, entry):
        top.setdefault(other.token, other.logprob)
    return top


def _usage(results: Iterable[GenerationResult]) -> dict[str, Any]:
    prompt, completion, cached, drafted, accepted = 0, 0, 0, 0, 0
    for result in results:
        prompt += result.usage.prompt_tokens
        completion += result.usage.completion_tokens
        cached += result.usage.cached_tokens
        drafted += result.drafting.drafted
        accepted += result.drafting.accepted
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        # OpenAI's predictions come from the caller, and are counted by the same names.
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


# NOTE api.http.completions_request: What a request to OpenAI's `POST /v1/completions` asks for, as plans of jobs.
#
# Source: OpenAI's API reference, "Create completion" (the legacy one), and how its Python client types it.

# OpenAI's own.
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
MAX_MODEL_CHARACTERS = 500

# As long as for whoever reads a stream of results: the answer goes out at once.
RESULT_TTL_SECONDS = 3600
_GREEDY = "fastgpt2 decodes greedily, always taking the likeliest token"

# Our fields by the names that this API has for them.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_FIELDS = frozenset(
    {
        "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
        "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
        # Not OpenAI's: as in vLLM, and this package's own.
        "ignore_eos", "min_tokens", "priority",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Completion:
    """A request, checked.

    Attributes:
        plans: a job for each prompt.
        asked: all of it, in one order, to compare with another.
    """

    model: str | None
    plans: list[JobPlan]
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: int | None
    asked: list[tuple[str, Any]]


def parse_completion(body: Mapping[str, Any]) -> Completion:
    """Read the body of a request.

    Raises:
        BadRequest: a field is unknown, ill-typed, out of bounds, or asks for what greedy decoding cannot give.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in _FIELDS:
            raise BadField(name[:100], f"unknown field {name[:100]!r}; known are {', '.join(sorted(_FIELDS))}")
    _refuse_sampling(given)
    stream = _flag(given, "stream")
    include_usage = _stream_options(given, stream)
    echo, logprobs = _flag(given, "echo"), _whole(given, "logprobs", 0, 20)
    max_tokens = _whole(given, "max_tokens", 0, MAX_NEW_TOKENS)
    fields: dict[str, Any] = {
        "max_new_tokens": DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        "min_new_tokens": _whole(given, "min_tokens", 0, MAX_NEW_TOKENS) or 0,
        "stop": given.get("stop", ()),
        "ignore_eos": _flag(given, "ignore_eos"),
        "logprobs": logprobs,
        "echo": echo,
        # The log probabilities of a prompt come with the result only, and they must come first.
        "stream": stream and not (echo and logprobs is not None),
        "result_ttl": RESULT_TTL_SECONDS,
        "priority": given.get("priority", "normal"),
    }
    if echo and logprobs is not None:
        fields["prompt_logprobs"] = logprobs
    try:
        plans = [plan_job(prompt, fields) for prompt in _prompts(given.get("prompt", ""))]
    except BadRequest as error:
        raise in_this_apis_words(error) from None
    asked = sorted(given.items(), key=lambda pair: pair[0])
    return Completion(_model(given), plans, stream, include_usage, echo, logprobs, asked)


def in_this_apis_words(error: FastGPT2Error) -> FastGPT2Error:
    """The error with our fields by the names that they have here, and the field that it begins with as its `param`."""
    message = re.sub("|".join(_NAMES), lambda match: _NAMES[match[0]], str(error))
    if type(error) is PromptTooLong:
        return PromptTooLong(message)
    word = message.partition(" ")[0].rstrip(",:")
    if type(error) is BadRequest:
        return BadField(word, message) if word in _FIELDS else BadRequest(message)
    return error


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or a list of them: texts, or token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise BadField(
            "prompt", "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    if not value:
        raise BadField("prompt", "prompt is an empty list; leave it out to begin a new text")
    if not isinstance(value[0], str | list):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise BadField(
            "prompt", f"prompt holds {len(value)} prompts; the limit is {MAX_PROMPTS} a request: send more requests"
        )
    if not all(isinstance(prompt, type(value[0])) for prompt in value):
        raise BadField("prompt", "prompt, a list, must hold prompts of one kind: strings, or lists of token ids")
    return value


def _model(given: Mapping[str, Any]) -> str | None:
    model = given.get("model")
    if model is not None and (not isinstance(model, str) or not 1 <= len(model) <= MAX_MODEL_CHARACTERS):
        raise BadField("model", f"model must be a string of 1 to {MAX_MODEL_CHARACTERS} characters")
    return model


def _refuse_sampling(given: Mapping[str, Any]) -> None:
    """Take what asks for greedy decoding, or makes no difference to it, and nothing else."""
    greedy = given.get("temperature") == 0
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda value: _is_number(value) and value == 0, "must be 0 or left out"),
        "n": (lambda value: value == 1, "must be 1 or left out, there being one likeliest text"),
        "best_of": (lambda value: value == 1, "must be 1 or left out, there being one likeliest text"),
        "top_p": (
            lambda value: _is_number(value) and 0 < value <= 1 and (greedy or value == 1),
            "must be 1 or left out, unless temperature is 0, when it may be anything from 0 to 1",
        ),
        "presence_penalty": (lambda value: _is_number(value) and value == 0, "must be 0 or left out"),
        "frequency_penalty": (lambda value: _is_number(value) and value == 0, "must be 0 or left out"),
        "logit_bias": (lambda value: value == {}, "must be empty or left out"),
        "suffix": (lambda value: value == "", "must be empty or left out: GPT-2 continues texts, it fills none in"),
    }
    for name, (allowed, rule) in rules.items():
        if name in given and (isinstance(given[name], bool) or not allowed(given[name])):
            reason = rule if name == "suffix" else f"{rule}: {_GREEDY}"
            raise BadField(name, f"{name} {reason}")
    if "seed" in given and (not isinstance(given["seed"], int) or isinstance(given["seed"], bool)):
        raise BadField("seed", "seed must be a whole number")
    if not isinstance(given.get("user", ""), str):
        raise BadField("user", "user must be a string")


def _stream_options(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise BadField("stream_options", "stream_options goes with stream: true")
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise BadField("stream_options", 'stream_options must be an object: {"include_usage": true}')
    for name, value in options.items():
        if not isinstance(value, bool):
            raise BadField("stream_options", f"stream_options.{name} must be true or false")
    return bool(options.get("include_usage", False))


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise BadField(name, f"{name} must be true or false")
    return value


def _whole(given: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadField(name, f"{name} must be a whole number from {low} to {high}, not {str(value)[:40]}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
