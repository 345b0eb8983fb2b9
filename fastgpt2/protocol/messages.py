"""The messages that clients and workers exchange through Redis: a job, its result, and the pieces of its text.

JSON in, JSON out, versioned, and nothing is taken on trust. A job's text travels as the entries of a Redis stream, at
least once: a job that is started again begins its stream again, with the next attempt's number. The job's result in RQ
stays the authority; the stream's last entry says only that the result is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Annotated, Any, NotRequired, Self, TypedDict

from fastgpt2.engine.decoding.records import (
    Count,
    Drafting,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    StopReason,
    Timings,
    TokenLogprob,
    Usage,
)
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import Field, check_fields, fields_of, number
from fastgpt2.foreign_fields import take_known
from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import ModelName

# The one function that a queue may name.
TASK = "fastgpt2.worker.tasks.generate"
RESULT_VERSION = 1
MAX_TIMEOUT_SECONDS = 10.0**8

# A stream's life after its job has ended. While the job runs, its stream lives as long as the job is heard of.
STREAM_TTL_SECONDS = 3600
RUNNING_TTL_SECONDS = 24 * 3600

# In one entry: 500 tokens with the 20 likeliest of each. What is longer is left to the result.
MAX_LOGPROBS_BYTES = 1 << 20

# The fields of a stream's entry. The redis library's own type of them is not worth spelling.
Entry = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The options that a job gives the worker rather than the model, checked when made.

    Args:
        timeout: seconds from being enqueued within which the job must be done; waiting counts. RQ's own `job_timeout`
            counts from the start. A job whose time is up fails, and its metadata keep what was generated.
        stream: publish the text as it comes, as pieces in a Redis stream.
        stream_usage: each of these pieces tells how many tokens there are so far.
        model: the name of the model that the job is for; without it, the pool's first model has the job.

    Raises:
        BadRequest: a field has a wrong type or is out of bounds.
        ModelUnknown: no model can have such a name.
    """

    timeout: Annotated[float, number(0, MAX_TIMEOUT_SECONDS, "seconds")] | None = None
    stream: bool = False
    stream_usage: bool = False
    model: ModelName | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def parse_job(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[GenerationRequest, JobOptions]:
    """Read a job's arguments: the prompt first or by name, everything else by name, also messages in a prompt's place.

    Raises:
        BadRequest: a field is unknown, missing, of a wrong type or out of bounds; the message names the field.
    """
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise BadRequest("the job's arguments are not a list and a mapping")
    if len(args) > 1:
        raise BadRequest(f"{len(args)} positional arguments; only the prompt may be given so, name the others")
    given = take_known(kwargs, job_fields())
    if args:
        if "prompt" in kwargs:
            raise BadRequest("prompt is given twice, by position and by name")
        given["prompt"] = args[0]
    elif "messages" not in given:
        if "prompt" not in kwargs:
            raise BadRequest("prompt is missing")
        given["prompt"] = kwargs["prompt"]
    options = {name: given.pop(name) for name in fields_of(JobOptions) if name in given}
    request, of_worker = GenerationRequest(**given), JobOptions(**options)
    refuse_unstreamable(request, of_worker)
    return request, of_worker


@cache
def job_fields() -> dict[str, Field]:
    """Return the fields that a job's arguments may have, by their names."""
    return {**fields_of(GenerationRequest), **fields_of(JobOptions)}


def refuse_unstreamable(request: GenerationRequest, options: JobOptions) -> None:
    """Raise BadRequest if the text is to be streamed, and only its end tells which of several texts it is."""
    if options.stream and request.ranked:
        raise BadRequest(
            f"stream is refused beside a best_of of {request.best_of} and an n of {request.n}: which texts are the "
            "best is known only when all have ended; leave out one of them"
        )


def job_to_kwargs(request: GenerationRequest, options: JobOptions) -> dict[str, Any]:
    """Return the keyword arguments of the task, as JSON has them: the prompt, or a chat, and what is no default."""
    kwargs: dict[str, Any] = {}
    for record in (request, options):
        for field in fields(record):
            value = getattr(record, field.name)
            if value != field.default or (field.name == "prompt" and request.messages is None):
                kwargs[field.name] = _plain(value)
    return kwargs


def _plain(value: Any) -> Any:
    """Return a field's value as JSON reads it again: tuples as lists, and the keys of an object as strings."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


class AlternativeObject(TypedDict):
    """The JSON form of a likeliest token. Its log probability is never null: a prompt's first token has no others."""

    token_id: Count
    token: str
    logprob: Annotated[float | None, number()]
    special: NotRequired[bool]


class TokenObject(TypedDict):
    """The JSON form of a token's log probability."""

    token_id: Count
    token: str
    logprob: float | None
    text_offset: NotRequired[Count]
    top: NotRequired[list[AlternativeObject]]
    special: NotRequired[bool]


class TextObject(TypedDict):
    """The JSON form of one text of a result."""

    text: str
    token_ids: list[Count]
    finish_reason: FinishReason
    usage: Annotated[dict[str, Any], Usage]
    timings: Annotated[dict[str, Any], Timings]
    drafting: Annotated[dict[str, Any], Drafting]
    logprobs: NotRequired[list[TokenObject]]
    prompt_logprobs: NotRequired[list[TokenObject]]
    stop_reason: NotRequired[StopReason]
    seed: NotRequired[Annotated[int, "The seed of a text that was drawn."]]
    choice_index: NotRequired[Annotated[Count, "The text's index, if it is not 0."]]
    cumulative_logprob: NotRequired[float]


class ResultObject(TextObject):
    """The JSON form of a result: its first text, and beside it the others, if there are any."""

    version: Count
    model: str
    alternatives: NotRequired[list[TextObject]]


def result_to_json(result: GenerationResult, queue_seconds: float = 0.0) -> dict[str, Any]:
    """Return the JSON form of a result, with its version and the time that only the queue's side knows."""
    first: dict[str, Any] = {**_text_to_json(result, queue_seconds)}
    others = [_text_to_json(other, queue_seconds) for other in result.alternatives]
    value = {"version": RESULT_VERSION, **first, "model": result.model}
    return {**value, "alternatives": others} if others else value


def _text_to_json(result: GenerationResult, queue_seconds: float) -> TextObject:
    value: TextObject = {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "timings": asdict(replace(result.timings, queue_seconds=queue_seconds)),
        "drafting": asdict(result.drafting),
    }
    if result.logprobs is not None:
        value["logprobs"] = logprobs_to_json(result.logprobs)
    if result.prompt_logprobs is not None:
        value["prompt_logprobs"] = logprobs_to_json(result.prompt_logprobs)
    if result.stop_reason is not None:
        value["stop_reason"] = result.stop_reason
    if result.seed is not None:
        value["seed"] = result.seed
    if result.choice_index:
        value["choice_index"] = result.choice_index
    if result.cumulative_logprob is not None:
        value["cumulative_logprob"] = result.cumulative_logprob
    return value


def logprobs_to_json(logprobs: Iterable[TokenLogprob]) -> list[TokenObject]:
    """Return the JSON forms of tokens' log probabilities, each with `top` if it has alternatives."""
    values = []
    for token in logprobs:
        value: TokenObject = {
            "token_id": token.token_id,
            "token": token.token,
            "logprob": token.logprob,
            "text_offset": token.text_offset,
        }
        if token.top:
            value["top"] = [_alternative_to_json(other) for other in token.top]
        if token.special:
            value["special"] = True
        values.append(value)
    return values


def _alternative_to_json(token: TokenLogprob) -> AlternativeObject:
    value: AlternativeObject = {"token_id": token.token_id, "token": token.token, "logprob": token.logprob}
    if token.special:
        value["special"] = True
    return value


def logprobs_from_json(values: object) -> tuple[TokenLogprob, ...]:
    """Read what `logprobs_to_json` made, here or in an earlier release, which gave no `text_offset` or no `special`.

    Raises:
        KeyError, TypeError: it is something else.
    """
    tokens = []
    for value in _require(list, values):
        token = _alternative_from_json(value)
        top = tuple([_alternative_from_json(other) for other in _require(list, value.get("top", []))])
        offset = _require(int, value.get("text_offset", 0))
        tokens.append(replace(token, top=top, text_offset=offset))
    return tuple(tokens)


def _alternative_from_json(value: object) -> TokenLogprob:
    found = _require(dict, value)
    logprob = found["logprob"]
    if logprob is not None:
        _require(int | float, logprob)
    special = found.get("special", False)
    if not isinstance(special, bool):
        raise TypeError(f"{type(special).__name__} in log probabilities")
    return TokenLogprob(_require(int, found["token_id"]), _require(str, found["token"]), logprob, special=special)


def _require(kind: Any, value: object, where: str = "in log probabilities") -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} {where}")
    return value


