"""`POST /v1/completions` and `GET /v1/models`, as OpenAI's API has them, for a model that decodes greedily.

A request is checked and becomes plans of jobs, one a prompt; their results, or the pieces of their texts, become the
answer. Source: OpenAI's API reference, "Create completion" (the legacy one), and how its Python client types it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import (
    JSON,
    KEEP_ALIVE,
    AppendOnlyTexts,
    BadField,
    EventStream,
    ModelUnknown,
    error_object,
    event,
)
from fastgpt2.api.http.service import Models, PendingJobs, Service
from fastgpt2.engine.decoding.records import (
    TOKEN_IDS_SCHEMA,
    Count,
    GenerationResult,
    Logprobs,
    NewTokens,
    StopReason,
    StopStrings,
    StopTokenIds,
    TokenLogprob,
)
from fastgpt2.errors import BadRequest, FastGPT2Error, PromptTooLong
from fastgpt2.fields import Field, check_fields, fields_of, flag, one_of, only, refusal, text
from fastgpt2.protocol.keys import Priority
from fastgpt2.protocol.messages import Piece

EXAMPLE = '{"model": "gpt2", "prompt": "Once upon a time", "max_tokens": 16}'
DONE = b"data: [DONE]\n\n"

# OpenAI's own.
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
MAX_MODEL_CHARACTERS = 500

# An hour is enough: the answer goes out at once.
RESULT_TTL_SECONDS = 3600

# Our fields by the names that this API has for them.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}

_GREEDY = "fastgpt2 decodes greedily, always taking the likeliest token"
_NOTHING_ELSE = "Greedy decoding takes nothing else."
_ONLY_ZERO = only(0, f"must be 0 or left out: {_GREEDY}")
_ONLY_ONE = only(1, f"must be 1 or left out, there being one likeliest text: {_GREEDY}")
_NO_BIAS = only({}, f"must be empty or left out: {_GREEDY}")
_NO_SUFFIX = only("", "must be empty or left out: GPT-2 continues texts, it fills none in")
_TOP_P_RULE = f"must be 1 or left out, unless temperature is 0, when it may be anything from 0 to 1: {_GREEDY}"


def _check_top_p(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise BadRequest(f"{name} {_TOP_P_RULE}")
    return value


def _check_prompts(name: str, value: Any) -> list[str | list[int]]:
    """Return the prompts, texts or lists of token ids, of which one may stand alone. Each is checked as a job's."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        kinds = "a string, a list of strings, a list of token ids, or a list of such lists"
        raise refusal(name, kinds, value, of_type=True)
    if not value:
        raise BadRequest(f"{name} is an empty list; leave it out to begin a new text")
    if not isinstance(value[0], str | list):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise BadRequest(f"{name} holds {len(value)} prompts; the limit is {MAX_PROMPTS} a request: send more requests")
    if not all(isinstance(prompt, type(value[0])) for prompt in value):
        raise BadRequest(f"{name}, a list, must hold prompts of one kind: strings, or lists of token ids")
    return value


def _check_stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict) or not value.keys() <= _STREAM_FLAGS.keys():
        raise BadRequest(f'{name} must be an object: {{"include_usage": true}}')
    return {key: flag().check(f"{name}.{key}", part) for key, part in value.items()}


_TEXT = {"type": "string"}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
_IDS = {**TOKEN_IDS_SCHEMA, "minItems": 1}
_PROMPT_KINDS = [_TEXT, {**_SEVERAL, "items": _TEXT}, _IDS, {**_SEVERAL, "items": TOKEN_IDS_SCHEMA}]
# There is nothing to obfuscate.
_STREAM_FLAGS = dict.fromkeys(("include_usage", "include_obfuscation"), flag().schema)

