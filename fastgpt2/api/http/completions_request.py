"""What a request to OpenAI's `POST /v1/completions` asks for, as plans of jobs.

Source: OpenAI's API reference, "Create completion" (the legacy one), and how its Python client types it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2.api.enqueueing import JobPlan
from fastgpt2.api.http.answers import BadField
from fastgpt2.api.planning import plan_job
from fastgpt2.engine.generation import MAX_NEW_TOKENS
from fastgpt2.errors import BadRequest, FastGPT2Error, PromptTooLong

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
