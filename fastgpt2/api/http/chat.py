"""`POST /v1/chat/completions`, as OpenAI's API has it.

A request becomes one job with all its answers. The worker, which has the model's chat template, makes the prompt.
Source: OpenAI's API reference, "Create chat completion", and how its Python client types it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Literal, NotRequired, TypedDict

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts
from fastgpt2.api.http.chat_request import EXAMPLE, Chat, parse_chat, translate_chat_error
from fastgpt2.api.http.models import Models
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import JSON, KEEP_ALIVE, EventStream, event
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
from fastgpt2.errors import FastGPT2Error, NoChatTemplate
from fastgpt2.fields import one_of
from fastgpt2.protocol.messages import Piece

# What clients of text-generation-inference send as the model, which has one model alone: huggingface_hub the first,
# the others as that server's manual says.
_STAND_INS = ("dummy", "tgi")

FinishReasonField = Annotated[str, one_of("stop", "length")]


class LikelyTokenBody(TypedDict):
    token: str
    logprob: float
    bytes: Annotated[list[Count], "Its bytes: those of a part of a character are no text by themselves."]


class ChatTokenBody(LikelyTokenBody):
    """A token of an answer, and the likeliest tokens at its place."""

    top_logprobs: list[LikelyTokenBody]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenBody]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TextEnd):
    """An answer."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonField


class ChatDelta(TypedDict):
    """What an event adds to a message: the role comes first, and alone."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    refusal: NotRequired[None]


class ChatChunkChoice(TextEnd):
    """A piece of an answer."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonField | None


class ChatHead(TypedDict):
    """What an answer and each event of a stream begin with."""

    id: str
    created: Count
    model: str
    system_fingerprint: str


class ChatBody(ChatHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatChunkBody(ChatHead):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage | None]


class Chats:
    """The route of chats."""

    def __init__(self, service: Service, models: Models) -> None:
        self._service = service
        self._models = models

    async def create(self, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`."""
        chat = parse_chat(await read_object(request, self._service.bounds.body_timeout, EXAMPLE))
        served, model = await self._models.read(), chat.request.wanted_model
        if model in _STAND_INS and model not in served.by_name:
            model = None
        name = model or served.unnamed or ""
        # Who takes the job would say so too, but not before the jobs that wait before it have ended.
        card = served.by_name.get(name)
        if card is not None and not card.chats:
            raise NoChatTemplate(
                f"the model {name[:200]!r} has no chat template: continue prompts by POST /v1/completions, or have its "
                "workers started with --chat-template FILE"
            )
        # The job carries the name to the model's queue, and is refused there if no worker serves it.
        if model is None:
            chat = chat.without_model()
        if chat.request.stream:
            return EventStream(self._events(request, chat, name), error_event)
        try:
            async with self._service.submit(request, chat.plans, chat.asked) as waiting:
                (result,) = await waiting.results()
        except FastGPT2Error as error:
            raise translate_chat_error(error, chat.request) from None
        return JSON(chat_object(waiting.jobs[0].id, chat, result), headers=job_header(waiting.jobs))

    @asynccontextmanager
    async def _events(
        self, request: Request, chat: Chat, model: str
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        try:
            async with self._service.submit(request, chat.plans, chat.asked) as waiting:
                yield job_header(waiting.jobs), _chunks(waiting, chat, model)
        except FastGPT2Error as error:
            raise translate_chat_error(error, chat.request) from None


async def _chunks(waiting: PendingJobs, chat: Chat, model: str) -> AsyncIterator[bytes]:
    """Yield the events: of each answer its role, then its pieces and its end."""
    request = chat.request
    head = _envelope(waiting.jobs[0].id, model)
    envelope: ChatChunkBody = {**head, "object": "chat.completion.chunk", "choices": [], "usage": None}
    if not request.includes_usage:
        del envelope["usage"]
    begun, appended = set[int](), AppendOnlyTexts()
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        what = item[1]
        if isinstance(what, Piece):
            index = what.choice_index - request.choice_index
            appended.add(index, what)
            for choice in _begin(index, begun, request.echoed):
                yield event(_chunk(envelope, choice, None))
            told = _logprobs(what.logprobs) if request.logprobs else None
            yield event(_chunk(envelope, _piece(index, {"content": what.text}, told), what.usage))
            continue
        result = unwrap(what)
        for index, text in enumerate((result, *result.alternatives)):
            for choice in _begin(index, begun, request.echoed):
                yield event(_chunk(envelope, choice, None))
            last = _piece(index, {})
            last["finish_reason"] = text.finish_reason
            yield event(_chunk(envelope, {**last, **end_of(text)}, text.usage if request.continues_usage else None))
        if request.includes_usage:
            yield event({**envelope, "usage": usage_of([result])})
    yield DONE


def _begin(index: int, begun: set[int], echoed: str) -> list[ChatChunkChoice]:
    """Return what an answer begins with, unless it has begun: its role, and the text that is echoed."""
    if index in begun:
        return []
    begun.add(index)
    first = _piece(index, {"role": "assistant", "content": "", "refusal": None})
    return [first, _piece(index, {"content": echoed})] if echoed else [first]


def _piece(index: int, delta: ChatDelta, logprobs: ChatLogprobs | None = None) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _chunk(envelope: ChatChunkBody, choice: ChatChunkChoice, usage: Usage | None) -> ChatChunkBody:
    """Return an event with a piece of an answer, and, if they are asked for, the counts of this answer."""
    chunk: ChatChunkBody = {**envelope, "choices": [choice]}
    if usage is not None:
        chunk["usage"] = counts_of(usage)
    return chunk


def chat_object(job_id: str, chat: Chat, result: GenerationResult) -> ChatBody:
    """Return the answer to a request that does not stream, from the result of its job, which has this id."""
    return {
        **_envelope(job_id, result.model),
        "object": "chat.completion",
        "choices": [_choice(index, text, chat) for index, text in enumerate((result, *result.alternatives))],
        "usage": usage_of([result]),
    }


def _envelope(job_id: str, model: str) -> ChatHead:
    return {
        "id": f"chatcmpl-{job_id}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def _choice(index: int, text: GenerationResult, chat: Chat) -> ChatChoice:
    choice: ChatChoice = {
        "index": index,
        "message": {"role": "assistant", "content": chat.request.echoed + text.text, "refusal": None},
        # A token that a stop string has cut from the text has no entry either.
        "logprobs": _logprobs([entry for entry in text.logprobs or () if entry.text_offset < len(text.text)])
        if chat.request.logprobs
        else None,
        "finish_reason": text.finish_reason,
    }
    return {**choice, **end_of(text)}


def _logprobs(entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    content: list[ChatTokenBody] = [
        {**_likely(entry), "top_logprobs": [_likely(other) for other in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def _likely(token: TokenLogprob) -> LikelyTokenBody:
    # Only a prompt's first token, which nothing comes before, has no log probability.
    return {"token": token.token, "logprob": token.logprob or 0.0, "bytes": list(bytes_of(token.token))}


def bytes_of(token: str) -> bytes:
    """Return the bytes of a token as `TokenLogprob` has it: of a part of a character, their escapes are its text."""
    if not token.startswith("bytes:"):
        return token.encode()
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), token[6:].encode())
