"""A generation job as it travels through Redis: JSON in, JSON out, versioned, and nothing taken on trust."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastgpt2.engine.decoding.records import Drafting, GenerationRequest, GenerationResult, Timings, TokenLogprob, Usage
from fastgpt2.errors import BadRequest, FastGPT2Error

# The one function that a queue may name.
TASK = "fastgpt2.worker.tasks.generate"
RESULT_VERSION = 1

# From being enqueued or, with `job_timeout`, from the start.
MAX_TIMEOUT_SECONDS = 10.0**8


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job asks of the worker rather than of the model, checked when made.

    Args:
        timeout: seconds from being enqueued within which the job must be done; waiting counts. RQ's own `job_timeout`
            counts from the start. A job whose time is up fails, and its metadata keep what was generated.
        stream: publish the text as it comes; see `fastgpt2.protocol.messages`.

    Raises:
        BadRequest: a wrong type or a value out of bounds.
    """

    timeout: float | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.timeout is not None:
            if not isinstance(self.timeout, int | float) or isinstance(self.timeout, bool):
                raise BadRequest(f"timeout must be a number of seconds, not {type(self.timeout).__name__}")
            if not 0 < self.timeout <= MAX_TIMEOUT_SECONDS:  # nor NaN
                raise BadRequest(f"timeout must be more than 0 and at most {MAX_TIMEOUT_SECONDS:.0f} seconds")
        if not isinstance(self.stream, bool):
            raise BadRequest(f"stream must be true or false, not {type(self.stream).__name__}")


_REQUEST_FIELDS = tuple(field.name for field in fields(GenerationRequest))
_OPTION_FIELDS = tuple(field.name for field in fields(JobOptions))
_USAGE_FIELDS = tuple(field.name for field in fields(Usage))
_DRAFTING_FIELDS = tuple(field.name for field in fields(Drafting))

