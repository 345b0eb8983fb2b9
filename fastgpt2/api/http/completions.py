"""`POST /v1/completions` and `GET /v1/models`, as OpenAI's API has them.

A request becomes jobs, one a prompt, each with all the texts of its prompt; their results, or the pieces of their
texts, become the answer. Source: OpenAI's API reference, "Create completion" (the legacy one), and how its Python
client types it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Literal, NotRequired, TypedDict

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts
from fastgpt2.api.http.completion_request import Completion, parse_completion, translate_error
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import (
    JSON,
    KEEP_ALIVE,
    EventStream,
    error_object,
    event,
)
from fastgpt2.api.http.service import Models, PendingJobs, Service
from fastgpt2.engine.decoding.options import ChoiceIndex, Seed
from fastgpt2.engine.decoding.records import Count, GenerationResult, StopReason, TokenLogprob, Usage
from fastgpt2.errors import FastGPT2Error, ModelUnknown
from fastgpt2.fields import one_of
from fastgpt2.protocol.messages import Piece

EXAMPLE = '{"model": "gpt2", "prompt": "Once upon a time", "max_tokens": 16}'
DONE = b"data: [DONE]\n\n"


class LogprobLists(TypedDict):
    """OpenAI's form of log probabilities: a list of each kind, with an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class Choice(TypedDict):
    """The continuation of a prompt, or a piece of it: those of the first prompt, then those of the next.

    As vLLM's, it says which stop string or token ended it, and, as Together AI's, with which seed it was drawn. These,
    and what follows them here, come with the end of a text.
    """

    index: Count
    text: str
    logprobs: LogprobLists | None
    finish_reason: Annotated[str, one_of("stop", "length")] | None
    stop_reason: NotRequired[StopReason]
    seed: NotRequired[
        Annotated[Seed, "With this seed, and the choice_index if there is one, the text can be had again."]
    ]
    choice_index: NotRequired[Annotated[ChoiceIndex, "The index of a text that was drawn, if it is not 0."]]
    cumulative_logprob: NotRequired[Annotated[float, "The sum of all its tokens' log probabilities."]]


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
    completion_tokens_details: NotRequired[PredictedTokens]


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
        if name not in served and f"/{name}" in served:
            name = f"/{name}"  # a folder, whose first slash was one too many in the path of the request
        if name not in served:
            raise unknown_model(name, served)
        return JSON(_model_body(name, served[name]))

    async def create(self, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        completion = parse_completion(await read_object(request, self._service.bounds.body_timeout, EXAMPLE))
        served = await self._models.read()
        # Without a worker nobody knows the models: the job waits for a worker.
        model = completion.request.wanted_model
        if model is not None and served and model not in served:
            raise unknown_model(model, served)
        if completion.request.stream:
            return EventStream(
                self._events(request, completion), lambda error: event(error_object(error, openai=True)) + DONE
            )
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                results = await waiting.results()
        except FastGPT2Error as error:
            raise translate_error(error, completion.request) from None
        return JSON(completion_object(waiting.jobs[0].id, completion, results), headers=_headers(waiting))

    @asynccontextmanager
    async def _events(
        self, request: Request, completion: Completion
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                served = await self._models.read()
                model = completion.request.wanted_model or next(iter(served), "")
                yield _headers(waiting), _chunks(waiting, completion, _envelope(waiting.jobs[0].id, model))
        except FastGPT2Error as error:
            raise translate_error(error, completion.request) from None


async def _chunks(waiting: PendingJobs, completion: Completion, envelope: CompletionBody) -> AsyncIterator[bytes]:
    results, appended = [], AppendOnlyTexts()
    request = completion.request
    if request.includes_usage:
        envelope["usage"] = None
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        number, what = item
        if isinstance(what, Piece):
            index = number * request.n + what.choice_index - request.choice_index
            appended.add(index, what)
            logprobs = _logprobs(what.logprobs) if request.logprobs is not None else None
            yield event(_chunk(envelope, _choice(index, what.text, None, logprobs), what.usage))
            continue
        result = unwrap(what)
        results.append(result)
        for index, text in _texts(number, result, completion):
            usage = text.usage if request.continues_usage else None
            if not completion.plans[number].options.stream:
                choice = _choice(index, text.text, None, _logprobs_of(text, result, completion))
                yield event(_chunk(envelope, choice, usage))
            yield event(_chunk(envelope, _last_choice(index, text, "", None), usage))
    if request.includes_usage:
        yield event({**envelope, "choices": [], "usage": _usage(results)})
    yield DONE


def _chunk(envelope: CompletionBody, choice: Choice, usage: Usage | None) -> CompletionBody:
    """Return an event with a piece of a text, and, if they are asked for, the counts of this text and its prompt."""
    chunk: CompletionBody = {**envelope, "choices": [choice]}
    if usage is not None:
        chunk["usage"] = _counts(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    return chunk


def unknown_model(name: str, served: Iterable[str]) -> ModelUnknown:
    """Return the error for a model that no worker serves."""
    return ModelUnknown(f"no worker serves the model {name[:200]!r}; served are: {', '.join(sorted(served)) or 'none'}")


def _model_body(name: str, created: int) -> ModelBody:
    return {"id": name, "object": "model", "created": created, "owned_by": "fastgpt2"}


def _headers(waiting: PendingJobs) -> dict[str, str]:
    """Return a header with the job by which a request can be cancelled or looked up, if the request is one job."""
    return {"x-job-id": waiting.jobs[0].id} if len(waiting.jobs) == 1 else {}


def completion_object(job_id: str, completion: Completion, results: Sequence[GenerationResult]) -> CompletionBody:
    """Return the answer to a request that does not stream, from the results of its jobs, the first with this id."""
    choices = [
        _last_choice(index, text, text.text, _logprobs_of(text, result, completion))
        for number, result in enumerate(results)
        for index, text in _texts(number, result, completion)
    ]
    return {**_envelope(job_id, results[0].model), "choices": choices, "usage": _usage(results)}


def _envelope(job_id: str, model: str) -> CompletionBody:
    return {
        "id": f"cmpl-{job_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        # Equal texts can be expected of equal fingerprints.
        "system_fingerprint": f"fastgpt2-{__version__}",
        "choices": [],
    }


def _texts(number: int, result: GenerationResult, completion: Completion) -> list[tuple[int, GenerationResult]]:
    """Return the texts of a prompt, each with its index in the answer."""
    return list(enumerate((result, *result.alternatives), number * completion.request.n))


def _choice(index: int, text: str, finish_reason: str | None, logprobs: LogprobLists | None) -> Choice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _last_choice(index: int, result: GenerationResult, text: str, logprobs: LogprobLists | None) -> Choice:
    choice = _choice(index, text, result.finish_reason, logprobs)
    if result.stop_reason is not None:
        choice["stop_reason"] = result.stop_reason
    if result.seed is not None:
        choice["seed"] = result.seed
        if result.choice_index:
            choice["choice_index"] = result.choice_index
    if result.cumulative_logprob is not None:
        choice["cumulative_logprob"] = result.cumulative_logprob
    return choice


def _logprobs_of(text: GenerationResult, first: GenerationResult, completion: Completion) -> LogprobLists | None:
    """Return the log probabilities of a text; those of its prompt stand with the `first` text of the prompt."""
    if completion.request.logprobs is None:
        return None
    # A token that a stop string has cut from the text has no entry either.
    generated = [entry for entry in text.logprobs or () if entry.text_offset < len(text.text)]
    return _logprobs([*(first.prompt_logprobs or ()), *generated])


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
    """Return the counts of all texts. The prompt of several texts is read, and counted, once."""
    texts = [text for result in results for text in (result, *result.alternatives)]
    accepted = sum(text.drafting.accepted for text in texts)
    rejected = sum(text.drafting.drafted for text in texts) - accepted
    prompt_tokens = sum(result.usage.prompt_tokens for result in results)
    completion_tokens = sum(text.usage.completion_tokens for text in texts)
    cached_tokens = sum(result.usage.cached_tokens for result in results)
    return {
        **_counts(prompt_tokens, completion_tokens, cached_tokens),
        "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected},
    }


def _counts(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> CompletionUsage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
