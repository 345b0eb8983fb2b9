"""`POST /`, as the original has it, and `POST /generate` and `/generate_stream`, as text-generation-inference has them.

Source: Narsil's fast_gpt2, and the OpenAPI document of Hugging Face's text-generation-inference 3.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.client.outcome import unwrap
from fastgpt2.api.client.reader import AppendOnlyTexts
from fastgpt2.api.http.field_names import rename_fields
from fastgpt2.api.http.guides import GRAMMAR, OUR_GUIDES, Guide, find_guide, name_as_given
from fastgpt2.api.http.requests import read_object
from fastgpt2.api.http.responses import JSON, KEEP_ALIVE, EventStream, error_object, event
from fastgpt2.api.http.service import PendingJobs, Service
from fastgpt2.engine.decoding.chat_options import CHAT_FIELDS
from fastgpt2.engine.decoding.options import ChoiceIndex, Seed, Share, Temperature, Texts, TopK
from fastgpt2.engine.decoding.records import Count, GenerationResult, KeptTokens, Logprobs, TokenLogprob, mean_logprob
from fastgpt2.errors import BadRequest
from fastgpt2.fields import check_fields, fields_of, flag, only, refusal
from fastgpt2.foreign_fields import find_unknown, is_neutral, take_known
from fastgpt2.protocol.messages import Piece, TokenObject, logprobs_to_json

EXAMPLE = '{"inputs": "a prompt"}'
RESULT_TTL_SECONDS = 3600

# By this name alone, workers of earlier releases tell that a token is special.
END_OF_TEXT = "<|endoftext|>"

_FIELDS = ("inputs", "parameters", "stream")

# The fields of a job that are not to be had here, and what to do instead.
MISPLACED = {
    "prompt": "; the prompt goes into inputs",
    "stream": "; /generate_stream gives a stream, and POST / does with stream beside inputs",
    "stream_usage": "",
    **dict.fromkeys(CHAT_FIELDS, "; POST /v1/chat/completions answers chats"),
    "n": "; the best of several texts is given: ask for best_of, or have all of them from /v1/completions",
}

# The fields that shape a draw; a job has them by the same names.
_SHAPES = ("temperature", "top_k", "top_p", "typical_p")
_NO_WATERMARK = "must be false or left out: texts get no watermark"
_NO_ADAPTER = "must be left out: there are no adapters; an endpoint serves whole models"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceParameters:
    """The parameters that say how tokens are chosen, where text-generation-inference's mean other than a job's.

    Args:
        do_sample: draw tokens. False, its default, forbids nothing: whatever shapes a draw asks for one.
        temperature: of a draw. 1 asks for none, and 0 for the likeliest tokens.
        truncate: of longer inputs, read this many tokens, the last ones.
        best_of: draw this many texts, and give the likeliest. Not in a stream.
        grammar: the form that the text has.

    Raises:
        BadRequest: a parameter is out of bounds, or asks for what there is not.
    """

    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    typical_p: Share | None = None
    best_of: Texts | None = None
    grammar: Annotated[Guide, GRAMMAR] | None = None
    watermark: Annotated[bool, only(False, _NO_WATERMARK)] | None = None
    adapter_id: Annotated[None, only(None, _NO_ADAPTER)] = None
    truncate: KeptTokens | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def samples(self) -> bool:
        """Tell whether tokens are drawn, as text-generation-inference decides it."""
        if self.temperature == 0:
            return False
        shapes = self.temperature not in (None, 1), (self.top_k or 0) > 0
        shares = [share for share in (self.top_p, self.typical_p) if share is not None]
        return bool(self.do_sample) or any(shapes) or any(share < 1 for share in shares)

    def fields(self, details: bool, stream: bool) -> dict[str, Any]:
        """Return the fields of a job that these come to.

        Args:
            details: the answer tells of each text that was drawn.

        Raises:
            BadRequest: the best of several texts is asked for where there is no best.
        """
        fields: dict[str, Any] = dict(self.grammar or {})
        if self.truncate is not None:
            fields["truncate_prompt_tokens"] = self.truncate
        if self.samples:
            fields.update(do_sample=True, **{name: getattr(self, name) for name in _SHAPES})
        if self.best_of is not None and self.best_of > 1:
            if stream:
                raise BadRequest(
                    f"best_of is {self.best_of}, and only the end tells which text is the best: stream without best_of"
                )
            if not self.samples:
                raise BadRequest(
                    f"best_of is {self.best_of}, and all texts would be equal: set do_sample, or leave best_of out"
                )
            # The job itself would give the best text alone, and the details tell of all.
            fields["n" if details else "best_of"] = self.best_of
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerParameters:
    """The parameters that say what the answer tells, checked when made.

    Args:
        return_full_text: the answer begins with the prompt. None means so for `POST /` only.
        details: the answer tells of each token.
        decoder_input_details: it tells of each of the prompt's tokens too.
        top_n_tokens: how many of the likeliest tokens it names at each place.
    """

    return_full_text: bool | None = None
    details: bool = False
    decoder_input_details: bool = False
    top_n_tokens: Logprobs | None = None

    def __post_init__(self) -> None:
        check_fields(self)


# The parameters, by this API's names and by those of a job.
PARAMETERS = tuple(
    name
    for message in (ChoiceParameters, AnswerParameters, JobPlan)
    for name in fields_of(message)
    if name not in MISPLACED
)


class TokenBody(TypedDict):
    id: Count
    text: str
    logprob: float | None
    special: NotRequired[bool]


class DetailsBody(TypedDict):
    """The details of a text, which a stream gives without those of its tokens."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: Count
    input_length: Count
    seed: Annotated[Seed | None, "Of a text that was drawn: with this seed it can be had again."]
    choice_index: NotRequired[Annotated[ChoiceIndex, "Of one of several texts, if it is not 0: to be given too."]]
    prefill: NotRequired[list[TokenBody]]
    tokens: NotRequired[list[TokenBody]]
    top_tokens: NotRequired[list[list[TokenBody]]]