_TOP_P = Field({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, _check_top_p)
_PROMPTS = Field({"anyOf": _PROMPT_KINDS}, _check_prompts)
_STREAM_OPTIONS = Field(
    {"type": "object", "properties": _STREAM_FLAGS, "additionalProperties": False}, _check_stream_options
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """The body of a request, checked when made: OpenAI's fields, then vLLM's and this package's own.

    Raises:
        BadRequest: a field has a wrong type, is out of bounds, or asks for what greedy decoding cannot give.
    """

    model: Annotated[str, text(1, MAX_MODEL_CHARACTERS)] | None = None
    prompt: Annotated[list[str | list[int]], _PROMPTS] = field(default_factory=lambda: [""])
    max_tokens: Annotated[NewTokens, f"{DEFAULT_MAX_TOKENS} by default."] = DEFAULT_MAX_TOKENS
    stop: StopStrings = ()
    stream: bool = False
    stream_options: Annotated[dict[str, bool], _STREAM_OPTIONS, "With `stream` only."] | None = None
    echo: bool = False
    logprobs: Annotated[Logprobs, "With `echo`, of the prompt's tokens too."] | None = None
    temperature: Annotated[float, _ONLY_ZERO, _NOTHING_ELSE] | None = None
    top_p: Annotated[float, _TOP_P, "1, unless temperature is 0."] = 1
    n: Annotated[int, _ONLY_ONE, _NOTHING_ELSE] = 1
    best_of: Annotated[int, _ONLY_ONE, _NOTHING_ELSE] = 1
    presence_penalty: Annotated[float, _ONLY_ZERO, _NOTHING_ELSE] = 0
    frequency_penalty: Annotated[float, _ONLY_ZERO, _NOTHING_ELSE] = 0
    logit_bias: Annotated[dict[str, float], _NO_BIAS] | None = None
    suffix: Annotated[str, _NO_SUFFIX, _NOTHING_ELSE] = ""
    seed: int | None = None
    user: str | None = None

    ignore_eos: bool = False
    min_tokens: NewTokens = 0
    stop_token_ids: StopTokenIds = ()
    priority: Priority = "normal"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_p != 1 and self.temperature is None:
            raise BadRequest(f"top_p {_TOP_P_RULE}")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options goes with stream: true")

    @property
    def prompt_logprobs(self) -> int | None:
        """Return how many likeliest tokens are asked for at each of the prompt's tokens."""
        return self.logprobs if self.echo else None

    def plans(self) -> list[JobPlan]:
        """Return a plan of a job for each prompt.

        Raises:
            BadRequest: a prompt, or what is asked of it, cannot be; the message has the names of a job's fields.
        """
        fields = {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "echo": self.echo,
            # The log probabilities of a prompt come with the result only, and they must come first.
            "stream": self.stream and self.prompt_logprobs is None,
            "result_ttl": RESULT_TTL_SECONDS,
            "priority": self.priority,
        }
        return [plan_job(prompt, fields) for prompt in self.prompt]


class LogprobLists(TypedDict):
    """OpenAI's form of log probabilities: a list of each kind, with an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class Choice(TypedDict):
    """The continuation of a prompt, or a piece of it. As vLLM's, it says which stop string or token ended it."""

    index: Count
    text: str
    logprobs: LogprobLists | None
    finish_reason: Annotated[str, one_of("stop", "length")] | None
    stop_reason: NotRequired[StopReason]


class CachedTokens(TypedDict):
    """The tokens of prompts that were not computed."""

    cached_tokens: Count


class PredictedTokens(TypedDict):
    """The fate of guesses. OpenAI's predictions, which come from the caller, are counted by the same names."""

    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class CompletionUsage(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens


class CompletionBody(TypedDict):
    """An answer, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: NotRequired[CompletionUsage | None]


class ModelBody(TypedDict):
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A request, checked, and what it comes to.

    Attributes:
        plans: a job for each prompt.
        asked: the fields that were given, in one order, to compare with another request.
    """

    request: CompletionRequest
    plans: list[JobPlan]
    asked: list[tuple[str, Any]]


def _parse(body: Mapping[str, Any]) -> Completion:
    given = {name: value for name, value in body.items() if value is not None}
    known = fields_of(CompletionRequest)
    for name in given:
        if name not in known:
            raise BadField(name[:100], f"unknown field {name[:100]!r}; known are {', '.join(sorted(known))}")
    try:
        request = CompletionRequest(**given)
        return Completion(request, request.plans(), sorted(given.items(), key=lambda pair: pair[0]))
    except BadRequest as error:
        raise _translate_error(error) from None


def _translate_error(error: FastGPT2Error) -> FastGPT2Error:
    """Return the error with our fields by the names of this API, and the field that it begins with as its `param`."""
    message = re.sub("|".join(_NAMES), lambda match: _NAMES[match[0]], str(error))
    if type(error) is PromptTooLong:
        return PromptTooLong(message)
    if type(error) is not BadRequest:
        return error
    word = re.split(r"\W", message, maxsplit=1)[0]
    return BadField(word, message) if word in fields_of(CompletionRequest) else BadRequest(message)


class Completions:
    """The routes of completions and models."""

    def __init__(self, service: Service, models: Models) -> None:
        self._service = service
        self._models = models

    async def list_models(self, _request: Request) -> Response:
        """Answer `GET /v1/models`."""
        served = await self._models.read()
        return JSON({"object": "list", "data": [_model_body(*pair) for pair in sorted(served.items())]})

    async def show_model(self, request: Request) -> Response:
        """Answer `GET /v1/models/{model}`."""
        name = request.path_params["model"]
        served = await self._models.read()
        if name not in served:
            raise _unknown(name, served)
        return JSON(_model_body(name, served[name]))

    async def create(self, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        completion = _parse(await read_object(request, self._service.bounds.body_timeout, EXAMPLE))
        served = await self._models.read()
        # Without a worker nobody knows the models: the job waits for a worker.
        model = completion.request.model
        if model is not None and served and model not in served:
            raise _unknown(model, served)
        if completion.request.stream:
            return EventStream(
                self._events(request, completion), lambda error: event(error_object(error, openai=True)) + DONE
            )
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                results = await waiting.results()
        except FastGPT2Error as error:
            raise _translate_error(error) from None
        choices = [
            _last_choice(number, result, result.text, _logprobs_of(result, completion))
            for number, result in enumerate(results)
        ]
        answer: CompletionBody = {**_envelope(waiting, results[0].model), "choices": choices, "usage": _usage(results)}
        return JSON(answer, headers=_headers(waiting))

    @asynccontextmanager
    async def _events(
        self, request: Request, completion: Completion
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                served = await self._models.read()
                model = completion.request.model or next(iter(served), "")
                yield _headers(waiting), _chunks(waiting, completion, _envelope(waiting, model))
        except FastGPT2Error as error:
            raise _translate_error(error) from None


async def _chunks(waiting: PendingJobs, completion: Completion, envelope: CompletionBody) -> AsyncIterator[bytes]:
    results, appended = [], AppendOnlyTexts()
    include_usage = (completion.request.stream_options or {}).get("include_usage", False)
    if include_usage:
        envelope["usage"] = None
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        number, what = item
        if isinstance(what, Piece):
            appended.add(number, what)
            logprobs = _logprobs(what.logprobs) if completion.request.logprobs is not None else None
            choice = _choice(number, what.text, None, logprobs)
        else:
            result = unwrap(what)
            results.append(result)
            if not completion.plans[number].options.stream:
                choice = _choice(number, result.text, None, _logprobs_of(result, completion))
                yield event({**envelope, "choices": [choice]})
            choice = _last_choice(number, result, "", None)
        yield event({**envelope, "choices": [choice]})
    if include_usage:
        yield event({**envelope, "choices": [], "usage": _usage(results)})
    yield DONE


def _unknown(name: str, served: Iterable[str]) -> ModelUnknown:
    return ModelUnknown(f"no worker serves the model {name[:200]!r}; served are: {', '.join(sorted(served)) or 'none'}")


def _model_body(name: str, created: int) -> ModelBody:
    return {"id": name, "object": "model", "created": created, "owned_by": "fastgpt2"}


def _headers(waiting: PendingJobs) -> dict[str, str]:
    """Return a header with the job by which a request can be cancelled or looked up, if the request is one job."""
    return {"x-job-id": waiting.jobs[0].id} if len(waiting.jobs) == 1 else {}


def _envelope(waiting: PendingJobs, model: str) -> CompletionBody:
    return {
        "id": f"cmpl-{waiting.jobs[0].id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        # Equal texts can be expected of equal fingerprints.
        "system_fingerprint": f"fastgpt2-{__version__}",
        "choices": [],
    }


def _choice(number: int, text: str, finish_reason: str | None, logprobs: LogprobLists | None) -> Choice:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _last_choice(number: int, result: GenerationResult, text: str, logprobs: LogprobLists | None) -> Choice:
    choice = _choice(number, text, result.finish_reason, logprobs)
    if result.stop_reason is not None:
        choice["stop_reason"] = result.stop_reason
    return choice


def _logprobs_of(result: GenerationResult, completion: Completion) -> LogprobLists | None:
    if completion.request.logprobs is None:
        return None
    # A token that a stop string has cut from the text has no entry either.
    generated = [entry for entry in result.logprobs or () if entry.text_offset < len(result.text)]
    return _logprobs([*(result.prompt_logprobs or ()), *generated])


def _logprobs(entries: Sequence[TokenLogprob]) -> LogprobLists:
    """Return OpenAI's four lists. Among the likeliest tokens, those that read alike are one entry: the likelier."""
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top(entry) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _top(entry: TokenLogprob) -> dict[str, float] | None:
    """Return the likeliest tokens and the one that was taken, or None for the first token of a prompt."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for other in (*entry.top, entry):
        if other.logprob is not None:
            top.setdefault(other.token, other.logprob)
    return top


def _usage(results: Sequence[GenerationResult]) -> CompletionUsage:
    accepted = sum(result.drafting.accepted for result in results)
    rejected = sum(result.drafting.drafted for result in results) - accepted
    return {
        "prompt_tokens": sum(result.usage.prompt_tokens for result in results),
        "completion_tokens": sum(result.usage.completion_tokens for result in results),
        "total_tokens": sum(result.usage.total_tokens for result in results),
        "prompt_tokens_details": {"cached_tokens": sum(result.usage.cached_tokens for result in results)},
        "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected},
    }
