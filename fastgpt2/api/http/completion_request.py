"""The body of `POST /v1/completions`: OpenAI's fields, vLLM's, and this package's own; and the jobs that it asks for.

Source: OpenAI's API reference, "Create completion" (the legacy one), and vLLM's `CompletionRequest`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.http import guides
from fastgpt2.api.http.field_names import rename_fields
from fastgpt2.api.http.guides import Guide
from fastgpt2.api.http.responses import BadField
from fastgpt2.engine.decoding.options import Seed, Temperature, TextOptions, Texts
from fastgpt2.engine.decoding.records import (
    TOKEN_IDS_SCHEMA,
    GenerationRequest,
    KeptTokens,
    Logprobs,
    NewTokens,
    StopStrings,
    StopTokenIds,
)
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import Field, check_fields, described, fields_of, flag, only, optional, refusal, text
from fastgpt2.foreign_fields import OPENAI_NAMES, SHOWN_CHARACTERS, find_unknown, sentence_for, take_known
from fastgpt2.protocol.keys import MAX_MODEL_CHARACTERS, PriorityField

# OpenAI's own.
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256

# Over all prompts of a request: their texts, with log probabilities of each token, are in memory at once.
MAX_TEXTS_OF_A_REQUEST = 1024

# An hour is enough: the answer goes out at once.
RESULT_TTL_SECONDS = 3600

# Other APIs' fields that say which form a text is to have.
_THEIR_GUIDES = (
    "response_format", "structured_outputs", "guided_choice", "guided_regex", "guided_json", "guided_json_object",
)  # fmt: skip

_NO_SUFFIX = only("", "must be empty or left out: GPT-2 continues texts, it fills none in")
_NO_BEAMS = "must be {} or left out: there is no beam search; n and best_of draw several texts"
_GUIDE = "The text has this form."


def _check_prompts(name: str, value: Any) -> list[str | list[int]]:
    """Return the prompts, texts or lists of token ids, of which one may stand alone. Each is checked as a job's."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        kinds = "a string, a list of strings, a list of token ids, or a list of such lists"
        raise refusal(name, kinds, value, of_type=True)
    if not value:
        raise BadRequest(f"{name} is an empty list; leave it out to begin a new text")
    if not isinstance(value[0], str | list):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise BadRequest(f"{name} holds {len(value)} prompts; the limit is {MAX_PROMPTS} a request: send more requests")
    if not all(isinstance(prompt, type(value[0])) for prompt in value):
        raise BadRequest(f"{name}, a list, must hold prompts of one kind: strings, or lists of token ids")
    return value


def _check_stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise BadRequest(f'{name} must be an object, {{"include_usage": true}}, not {described(value)}')
    if (unknown := find_unknown(value, _STREAM_FLAGS)) is not None:
        raise BadRequest(f"{name} has an unknown part {unknown[:100]!r}; known are {', '.join(_STREAM_FLAGS)}")
    return {key: flag().check(f"{name}.{key}", part) for key, part in take_known(value, _STREAM_FLAGS).items()}


_TEXT = {"type": "string"}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
_IDS = {**TOKEN_IDS_SCHEMA, "minItems": 1}
_PROMPT_KINDS = [_TEXT, {**_SEVERAL, "items": _TEXT}, _IDS, {**_SEVERAL, "items": TOKEN_IDS_SCHEMA}]
# There is nothing to obfuscate.
_STREAM_FLAGS = dict.fromkeys(
    ("include_usage", "continuous_usage_stats", "include_obfuscation"), optional(flag()).schema
)

