"""`POST /v1/completions`, as OpenAI's API has it.

A request becomes jobs, one a prompt, each with all the texts of its prompt; their results, or the pieces of their
texts, become the answer. Source: OpenAI's API reference, "Create completion" (the legacy one), and how its Python
client types it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Literal, NotRequired, TypedDict

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts
from fastgpt2.api.http.completion_request import Completion, parse_completion, translate_error
from fastgpt2.api.http.models import Models
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import (
    JSON,
    KEEP_ALIVE,
    EventStream,
    event,
)
from fastgpt2.api.http.service import PendingJobs, Service
from fastgpt2.api.http.text_answers import (
    DONE,
    FINGERPRINT,
    CompletionUsage,
    TextEnd,
    counts_of,
    end_of,
    error_event,
    job_header,
    usage_of,
)
from fastgpt2.engine.decoding.records import Count, GenerationResult, TokenLogprob, Usage
from fastgpt2.errors import FastGPT2Error
from fastgpt2.fields import one_of
from fastgpt2.protocol.messages import Piece

EXAMPLE = '{"model": "gpt2", "prompt": "Once upon a time", "max_tokens": 16}'


class LogprobLists(TypedDict):
    """OpenAI's form of log probabilities: a list of each kind, with an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class Choice(TextEnd):
    """The continuation of a prompt, or a piece of it: those of the first prompt, then those of the next."""

    index: Count
    text: str
    logprobs: LogprobLists | None
    finish_reason: Annotated[str, one_of("stop", "length")] | None


class CompletionBody(TypedDict):
    """An answer, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: NotRequired[CompletionUsage | None]


class Completions:
    """The route of completions."""

    def __init__(self, service: Service, models: Models) -> None:
        self._service = service
        self._models = models

    async def create(self, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        completion = parse_completion(await read_object(request, self._service.bounds.body_timeout, EXAMPLE))
        if completion.request.stream:
            return EventStream(self._events(request, completion), error_event)
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                results = await waiting.results()
        except FastGPT2Error as error:
            raise translate_error(error, completion.request) from None
        return JSON(completion_object(waiting.jobs[0].id, completion, results), headers=job_header(waiting.jobs))

    @asynccontextmanager
    async def _events(
        self, request: Request, completion: Completion
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        # Before the job is enqueued: it may go on while Redis is away, and nothing else may fail then.
        model = completion.request.wanted_model or (await self._models.read()).unnamed or ""
        try:
            async with self._service.submit(request, completion.plans, completion.asked) as waiting:
                yield job_header(waiting.jobs), _chunks(waiting, completion, _envelope(waiting.jobs[0].id, model))
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
        yield event({**envelope, "choices": [], "usage": usage_of(results)})
    yield DONE


def _chunk(envelope: CompletionBody, choice: Choice, usage: Usage | None) -> CompletionBody:
    """Return an event with a piece of a text, and, if they are asked for, the counts of this text and its prompt."""
    chunk: CompletionBody = {**envelope, "choices": [choice]}
    if usage is not None:
        chunk["usage"] = counts_of(usage)
    return chunk


def completion_object(job_id: str, completion: Completion, results: Sequence[GenerationResult]) -> CompletionBody:
    """Return the answer to a request that does not stream, from the results of its jobs, the first with this id."""
    choices = [
        _last_choice(index, text, text.text, _logprobs_of(text, result, completion))
        for number, result in enumerate(results)
        for index, text in _texts(number, result, completion)
    ]
    return {**_envelope(job_id, results[0].model), "choices": choices, "usage": usage_of(results)}


def _envelope(job_id: str, model: str) -> CompletionBody:
    return {
        "id": f"cmpl-{job_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "choices": [],
    }


def _texts(number: int, result: GenerationResult, completion: Completion) -> list[tuple[int, GenerationResult]]:
    """Return the texts of a prompt, each with its index in the answer."""
    return list(enumerate((result, *result.alternatives), number * completion.request.n))


def _choice(index: int, text: str, finish_reason: str | None, logprobs: LogprobLists | None) -> Choice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _last_choice(index: int, result: GenerationResult, text: str, logprobs: LogprobLists | None) -> Choice:
    choice = _choice(index, text, result.finish_reason, logprobs)
    return {**choice, **end_of(result)}


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
