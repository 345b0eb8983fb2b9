"""The body of `POST /v1/completions`: OpenAI's fields, vLLM's, and this package's own; and the jobs that it asks for.

Source: OpenAI's API reference, "Create completion" (the legacy one), and vLLM's `CompletionRequest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.http.openai_request import OpenAIRequest, in_order, take_fields, translate
from fastgpt2.engine.decoding.records import TOKEN_IDS_SCHEMA, Logprobs, NewTokens
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import Field, fields_of, only, refusal
from fastgpt2.foreign_fields import OPENAI_NAMES
from fastgpt2.plurals import counted

# OpenAI's own.
DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256

# Over all prompts of a request: their texts, with log probabilities of each token, are in memory at once.
MAX_TEXTS_OF_A_REQUEST = 1024

_NO_SUFFIX = only("", "must be empty or left out: GPT-2 continues texts, it fills none in")


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


_TEXT = {"type": "string"}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
_IDS = {**TOKEN_IDS_SCHEMA, "minItems": 1}
_PROMPT_KINDS = [_TEXT, {**_SEVERAL, "items": _TEXT}, _IDS, {**_SEVERAL, "items": TOKEN_IDS_SCHEMA}]
_PROMPTS = Field({"anyOf": _PROMPT_KINDS}, _check_prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(OpenAIRequest):
    """The body of a request, checked when made.

    Raises:
        BadRequest: a field has a wrong type, is out of bounds, or asks for what there is not.
    """

    prompt: Annotated[list[str | list[int]], _PROMPTS] = field(default_factory=lambda: [""])
    max_tokens: Annotated[NewTokens, f"{DEFAULT_MAX_TOKENS} by default."] = DEFAULT_MAX_TOKENS
    echo: bool = False
    logprobs: Annotated[Logprobs, "With `echo`, of the prompt's tokens too."] | None = None
    suffix: Annotated[str, _NO_SUFFIX, "GPT-2 fills no texts in."] = ""

    def __post_init__(self) -> None:
        OpenAIRequest.__post_init__(self)
        if len(self.prompt) * self.texts > MAX_TEXTS_OF_A_REQUEST:
            raise BadRequest(
                f"prompt holds {counted(len(self.prompt), 'prompt')}, for {counted(self.texts, 'text')} each; the "
                f"limit is {MAX_TEXTS_OF_A_REQUEST} texts a request: send more requests"
            )

    @property
    def prompt_logprobs(self) -> int | None:
        """Return how many likeliest tokens are asked for at each of the prompt's tokens."""
        return self.logprobs if self.echo else None

    def plans(self) -> list[JobPlan]:
        """Return a plan of a job for each prompt.

        Raises:
            BadRequest: a prompt, or what is asked of it, cannot be; the message has the names of a job's fields.
        """
        # The log probabilities of a prompt come with the result only, and they must come first.
        streams = self.stream and self.prompt_logprobs is None
        fields = self.job_fields(streams, max_new_tokens=self.max_tokens)
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
    given = take_fields(body, fields_of(CompletionRequest))
    try:
        request = CompletionRequest(**given)
        return Completion(request, request.plans(), in_order(given))
    except BadRequest as error:
        raise translate_error(error) from None


def translate_error(error: FastGPT2Error, request: CompletionRequest | None = None) -> FastGPT2Error:
    """Return the error with our fields by the names of this API; see `translate`."""
    return translate(error, OPENAI_NAMES, fields_of(CompletionRequest), request)