class SequenceBody(DetailsBody):
    """One of the texts of which another is the best."""

    generated_text: str


class AnswerDetailsBody(DetailsBody):
    best_of_sequences: NotRequired[Annotated[list[SequenceBody], "With `best_of`: the other texts."]]


class GeneratedBody(TypedDict):
    generated_text: str
    details: NotRequired[AnswerDetailsBody]
    logprobs: NotRequired[list[TokenObject]]


class TokenEvent(TypedDict):
    """An event of a stream: a token; the last one has the whole text."""

    index: Count
    token: TokenBody
    top_tokens: list[TokenBody]
    generated_text: str | None
    details: DetailsBody | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A request, checked.

    Attributes:
        full_text: the answer begins with the prompt.
        details: the answer tells of each token; with `prefill`, of those of the prompt too.
        listed: the answer is a list of one, as the original's.
        grammar: what the field of this name has come to.
        names: what fields of the job are called here, where that is otherwise.
    """

    plan: JobPlan
    full_text: bool
    details: bool
    prefill: bool
    stream: bool
    listed: bool
    grammar: Guide
    names: Mapping[str, str]

    def text(self, result: GenerationResult) -> str:
        """Return the text of the answer."""
        prompt = self.plan.request.prompt
        # With `echo`, the worker has put the prompt there: what token ids read as.
        return f"{prompt}{result.text}" if self.full_text and not self.plan.request.echo else result.text


def _parse(body: Mapping[str, Any], listed: bool, stream: bool) -> Generation:
    """Read the body of a request. For `POST /`, which is `listed`, the full text is the default, and `stream` a field.

    Raises:
        BadRequest: a field is unknown, of a wrong type, out of bounds, or asks for what there is not.
    """
    misplaced = find_unknown(body, _FIELDS)
    if misplaced in PARAMETERS:
        raise BadRequest(f"unknown field {misplaced!r} beside inputs; it goes into parameters")
    given = take_known(body, _FIELDS)
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise refusal("parameters", "an object", parameters, of_type=True)
    if "inputs" not in body:
        raise BadRequest(f"inputs is missing: send {EXAMPLE}")
    if flag().check("stream", given.get("stream", False)) and not stream:
        if not listed:
            raise BadRequest("stream is true, and this route gives no stream: ask /generate_stream, or leave it out")
        stream = True
    for name, hint in MISPLACED.items():
        if name in parameters and not is_neutral(name, parameters):
            raise BadRequest(f"unknown field {name!r} in parameters{hint}")
    fields = take_known(parameters, PARAMETERS)
    answer = AnswerParameters(**{name: fields.pop(name) for name in fields_of(AnswerParameters) if name in fields})
    choice = ChoiceParameters(**{name: fields.pop(name) for name in fields_of(ChoiceParameters) if name in fields})
    if choice.truncate is not None and "truncate_prompt_tokens" in fields:
        raise BadRequest("truncate and truncate_prompt_tokens are both given; they are the same: leave one out")
    find_guide({"grammar": choice.grammar, **{name: {name: fields[name]} for name in OUR_GUIDES if name in fields}})
    fields.update(choice.fields(answer.details, stream))
    if answer.details or stream or answer.top_n_tokens is not None:
        fields.setdefault("logprobs", answer.top_n_tokens or 0)
    if answer.decoder_input_details:
        fields["prompt_logprobs"] = 0
    names = _names_for(answer, choice, parameters)
    try:
        plan = plan_job(body["inputs"], {"result_ttl": RESULT_TTL_SECONDS, **fields, "stream": stream})
    except BadRequest as error:
        raise rename_fields(error, names) from None
    full_text = listed if answer.return_full_text is None else answer.return_full_text
    if full_text and not stream and not isinstance(plan.request.prompt, str):
        # Only the worker can tell what token ids read as.
        plan = replace(plan, request=replace(plan.request, echo=True))
    return Generation(
        plan, full_text, answer.details, answer.decoder_input_details, stream, listed, choice.grammar or {}, names
    )


def _names_for(answer: AnswerParameters, choice: ChoiceParameters, given: Mapping[str, Any]) -> dict[str, str]:
    """Return what fields of the job are called here: by the names of the parameters that have come to them."""
    names = {"prompt": "inputs"}
    if choice.truncate is not None:
        names["truncate_prompt_tokens"] = "truncate"
    if answer.top_n_tokens is not None and given.get("logprobs") is None:
        names["logprobs"] = "top_n_tokens"
    return names


class Generate:
    """The routes of the original and of text-generation-inference."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def original(self, request: Request) -> Response:
        """Answer `POST /`: with `[{"generated_text": "..."}]`, or a stream."""
        return await self._answer(request, listed=True)

    async def generate(self, request: Request) -> Response:
        """Answer `POST /generate`: with `{"generated_text": "..."}`."""
        return await self._answer(request)

    async def generate_stream(self, request: Request) -> Response:
        """Answer `POST /generate_stream`: with an event for each token."""
        return await self._answer(request, stream=True)

    async def _answer(self, request: Request, listed: bool = False, stream: bool = False) -> Response:
        body = await read_object(request, self._service.bounds.body_timeout, EXAMPLE)
        asked = _parse(body, listed, stream)
        if asked.stream:
            return EventStream(self._events(request, asked), lambda error: event(error_object(error, openai=False)))
        async with self._submit(request, asked) as waiting:
            (result,) = await waiting.results()
        best, *others = sorted((result, *result.alternatives), key=mean_logprob, reverse=True)
        answer: GeneratedBody = {"generated_text": asked.text(best)}
        if asked.details:
            answer["details"] = _answer_details(best, others, asked)
        elif best.logprobs is not None:
            answer["logprobs"] = logprobs_to_json(best.logprobs)
        return JSON([answer] if asked.listed else answer, headers={"x-job-id": waiting.jobs[0].id})

    @asynccontextmanager
    async def _events(
        self, request: Request, asked: Generation
    ) -> AsyncIterator[tuple[Mapping[str, str], AsyncIterator[bytes]]]:
        async with self._submit(request, asked) as waiting:
            yield {"x-job-id": waiting.jobs[0].id}, _token_events(waiting, asked)

    @asynccontextmanager
    async def _submit(self, request: Request, asked: Generation) -> AsyncIterator[PendingJobs]:
        """Enqueue the job and wait for it within the context, whose errors have this API's names."""
        try:
            async with self._service.submit(request, [asked.plan], asked.plan) as waiting:
                yield waiting
        except BadRequest as error:
            renamed = rename_fields(error, asked.names)
            if type(renamed) is BadRequest:
                renamed = BadRequest(name_as_given(str(renamed), "grammar", asked.grammar))
            raise renamed from None