def result_from_json(value: object) -> GenerationResult:
    """Read the result that a JSON object holds.

    Raises:
        FastGPT2Error: the object holds no result, or one of a version that this release does not know.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(value, dict) or version != RESULT_VERSION:
        raise FastGPT2Error(f"not a result that this release can read (version {version!r}, wanted {RESULT_VERSION})")
    try:
        others = _require(list, value.get("alternatives", []), "as the alternatives")
        first = _text_from_json(value, value["model"])
        alternatives = [_text_from_json(_require(dict, other, "as an alternative"), first.model) for other in others]
        return replace(first, alternatives=tuple(alternatives)) if alternatives else first
    except (AttributeError, KeyError, TypeError) as reason:
        raise FastGPT2Error(f"a damaged result: {reason}") from None


def _text_from_json(value: Mapping[str, Any], model: str) -> GenerationResult:
    """Read one text of a result. Other texts within it are passed over: these are the result's alone."""
    logprobs, prompt_logprobs = (
        None if value.get(name) is None else logprobs_from_json(value[name]) for name in ("logprobs", "prompt_logprobs")
    )
    return GenerationResult(
        text=_require(str, value["text"], "as the text"),
        token_ids=tuple([_require(int, token_id, "as a token id") for token_id in value["token_ids"]]),
        finish_reason=value["finish_reason"],
        usage=Usage(**_known_fields(Usage, value["usage"])),
        timings=Timings(**value["timings"]),
        model=model,
        drafting=_drafting_from_json(value),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_reason=_optional(int | str, value, "stop_reason"),
        seed=_optional(int, value, "seed"),
        choice_index=_optional(int, value, "choice_index") or 0,
        cumulative_logprob=_optional(int | float, value, "cumulative_logprob"),
    )


