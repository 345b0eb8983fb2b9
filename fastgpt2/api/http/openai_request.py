"""What the bodies of OpenAI's two routes of texts have in common: OpenAI's fields, vLLM's, and this package's own.

Sources: OpenAI's API reference, "Create completion" (the legacy one) and "Create chat completion", and vLLM's
`CompletionRequest` and `ChatCompletionRequest`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastgpt2.api.client.enqueue import JobPlan
from fastgpt2.api.http import guides
from fastgpt2.api.http.field_names import rename_fields
from fastgpt2.api.http.guides import Guide
from fastgpt2.api.http.responses import BadField
from fastgpt2.engine.decoding.options import Seed, Temperature, TextOptions, Texts
from fastgpt2.engine.decoding.records import GenerationRequest, KeptTokens, NewTokens, StopStrings, StopTokenIds
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import Field, check_fields, described, fields_of, flag, only, optional, text
from fastgpt2.foreign_fields import SHOWN_CHARACTERS, find_unknown, sentence_for, take_known
from fastgpt2.protocol.keys import MAX_MODEL_CHARACTERS, PriorityField

# An hour is enough: the answer goes out at once.
RESULT_TTL_SECONDS = 3600

# Other APIs' fields that say which form a text is to have.
_THEIR_GUIDES = (
    "response_format", "structured_outputs", "guided_choice", "guided_regex", "guided_json", "guided_json_object",
)  # fmt: skip

_NO_BEAMS = "must be {} or left out: there is no beam search; n and best_of draw several texts"
_GUIDE = "The text has this form."


def _check_stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise BadRequest(f'{name} must be an object, {{"include_usage": true}}, not {described(value)}')
    if (unknown := find_unknown(value, _STREAM_FLAGS)) is not None:
        raise BadRequest(f"{name} has an unknown part {unknown[:100]!r}; known are {', '.join(_STREAM_FLAGS)}")
    return {key: flag().check(f"{name}.{key}", part) for key, part in take_known(value, _STREAM_FLAGS).items()}


# There is nothing to obfuscate.
_STREAM_FLAGS = dict.fromkeys(
    ("include_usage", "continuous_usage_stats", "include_obfuscation"), optional(flag()).schema
)
_STREAM_OPTIONS = Field(
    {"type": "object", "properties": _STREAM_FLAGS, "additionalProperties": False}, _check_stream_options
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIRequest(TextOptions):
    """The fields that a body of either route has, checked when made.

    Raises:
        BadRequest: a field has a wrong type, is out of bounds, or asks for what there is not.
    """

    model: Annotated[str, text(1, MAX_MODEL_CHARACTERS)] | None = None
    stop: StopStrings = ()
    stream: bool = False
    stream_options: Annotated[dict[str, bool], _STREAM_OPTIONS, "With `stream` only."] | None = None
    temperature: Annotated[Temperature, "0, the default, takes the likeliest token always."] | None = None
    n: Annotated[Texts, "How many texts of each prompt are given."] = 1
    best_of: Annotated[Texts, "How many are generated, of which the best n are given. Not with `stream`."] | None = None
    seed: Annotated[Seed, "Each choice of a text that was drawn tells its seed."] | None = None
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

    @property
    def wanted_model(self) -> str | None:
        """Return the name of the model that is asked for; None for any.

        huggingface.js, which is told an endpoint's address and no model, sends the address as the model.
        """
        is_address = self.model is not None and self.model.startswith(("http://", "https://"))
        return None if is_address else self.model

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

    def job_fields(self, streams: bool, **own: Any) -> dict[str, Any]:
        """Return the fields of a job that this body has, by a job's names.

        Args:
            streams: the job's text is read as it comes.
            own: the fields that have other names or meanings here, as a job has them.
        """
        alike = [name for name in fields_of(GenerationRequest) if name not in guides.OUR_GUIDES and hasattr(self, name)]
        return {
            **{name: getattr(self, name) for name in alike if name != "prompt"},
            **self.guide()[1],
            "min_new_tokens": self.min_tokens,
            "stream": streams,
            "stream_usage": streams and self.continues_usage,
            "result_ttl": RESULT_TTL_SECONDS,
            "priority": self.priority,
            "model": self.wanted_model,
            **own,
        }


def take_fields(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the fields of a body that ask for something; null stands for a default.

    Raises:
        BadField: a field is unknown.
    """
    if (unknown := find_unknown(body, known)) is not None:
        raise BadField(unknown[:SHOWN_CHARACTERS], sentence_for(unknown, sorted(known)))
    return take_known(body, known)


def without_model(plans: Sequence[JobPlan]) -> list[JobPlan]:
    """Return the plans of the same jobs, which name no model."""
    return [replace(plan, options=replace(plan.options, model=None)) for plan in plans]


def in_order(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the fields that were given in one order."""
    return sorted(given.items(), key=lambda pair: pair[0])


def translate(
    error: FastGPT2Error, names: Mapping[str, str], known: Collection[str], request: OpenAIRequest | None
) -> FastGPT2Error:
    """Return the error with our fields by the names of this API, and the field that it begins with as its `param`.

    Args:
        names: what fields of a job are called here, where that is otherwise.
        known: the fields of the body.
        request: has the name by which a form was asked for that cannot be.
    """
    if not isinstance(error, BadRequest):
        return error
    renamed = rename_fields(error, names)
    if type(renamed) is not BadRequest:
        return renamed
    message = str(renamed) if request is None else guides.name_as_given(str(renamed), *request.guide())
    word = re.split(r"\W", message, maxsplit=1)[0]
    return BadField(word, message) if word in known else BadRequest(message)