async def _token_events(waiting: PendingJobs, asked: Generation) -> AsyncIterator[bytes]:
    """Yield an event for each token as soon as the next token, or the end, shows what it adds to the text."""
    text, tokens = "", list[TokenLogprob]()
    sent, appended = 0, AppendOnlyTexts()
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
            body = _token_event(number, tokens, result.text)
            if number == len(tokens) - 1:
                body["generated_text"] = asked.text(result)
                body["details"] = _summary(result, asked.plan.request.guided) if asked.details else None
            yield event(body)


def _token_event(number: int, tokens: list[TokenLogprob], text: str) -> TokenEvent:
    return {
        "index": number + 1,
        "token": _token(number, tokens, text),
        "top_tokens": [_bare(other) for other in tokens[number].top],
        "generated_text": None,
        "details": None,
    }


def _token(number: int, tokens: list[TokenLogprob], text: str) -> TokenBody:
    """Return a token with what it adds to the text: nothing, if it only begins a character."""
    body = _bare(tokens[number])
    if not body["special"]:
        end = tokens[number + 1].text_offset if number + 1 < len(tokens) else len(text)
        body["text"] = text[tokens[number].text_offset : end]
    return body


def _bare(token: TokenLogprob) -> TokenBody:
    return {"id": token.token_id, "text": token.token, "logprob": token.logprob, "special": _is_special(token)}


