"""The messages that clients and workers exchange through Redis: a job, its result, and the pieces of its text.

JSON in, JSON out, versioned, and nothing is taken on trust. A job's text travels as the entries of a Redis stream, at
least once: a job that is started again begins its stream again, with the next attempt's number. The job's result in RQ
stays the authority; the stream's last entry says only that the result is there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, NotRequired, TypedDict

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
from fastgpt2.fields import check_fields, fields_of, number

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

# What other APIs call the means of choosing tokens at random, or of choosing among several texts.
_SAMPLING = frozenset(
    {
        "best_of", "beam_size", "do_sample", "frequency_penalty", "length_penalty", "logit_bias", "min_p", "n",
        "num_beams", "presence_penalty", "repetition_penalty", "seed", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The options that a job gives the worker rather than the model, checked when made.

    Args:
        timeout: seconds from being enqueued within which the job must be done; waiting counts. RQ's own `job_timeout`
            counts from the start. A job whose time is up fails, and its metadata keep what was generated.
        stream: publish the text as it comes, as pieces in a Redis stream.

    Raises:
        BadRequest: a field has a wrong type or is out of bounds.
    """

    timeout: Annotated[float, number(0, MAX_TIMEOUT_SECONDS, "seconds")] | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def parse_job(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[GenerationRequest, JobOptions]:
    """Read a job's arguments: the prompt first or by name, everything else by name.

    Raises:
        BadRequest: a field is unknown, missing, of a wrong type or out of bounds; the message names the field.
    """
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise BadRequest("the job's arguments are not a list and a mapping")
    if len(args) > 1:
        raise BadRequest(f"{len(args)} positional arguments; only the prompt may be given so, name the others")
    given = dict(kwargs)
    if args:
        if "prompt" in given:
            raise BadRequest("prompt is given twice, by position and by name")
        given["prompt"] = args[0]
    if "prompt" not in given:
        raise BadRequest("prompt is missing")
    of_job = fields_of(JobOptions)
    refuse_unknown(given, (*fields_of(GenerationRequest), *of_job))
    options = {name: given.pop(name) for name in of_job if name in given}
    return GenerationRequest(**given), JobOptions(**options)


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise BadRequest if a field is not known, with the reason if it is about sampling."""
    for name in given:
        if name in known:
            continue
        if name in _SAMPLING:
            raise BadRequest(
                f"{name} is refused: fastgpt2 decodes greedily, always taking the likeliest token, so there is nothing "
                "to sample or to choose from; leave it out"
            )
        raise BadRequest(f"unknown field {str(name)[:100]!r}; known are {', '.join(known)}")


def job_to_kwargs(request: GenerationRequest, options: JobOptions) -> dict[str, Any]:
    """Return the keyword arguments of the task: the prompt, and what differs from the defaults."""
    kwargs: dict[str, Any] = {}
    for record in (request, options):
        for field in fields(record):
            value = getattr(record, field.name)
            if field.name == "prompt" or value != field.default:
                kwargs[field.name] = list(value) if isinstance(value, tuple) else value
    return kwargs


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


class ResultObject(TypedDict):
    """The JSON form of a result."""

    version: Count
    text: str
    token_ids: list[Count]
    finish_reason: FinishReason
    usage: Annotated[dict[str, Any], Usage]
    timings: Annotated[dict[str, Any], Timings]
    model: str
    drafting: Annotated[dict[str, Any], Drafting]
    logprobs: NotRequired[list[TokenObject]]
    prompt_logprobs: NotRequired[list[TokenObject]]
    stop_reason: NotRequired[StopReason]


def result_to_json(result: GenerationResult, queue_seconds: float = 0.0) -> dict[str, Any]:
    """Return the JSON form of a result, with its version and the time that only the queue's side knows."""
    value: ResultObject = {
        "version": RESULT_VERSION,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "timings": asdict(replace(result.timings, queue_seconds=queue_seconds)),
        "model": result.model,
        "drafting": asdict(result.drafting),
    }
    if result.logprobs is not None:
        value["logprobs"] = logprobs_to_json(result.logprobs)
    if result.prompt_logprobs is not None:
        value["prompt_logprobs"] = logprobs_to_json(result.prompt_logprobs)
    if result.stop_reason is not None:
        value["stop_reason"] = result.stop_reason
    return dict(value)


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


def _require(kind: Any, value: object) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in log probabilities")
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
        logprobs, prompt_logprobs = (
            None if value.get(name) is None else logprobs_from_json(value[name])
            for name in ("logprobs", "prompt_logprobs")
        )
        return GenerationResult(
            text=value["text"],
            token_ids=tuple(value["token_ids"]),
            finish_reason=value["finish_reason"],
            usage=Usage(**_known_fields(Usage, value["usage"])),
            timings=Timings(**value["timings"]),
            model=value["model"],
            drafting=_drafting_from_json(value),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_reason=_stop_reason_from_json(value.get("stop_reason")),
        )
    except (AttributeError, KeyError, TypeError) as reason:
        raise FastGPT2Error(f"a damaged result: {reason}") from None


def _stop_reason_from_json(value: object) -> StopReason | None:
    if value is not None and (not isinstance(value, int | str) or isinstance(value, bool)):
        raise TypeError(f"{type(value).__name__} as the reason of a stop")
    return value


def _known_fields(record: Any, value: Any) -> dict[str, Any]:
    """Return the fields that this release knows; a later release may add some."""
    return {field.name: value[field.name] for field in fields(record) if field.name in value}


def _drafting_from_json(result: Mapping[str, Any]) -> Drafting:
    """Read how the guesses fared. An earlier release, which says nothing of them, made none: it took a step a token."""
    if "drafting" not in result:
        return Drafting(steps=max(0, len(result["token_ids"]) - 1))
    return Drafting(**_known_fields(Drafting, result["drafting"]))


def describe_result(result: Mapping[str, Any]) -> str:
    """Return a line of the log for a result: counts and times, no text."""
    usage, timings, drafting = result["usage"], result["timings"], result["drafting"]
    cached = f" ({usage['cached_tokens']} cached)" if usage["cached_tokens"] else ""
    steps = f"{drafting['steps']} steps, {drafting['accepted']} of {drafting['drafted']} guesses came true; "
    return (
        f"{usage['prompt_tokens']}{cached} + {usage['completion_tokens']} tokens, {result['finish_reason']}; "
        f"{steps if drafting['drafted'] else ''}"
        f"queue {timings['queue_seconds'] * 1e3:.1f} ms, prefill {timings['prefill_seconds'] * 1e3:.1f} ms, "
        f"decode {timings['decode_seconds'] * 1e3:.1f} ms"
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a job: whole characters, which no stop string can take back any more.

    Attributes:
        text: the next characters.
        at: how many characters of the result's text come before it. Less than what you hold only if the job was started
            again elsewhere and came out otherwise: then cut your text there first.
        attempt: how often the job had been started when this text was generated, from 1.
        logprobs: of a job that asked for them, those of the next tokens, as far as these begin within the text so far.
        token_at: how many of the result's `logprobs` come before these. Less than what you hold in the same case as
            `at`.
    """

    text: str
    at: int
    attempt: int
    logprobs: tuple[TokenLogprob, ...] = ()
    token_at: int = 0

    def __str__(self) -> str:
        return self.text


def piece_to_entry(piece: Piece) -> Entry:
    """Return the fields of a piece's stream entry."""
    entry: Entry = {"attempt": piece.attempt, "at": piece.at, "text": piece.text}
    if piece.logprobs:
        entry.update(token_at=piece.token_at, logprobs=json.dumps(logprobs_to_json(piece.logprobs)))
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
    if b"logprobs" not in entry:
        return Piece(text, at, attempt)
    return Piece(text, at, attempt, _logprobs(entry[b"logprobs"]), _count(entry[b"token_at"]))


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