# What other APIs call the means of choosing tokens at random, or of choosing among several texts.
_SAMPLING = frozenset(
    {
        "best_of", "beam_size", "do_sample", "frequency_penalty", "length_penalty", "logit_bias", "min_p", "n",
        "num_beams", "presence_penalty", "repetition_penalty", "seed", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip


def parse_job(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[GenerationRequest, JobOptions]:
    """What a job's arguments spell: the prompt first or by name, everything else by name.

    Raises:
        BadRequest: a field is unknown, missing, ill-typed or out of bounds; the message names it.
    """
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise BadRequest("the job's arguments are not a list and a mapping")
    if len(args) > 1:
        raise BadRequest(f"{len(args)} positional arguments; only the prompt may be given so, name the others")
    options = dict(kwargs)
    if args:
        if "prompt" in options:
            raise BadRequest("prompt is given twice, by position and by name")
        options["prompt"] = args[0]
    if "prompt" not in options:
        raise BadRequest("prompt is missing")
    refuse_unknown(options, (*_REQUEST_FIELDS, *_OPTION_FIELDS))
    of_job = {name: options.pop(name) for name in _OPTION_FIELDS if name in options}
    return GenerationRequest(**options), JobOptions(**of_job)


def parse_request(args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationRequest:
    """`parse_job` where there is no job, so that its options are refused like any unknown field."""
    if isinstance(kwargs, dict):
        refuse_unknown(kwargs, _REQUEST_FIELDS)
    return parse_job(args, kwargs)[0]


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise BadRequest for the first option that is not known, by its name, with the reason if it is about sampling."""
    for name in options:
        if name in known:
            continue
        if name in _SAMPLING:
            raise BadRequest(
                f"{name} is refused: fastgpt2 decodes greedily, always taking the likeliest token, so there is nothing "
                "to sample or to choose from; leave it out"
            )
        raise BadRequest(f"unknown field {str(name)[:100]!r}; known are {', '.join(known)}")


def job_to_kwargs(request: GenerationRequest, options: JobOptions) -> dict[str, Any]:
    """The keyword arguments of the task: the prompt, and what differs from the defaults."""
    kwargs: dict[str, Any] = {}
    for record in (request, options):
        for field in fields(record):
            value = getattr(record, field.name)
            if field.name == "prompt" or value != field.default:
                kwargs[field.name] = list(value) if isinstance(value, tuple) else value
    return kwargs


def result_to_json(result: GenerationResult, queue_seconds: float = 0.0) -> dict[str, Any]:
    """A JSON object of a result, with its version and the time that only the queue's side knows."""
    timed = replace(result.timings, queue_seconds=queue_seconds)
    value: dict[str, Any] = {
        "version": RESULT_VERSION,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "timings": asdict(timed),
        "model": result.model,
        "drafting": asdict(result.drafting),
    }
    for name in ("logprobs", "prompt_logprobs"):
        logprobs = getattr(result, name)
        if logprobs is not None:
            value[name] = logprobs_to_json(logprobs)
    return value


def logprobs_to_json(logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """JSON objects of tokens' log probabilities, `top` where there are any."""
    return [_token_to_json(one) for one in logprobs]


def _token_to_json(one: TokenLogprob) -> dict[str, Any]:
    value = {**_alternative_to_json(one), "text_offset": one.text_offset}
    return {**value, "top": [_alternative_to_json(other) for other in one.top]} if one.top else value


def _alternative_to_json(one: TokenLogprob) -> dict[str, Any]:
    return {"token_id": one.token_id, "token": one.token, "logprob": one.logprob}


def logprobs_from_json(values: object) -> tuple[TokenLogprob, ...]:
    """What `logprobs_to_json` made, or an earlier release, which told no `text_offset`.

    Raises:
        KeyError, TypeError: it is something else.
    """
    return tuple([_token_from_json(value) for value in _checked(values, list)])


def _token_from_json(value: object) -> TokenLogprob:
    fields = _checked(value, dict)
    top = [_alternative_from_json(other) for other in _checked(fields.get("top", []), list)]
    one = _alternative_from_json(fields)
    return TokenLogprob(one.token_id, one.token, one.logprob, tuple(top), _checked(fields.get("text_offset", 0), int))


def _alternative_from_json(value: object) -> TokenLogprob:
    fields = _checked(value, dict)
    logprob = fields["logprob"]
    if logprob is not None:
        _checked(logprob, int | float)
    return TokenLogprob(_checked(fields["token_id"], int), _checked(fields["token"], str), logprob)


def _checked(value: object, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in log probabilities")
    return value


def result_from_json(value: object) -> GenerationResult:
    """The result that a JSON object holds.

    Raises:
        FastGPT2Error: it is none, or of a version that this release does not know.
    """
    if not isinstance(value, dict) or value.get("version") != RESULT_VERSION:
        version = value.get("version") if isinstance(value, dict) else None
        raise FastGPT2Error(f"not a result that this release can read (version {version!r}, wanted {RESULT_VERSION})")
    try:
        told = {
            name: logprobs_from_json(value[name])
            for name in ("logprobs", "prompt_logprobs")
            if value.get(name) is not None
        }
        return GenerationResult(
            text=value["text"],
            token_ids=tuple(value["token_ids"]),
            finish_reason=value["finish_reason"],
            usage=Usage(**{name: value["usage"][name] for name in _USAGE_FIELDS if name in value["usage"]}),
            timings=Timings(**value["timings"]),
            model=value["model"],
            drafting=_drafting_from_json(value),
            **told,
        )
    except (AttributeError, KeyError, TypeError) as reason:
        raise FastGPT2Error(f"a damaged result: {reason}") from None


def _drafting_from_json(result: Mapping[str, Any]) -> Drafting:
    """An earlier release, which told nothing of it, guessed nothing either: a step a token."""
    if "drafting" not in result:
        return Drafting(steps=max(0, len(result["token_ids"]) - 1))
    told = result["drafting"]
    return Drafting(**{name: told[name] for name in _DRAFTING_FIELDS if name in told})


def describe_result(result: Mapping[str, Any]) -> str:
    """A JSON result in a line of the log: counts and times, no text."""
    usage, timings, drafting = result["usage"], result["timings"], result["drafting"]
    cached = f" ({usage['cached_tokens']} cached)" if usage["cached_tokens"] else ""
    steps = f"{drafting['steps']} steps, {drafting['accepted']} of {drafting['drafted']} guesses came true; "
    return (
        f"{usage['prompt_tokens']}{cached} + {usage['completion_tokens']} tokens, {result['finish_reason']}; "
        f"{steps if drafting['drafted'] else ''}"
        f"queue {timings['queue_seconds'] * 1e3:.1f} ms, prefill {timings['prefill_seconds'] * 1e3:.1f} ms, "
        f"decode {timings['decode_seconds'] * 1e3:.1f} ms"
    )


# NOTE worker.stream: A job's text as it comes: the entries of its Redis stream, as the worker writes and clients read
# them.
#
# At least once: a job that is started again begins its stream again, with the next attempt's number. The job's result
# in RQ stays the authority; the stream's last entry says only that it is there.

# The fields of an entry; the redis library's own type of them is not worth spelling.
Entry = dict[Any, Any]

# For the time after the job has ended. While it runs, its stream lives as long as the job is heard of.
STREAM_TTL_SECONDS = 3600
RUNNING_TTL_SECONDS = 24 * 3600

# In one entry: 500 tokens with the 20 likeliest of each. What is longer is left to the result.
MAX_LOGPROBS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a job, whole characters only, which no stop string can take back any more.

    Attributes:
        text: the next characters.
        at: how many characters of the result's text come before it. Less than what you hold only if the job was started
            again elsewhere and came out otherwise: then cut your text there first.
        attempt: how often the job had been started when this was generated, from 1.
        logprobs: of a job that asked for them, those of the next tokens, as far as these begin within the text so far.
        token_at: how many of the result's `logprobs` come before them; less than what you hold as it is with `at`.
    """

    text: str
    at: int
    attempt: int
    logprobs: tuple[TokenLogprob, ...] = ()
    token_at: int = 0

    def __str__(self) -> str:
        return self.text


def piece_to_entry(piece: Piece) -> Entry:
    """The fields of a stream entry."""
    entry: Entry = {"attempt": piece.attempt, "at": piece.at, "text": piece.text}
    if piece.logprobs:
        entry.update(token_at=piece.token_at, logprobs=json.dumps(logprobs_to_json(piece.logprobs)))
    return entry


def end_entry(attempt: int) -> Entry:
    """The last entry of an attempt that came to its end: the job's result, or its failure, has been written."""
    return {"attempt": attempt, "end": 1}


def entry_to_piece(fields: Mapping[bytes, bytes]) -> Piece | None:
    """The piece in an entry; None for the last one.

    Raises:
        ValueError, KeyError, TypeError: not an entry of such a stream.
    """
    if b"end" in fields:
        return None
    text, at, attempt = fields[b"text"].decode("utf-8"), _number(fields[b"at"]), int(fields[b"attempt"])
    if b"logprobs" not in fields:
        return Piece(text, at, attempt)
    return Piece(text, at, attempt, _logprobs(fields[b"logprobs"]), _number(fields[b"token_at"]))


def _number(data: bytes) -> int:
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