_PROMPTS = Field({"anyOf": _PROMPT_KINDS}, _check_prompts)
_STREAM_OPTIONS = Field(
    {"type": "object", "properties": _STREAM_FLAGS, "additionalProperties": False}, _check_stream_options
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(TextOptions):
    """The body of a request, checked when made: `TextOptions`, and OpenAI's, vLLM's and this package's other fields.

    Raises:
        BadRequest: a field has a wrong type, is out of bounds, or asks for what there is not.
    """

    model: Annotated[str, text(1, MAX_MODEL_CHARACTERS)] | None = None
    prompt: Annotated[list[str | list[int]], _PROMPTS] = field(default_factory=lambda: [""])
    max_tokens: Annotated[NewTokens, f"{DEFAULT_MAX_TOKENS} by default."] = DEFAULT_MAX_TOKENS
    stop: StopStrings = ()
    stream: bool = False
    stream_options: Annotated[dict[str, bool], _STREAM_OPTIONS, "With `stream` only."] | None = None
    echo: bool = False
    logprobs: Annotated[Logprobs, "With `echo`, of the prompt's tokens too."] | None = None
    temperature: Annotated[Temperature, "0, the default, takes the likeliest token always."] | None = None
    n: Annotated[Texts, "How many texts of each prompt are given."] = 1
    best_of: Annotated[Texts, "How many are generated, of which the best n are given. Not with `stream`."] | None = None
    seed: Annotated[Seed, "Each choice of a text that was drawn tells its seed."] | None = None
    suffix: Annotated[str, _NO_SUFFIX, "GPT-2 fills no texts in."] = ""
    user: str | None = None
    response_format: Annotated[Guide, guides.RESPONSE_FORMAT, _GUIDE] | None = None

    ignore_eos: bool = False
    min_tokens: NewTokens = 0
    stop_token_ids: StopTokenIds = ()
    truncate_prompt_tokens: Annotated[KeptTokens, "-1 keeps as many as fit."] | None = None
    structured_outputs: Annotated[Guide, guides.STRUCTURED_OUTPUTS, _GUIDE] | None = None
    guided_choice: Annotated[Guide, guides.GUIDED_CHOICE, _GUIDE] | None = None
    guided_regex: Annotated[Guide, guides.GUIDED_REGEX, _GUIDE] | None = None
    guided_json: Annotated[Guide, guides.GUIDED_JSON, _GUIDE] | None = None
    guided_json_object: Annotated[Guide, guides.GUIDED_JSON_OBJECT, _GUIDE] | None = None
    guided_grammar: Annotated[Guide, guides.NO_GRAMMAR] | None = None
    structural_tag: Annotated[Guide, guides.NO_GRAMMAR] | None = None
    guided_whitespace_pattern: Annotated[Guide, guides.NO_WHITESPACE_PATTERN] | None = None
    guided_decoding_backend: Annotated[Guide, guides.ANY_BACKEND] | None = None
    use_beam_search: Annotated[bool, only(False, _NO_BEAMS.format("false"))] = False
    length_penalty: Annotated[float, only(1, _NO_BEAMS.format("1"))] = 1

    priority: PriorityField = "normal"

    def __post_init__(self) -> None:
        check_fields(self)
        if any((self.stream_options or {}).values()) and not self.stream:
            raise BadRequest("stream_options goes with stream: true")
        if len(self.prompt) * self.texts > MAX_TEXTS_OF_A_REQUEST:
            raise BadRequest(
                f"prompt holds {len(self.prompt)} prompts, for {self.texts} texts each; the limit is "
                f"{MAX_TEXTS_OF_A_REQUEST} texts a request: send more requests"
            )

    @property
    def wanted_model(self) -> str | None:
        """Return the name of the model that is asked for; None for any.

        huggingface.js, which is told an endpoint's address and no model, sends the address as the model.
        """
        is_address = self.model is not None and self.model.startswith(("http://", "https://"))
        return None if is_address else self.model

    @property
    def prompt_logprobs(self) -> int | None:
        """Return how many likeliest tokens are asked for at each of the prompt's tokens."""
        return self.logprobs if self.echo else None

    @property
    def includes_usage(self) -> bool:
        """Tell whether a stream ends with the counts of tokens."""
        return (self.stream_options or {}).get("include_usage", False)

    @property
    def continues_usage(self) -> bool:
        """Tell whether each event of a stream has the counts so far; as in vLLM, only where its end has them too."""
        return self.includes_usage and (self.stream_options or {}).get("continuous_usage_stats", False)

    def guide(self) -> tuple[str, Guide]:
        """Return the field that says which form the text has, by whichever name, and the fields of a job it comes to.

        Raises:
            BadRequest: the form is given by two names.
        """
        ours: dict[str, Guide | None] = {
            name: {name: value} for name in guides.OUR_GUIDES if (value := getattr(self, name)) not in ((), None)
        }
        return guides.find_guide(ours | {name: getattr(self, name) for name in _THEIR_GUIDES})

    def plans(self) -> list[JobPlan]:
        """Return a plan of a job for each prompt.

        Raises:
            BadRequest: a prompt, or what is asked of it, cannot be; the message has the names of a job's fields.
        """
        known = fields_of(GenerationRequest).keys() - {"prompt", *guides.OUR_GUIDES}
        # The log probabilities of a prompt come with the result only, and they must come first.
        streams = self.stream and self.prompt_logprobs is None
        fields = {
            **{name: getattr(self, OPENAI_NAMES.get(name, name)) for name in known},
            **self.guide()[1],
            "stream": streams,
            "stream_usage": streams and self.continues_usage,
            "result_ttl": RESULT_TTL_SECONDS,
            "priority": self.priority,
            "model": self.wanted_model,
        }
        return [plan_job(prompt, fields) for prompt in self.prompt]


@dataclass(frozen=True, slots=True)
class Completion:
    """A request, checked, and what it comes to.

    Attributes:
        plans: a job for each prompt.
        asked: the fields that were given, in one order, to compare with another request.
    """

    request: CompletionRequest
    plans: list[JobPlan]
    asked: list[tuple[str, Any]]


def parse_completion(body: Mapping[str, Any]) -> Completion:
    """Read the body of a request; null stands for a default.

    Raises:
        BadRequest: a field is unknown, of a wrong type, out of bounds, or asks for what there is not.
    """
    known = fields_of(CompletionRequest)
    if (unknown := find_unknown(body, known)) is not None:
        raise BadField(unknown[:SHOWN_CHARACTERS], sentence_for(unknown, sorted(known)))
    given = take_known(body, known)
    try:
        request = CompletionRequest(**given)
        return Completion(request, request.plans(), sorted(given.items(), key=lambda pair: pair[0]))
    except BadRequest as error:
        raise translate_error(error) from None


def translate_error(error: FastGPT2Error, request: CompletionRequest | None = None) -> FastGPT2Error:
    """Return the error with our fields by the names of this API, and the field that it begins with as its `param`.

    Args:
        request: has the name by which a form was asked for that cannot be.
    """
    if not isinstance(error, BadRequest):
        return error
    renamed = rename_fields(error, OPENAI_NAMES)
    if type(renamed) is not BadRequest:
        return renamed
    message = str(renamed) if request is None else guides.name_as_given(str(renamed), *request.guide())
    word = re.split(r"\W", message, maxsplit=1)[0]
    return BadField(word, message) if word in fields_of(CompletionRequest) else BadRequest(message)