def _is_special(token: TokenLogprob) -> bool:
    return token.special or token.token == END_OF_TEXT


def _answer_details(best: GenerationResult, others: list[GenerationResult], asked: Generation) -> AnswerDetailsBody:
    """Return the details of the text that is given, and of those that it was the best of."""
    # The log probabilities of a prompt come with one of its texts.
    prompt = (
        next((text.prompt_logprobs for text in (best, *others) if text.prompt_logprobs), ()) if asked.prefill else ()
    )
    guided = asked.plan.request.guided
    details = cast(AnswerDetailsBody, _details(best, prompt, guided))
    if others:
        details["best_of_sequences"] = [
            {"generated_text": asked.text(text), **_details(text, prompt, guided)} for text in others
        ]
    return details


def _details(result: GenerationResult, prompt: Sequence[TokenLogprob] = (), guided: bool = False) -> DetailsBody:
    tokens = list(result.logprobs or ())
    return {
        **_summary(result, guided),
        "prefill": [{"id": entry.token_id, "text": entry.token, "logprob": entry.logprob} for entry in prompt],
        "tokens": [_token(number, tokens, result.text) for number in range(len(tokens))],
        "top_tokens": [[_bare(other) for other in entry.top] for entry in tokens],
    }


def _summary(result: GenerationResult, guided: bool) -> DetailsBody:
    summary: DetailsBody = {
        "finish_reason": _finish_reason(result, guided),
        "generated_tokens": result.usage.completion_tokens,
        "input_length": result.usage.prompt_tokens,
        "seed": result.seed,
    }
    if result.seed is not None and result.choice_index:
        summary["choice_index"] = result.choice_index
    return summary


def _finish_reason(result: GenerationResult, guided: bool) -> Literal["length", "eos_token", "stop_sequence"]:
    if result.finish_reason != "stop":
        return "length"
    if result.stop_reason is not None:
        return "stop_sequence"
    # The end of text is none of the reasons that a result names; but a worker of an earlier release may name none at
    # all. A text of a given form ends where nothing can follow, without a token.
    return "eos_token" if guided or (result.logprobs and _is_special(result.logprobs[-1])) else "stop_sequence"