def _optional(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    """Return a field that an earlier release does not write, or that is left out where it says nothing."""
    found = value.get(name)
    return None if found is None else _require(kind, found, f"as {name}")


def _known_fields(record: Any, value: Any) -> dict[str, Any]:
    """Return the fields that this release knows; a later release may add some."""
    return {field.name: value[field.name] for field in fields(record) if field.name in value}


def _drafting_from_json(result: Mapping[str, Any]) -> Drafting:
    """Read how the guesses fared. An earlier release, which says nothing of them, made none: it took a step a token."""
    if "drafting" not in result:
        return Drafting(steps=max(0, len(result["token_ids"]) - 1))
    return Drafting(**_known_fields(Drafting, result["drafting"]))


def figures_of_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an event of the log for a result: counts and times, no text; see `describe_result`."""
    timings = {name: round(seconds, 6) for name, seconds in result["timings"].items()}
    tokens = sum(text["usage"]["completion_tokens"] for text in (result, *result.get("alternatives", ())))
    return {
        "prompt_tokens": result["usage"]["prompt_tokens"],
        "cached_tokens": result["usage"]["cached_tokens"],
        "completion_tokens": tokens,
        "finish_reason": result["finish_reason"],
        **timings,
    }


def describe_result(result: Mapping[str, Any]) -> str:
    """Return a line of the log for a result: counts and times, and its seed, no text.

    Of several texts, the tokens are those of all of them, and the rest is the first one's.
    """
    usage, timings, drafting = result["usage"], result["timings"], result["drafting"]
    others = result.get("alternatives", ())
    texts = f" in {1 + len(others)} texts" if others else ""
    tokens = usage["completion_tokens"] + sum(other["usage"]["completion_tokens"] for other in others)
    seed = f"seed {result['seed']}; " if "seed" in result else ""
    cached = f" ({usage['cached_tokens']} cached)" if usage["cached_tokens"] else ""
    guesses = f"{drafting['accepted']} of {counted(drafting['drafted'], 'guess', 'guesses')} came true"
    steps = f"{counted(drafting['steps'], 'step')}, {guesses}; "
    return (
        f"{usage['prompt_tokens']}{cached} + {tokens} tokens{texts}, {result['finish_reason']}; {seed}"
        f"{steps if drafting['drafted'] else ''}"
        f"queue {timings['queue_seconds'] * 1e3:.1f} ms, prefill {timings['prefill_seconds'] * 1e3:.1f} ms, "
        f"decode {timings['decode_seconds'] * 1e3:.1f} ms"
    )


class Piece(str):
    """Some text of a job: whole characters, which no stop string can take back any more.

    A piece is a string, for all that takes one: it equals its text, and what string methods make of it are plain
    strings. The pieces of a job's several texts come mixed, those of one text in their order.

    Attributes:
        at: how many characters of the result's text come before it. Less than what you hold only if the job was started
            again elsewhere and came out otherwise: then cut your text there first.
        attempt: how often the job had been started when this text was generated, from 1.
        logprobs: of a job that asked for them, those of the next tokens, as far as these begin within the text so far.
        token_at: how many of the result's `logprobs` come before these. Less than what you hold in the same case as
            `at`.
        choice_index: the index of the text, if the job has several: what comes before is counted within that text.
        usage: of a job with `stream_usage`, the tokens of its prompt and of this text so far, among them those whose
            text is still held back. None with what comes at a text's end, which the result tells of.
    """

    __slots__ = ("at", "attempt", "choice_index", "logprobs", "token_at", "usage")

    at: int
    attempt: int
    logprobs: tuple[TokenLogprob, ...]
    token_at: int
    choice_index: int
    usage: Usage | None

    def __new__(
        cls,
        text: str,
        at: int,
        attempt: int,
        logprobs: tuple[TokenLogprob, ...] = (),
        token_at: int = 0,
        choice_index: int = 0,
        usage: Usage | None = None,
    ) -> Self:
        """Make a piece of the next characters, and of where they belong."""
        piece = super().__new__(cls, text)
        piece.at, piece.attempt, piece.choice_index = at, attempt, choice_index
        piece.logprobs, piece.token_at, piece.usage = logprobs, token_at, usage
        return piece

    @property
    def text(self) -> str:
        """Return the characters as a plain string."""
        return str(self)

    def __repr__(self) -> str:
        shown = [repr(str(self)), f"at={self.at}", f"attempt={self.attempt}"]
        if self.logprobs or self.token_at:
            shown += [f"logprobs={self.logprobs!r}", f"token_at={self.token_at}"]
        if self.choice_index:
            shown.append(f"choice_index={self.choice_index}")
        if self.usage is not None:
            shown.append(f"usage={self.usage!r}")
        return f"Piece({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        where = self.at, self.attempt, self.logprobs, self.token_at, self.choice_index, self.usage
        return type(self), (str(self), *where)


def piece_to_entry(piece: Piece) -> Entry:
    """Return the fields of a piece's stream entry."""
    entry: Entry = {"attempt": piece.attempt, "at": piece.at, "text": piece.text}
    if piece.logprobs:
        entry.update(token_at=piece.token_at, logprobs=json.dumps(logprobs_to_json(piece.logprobs)))
    if piece.choice_index:
        entry["choice_index"] = piece.choice_index
    if piece.usage is not None:
        entry.update(asdict(piece.usage))
    return entry


def end_entry(attempt: int) -> Entry:
    """Return the last entry of an attempt that came to its end: the job's result or failure has been written."""
    return {"attempt": attempt, "end": 1}


def entry_to_piece(entry: Mapping[bytes, bytes]) -> Piece | None:
    """Return the piece in an entry, or None if it is the last entry.

    Raises:
        ValueError, KeyError, TypeError: not an entry of such a stream.
    """
    if b"end" in entry:
        return None
    text, at, attempt = entry[b"text"].decode("utf-8"), _count(entry[b"at"]), int(entry[b"attempt"])
    index = _count(entry.get(b"choice_index", b"0"))
    usage = None
    if b"prompt_tokens" in entry:
        usage = Usage(*(_count(entry[name]) for name in (b"prompt_tokens", b"completion_tokens", b"cached_tokens")))
    if b"logprobs" not in entry:
        return Piece(text, at, attempt, choice_index=index, usage=usage)
    return Piece(text, at, attempt, _logprobs(entry[b"logprobs"]), _count(entry[b"token_at"]), index, usage)


def _count(data: bytes) -> int:
    value = int(data)
    if value < 0:
        raise ValueError(f"{value} is no number of what comes before")
    return value


def _logprobs(data: bytes) -> tuple[TokenLogprob, ...]:
    if len(data) > MAX_LOGPROBS_BYTES:
        raise ValueError(f"{len(data)} bytes of log probabilities; the limit is {MAX_LOGPROBS_BYTES}")
    try:
        return logprobs_from_json(json.loads(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None
