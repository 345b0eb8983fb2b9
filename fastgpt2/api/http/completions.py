"""`POST /v1/completions` and `GET /v1/models`, as OpenAI's API has them, for a model that decodes greedily."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.http.answers import JSON, ModelUnknown, error_object
from fastgpt2.api.http.caller import read_object
from fastgpt2.api.http.completions_request import Completion, in_this_apis_words, parse_completion
from fastgpt2.api.http.event_stream import KEEP_ALIVE, Appended, EventStream, event
from fastgpt2.api.http.models import Models
from fastgpt2.api.http.service import Service, Waiting
from fastgpt2.api.outcome import unwrapped
from fastgpt2.engine.generation import GenerationResult, TokenLogprob
from fastgpt2.errors import FastGPT2Error
from fastgpt2.worker.stream import Piece

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
            result = unwrapped(what)
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
