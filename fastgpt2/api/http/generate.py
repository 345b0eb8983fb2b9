"""`POST /`, as the original has it, and `POST /generate` and `/generate_stream`, as text-generation-inference has them.

Source: Narsil's fast_gpt2, and the OpenAPI document of Hugging Face's text-generation-inference 3.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import JSON, KEEP_ALIVE, Appended, EventStream, error_object, event
from fastgpt2.api.http.service import Service, Waiting
from fastgpt2.engine.decoding.records import GenerationResult, TokenLogprob
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.protocol.messages import Piece, refuse_unknown, result_to_json

EXAMPLE = '{"inputs": "a prompt"}'
RESULT_TTL_SECONDS = 3600
END_OF_TEXT = "<|endoftext|>"

# What clients send for "not at all": taken, where it is that, and else refused with the sampling parameters.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "best_of": lambda value: value == 1,
    "do_sample": lambda value: value is False,
    "frequency_penalty": lambda value: value == 0,
    "repetition_penalty": lambda value: value == 1,
    "seed": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "temperature": lambda value: value == 0,
    "top_p": lambda value: value == 1,
    "typical_p": lambda value: value == 1,
    "watermark": lambda value: value is False,
}
_FLAGS = ("return_full_text", "details", "decoder_input_details")


@dataclass(frozen=True, slots=True)
class Generation:
    """A request, checked.

    Attributes:
        full_text: whether the answer begins with the prompt.
        details: whether it tells of each token; `prefill` of those of the prompt too.
        listed: the answer is a list of one, as the original's.
    """

    plan: JobPlan
    full_text: bool
    details: bool
    prefill: bool
    stream: bool
    listed: bool

    def text(self, result: GenerationResult) -> str:
        prompt = self.plan.request.prompt
        # Of token ids the worker has put together what they read as.
        return f"{prompt}{result.text}" if self.full_text and not self.plan.request.echo else result.text


def parse_generation(body: Mapping[str, Any], listed: bool, stream: bool = False) -> Generation:
    """Read the body of a request.

    Args:
        listed: as `POST /` has it: the full text is the default, and `stream` a field.

    Raises:
        BadRequest: a field is unknown, ill-typed, out of bounds, or asks for what greedy decoding cannot give.
    """
    refuse_unknown(body, ("inputs", "parameters", "stream") if listed else ("inputs", "parameters"))
    parameters = body.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadRequest("parameters must be an object")
    if "inputs" not in body:
        raise BadRequest(f"inputs is missing: send {EXAMPLE}")
    stream = stream or _flag(body, "stream", False)
    fields = {name: value for name, value in parameters.items() if value is not None}
    for name, is_neutral in _NEUTRAL.items():
        if name in fields and is_neutral(fields[name]):
            del fields[name]
    full_text, details, prefill = (_flag(fields, name, listed and name == _FLAGS[0]) for name in _FLAGS)
    for name in _FLAGS:
        fields.pop(name, None)
    for name in ("prompt", "stream"):
        if name in fields:
            hint = "; the prompt goes into inputs" if name == "prompt" else ""
            raise BadRequest(f"unknown field {name!r} in parameters{hint}")
    _ask_for_details(fields, details or stream, prefill)
    plan = plan_job(body["inputs"], {"result_ttl": RESULT_TTL_SECONDS, **fields, "stream": stream})
    if full_text and not stream and not isinstance(plan.request.prompt, str):
        # What token ids read as, only the worker can tell.
        plan = replace(plan, request=replace(plan.request, echo=True))
    return Generation(plan, full_text, details, prefill, stream, listed)


def _ask_for_details(fields: dict[str, Any], tokens: bool, prefill: bool) -> None:
    top = fields.pop("top_n_tokens", None)
    if tokens or top is not None:
        fields.setdefault("logprobs", 0 if top is None else top)
    if prefill:
        fields["prompt_logprobs"] = 0


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false")
    return value


class Generate:
    """The routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def original(self, request: Request) -> Response:
        """`POST /`: `[{"generated_text": "..."}]`, or a stream."""
        return await self._answer(request, parse_generation(await self._read(request), listed=True))

    async def generate(self, request: Request) -> Response:
        """`POST /generate`: `{"generated_text": "..."}`"""
        return await self._answer(request, parse_generation(await self._read(request), listed=False))

    async def generate_stream(self, request: Request) -> Response:
        """`POST /generate_stream`: an event a token"""
        return await self._answer(request, parse_generation(await self._read(request), listed=False, stream=True))

    async def _read(self, request: Request) -> dict[str, Any]:
        return await read_object(request, self._service.bounds.body_timeout, EXAMPLE)

    async def _answer(self, request: Request, asked: Generation) -> Response:
        if asked.stream:
            return EventStream(self._events(request, asked), _error_event)
        async with self._service.submit(request, [asked.plan], asked.plan) as waiting:
            (result,) = await waiting.results()
        answer: dict[str, Any] = {"generated_text": asked.text(result)}
        if asked.details:
            answer["details"] = _details(result, asked.prefill)
        elif result.logprobs is not None:
            answer["logprobs"] = result_to_json(result)["logprobs"]
        return JSON([answer] if asked.listed else answer, headers={"x-job-id": waiting.jobs[0].id})

    @asynccontextmanager
    async def _events(
        self, request: Request, asked: Generation
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        async with self._service.submit(request, [asked.plan], asked.plan) as waiting:
            yield {"x-job-id": waiting.jobs[0].id}, _token_events(waiting, asked)


async def _token_events(waiting: Waiting, asked: Generation) -> AsyncIterator[bytes]:
    """An event for each token as soon as the next one, or the end, tells what it adds to the text."""
    text, tokens = "", list[TokenLogprob]()
    sent, appended = 0, Appended()
    async for item in waiting.events():
        if item is None:
            yield KEEP_ALIVE
            continue
        what = item[1]
        if isinstance(what, Piece):
            appended.add(0, what)
            text += what.text
            tokens[what.token_at :] = what.logprobs
            for number in range(sent, len(tokens) - 1):
                yield event(_token_event(number, tokens, text))
            sent = max(sent, len(tokens) - 1)
            continue
        result = unwrap(what)
        tokens = list(result.logprobs or ())
        for number in range(sent, len(tokens)):
            last: dict[str, Any] = {}
            if number == len(tokens) - 1:
                last = {"generated_text": asked.text(result), "details": _summary(result) if asked.details else None}
            yield event({**_token_event(number, tokens, result.text), **last})


def _token_event(number: int, tokens: list[TokenLogprob], text: str) -> dict[str, Any]:
    return {
        "index": number + 1,
        "token": _token(number, tokens, text),
        "top_tokens": [_bare(other) for other in tokens[number].top],
        "generated_text": None,
        "details": None,
    }


def _token(number: int, tokens: list[TokenLogprob], text: str) -> dict[str, Any]:
    """A token with what it adds to the text: nothing, if it only begins a character."""
    token = tokens[number]
    special = token.token == END_OF_TEXT
    upto = tokens[number + 1].text_offset if number + 1 < len(tokens) else len(text)
    return {**_bare(token), "text": token.token if special else text[token.text_offset : upto], "special": special}


def _bare(token: TokenLogprob) -> dict[str, Any]:
    return {"id": token.token_id, "text": token.token, "logprob": token.logprob, "special": token.token == END_OF_TEXT}


def _details(result: GenerationResult, prefill: bool) -> dict[str, Any]:
    tokens = list(result.logprobs or ())
    prompt = result.prompt_logprobs or () if prefill else ()
    return {
        **_summary(result),
        "prefill": [{"id": entry.token_id, "text": entry.token, "logprob": entry.logprob} for entry in prompt],
        "tokens": [_token(number, tokens, result.text) for number in range(len(tokens))],
        "top_tokens": [[_bare(other) for other in entry.top] for entry in tokens],
    }


def _summary(result: GenerationResult) -> dict[str, Any]:
    reason = "length"
    if result.finish_reason == "stop":
        ended = bool(result.logprobs) and result.logprobs is not None and result.logprobs[-1].token == END_OF_TEXT
        reason = "eos_token" if ended else "stop_sequence"
    return {
        "finish_reason": reason,
        "generated_tokens": result.usage.completion_tokens,
        "input_length": result.usage.prompt_tokens,
        "seed": None,
    }


def _error_event(error: FastGPT2Error) -> bytes:
    return event(error_object(error, openai=False))
