"""The records of a generation: what a caller asks, checked when made, and what comes back. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypedDict

from fastgpt2.engine.decoding.chat_options import CHAT_FIELDS, ChatOptions, is_messages
from fastgpt2.engine.decoding.options import check_token_ids, token_ids_field
from fastgpt2.errors import BadRequest, PromptTooLong
from fastgpt2.fields import Field, check_fields, described, is_listed, items_of, plain, refusal, whole
from fastgpt2.plurals import counted

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
DEFAULT_MAX_NEW_TOKENS = 20
MAX_PROMPT_BYTES = 1 << 20
MAX_PROMPT_TOKENS = 1 << 17
MAX_NEW_TOKENS = 1 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20

# Log probabilities of one place, in all texts of a prompt together: 8 texts with the 20 likeliest tokens of each place,
# or 128 with the chosen token's alone. A worker holds them all, and sends them in one result.
MAX_LOGPROBS_OF_TEXTS = 168

# The bits of a seed that nobody has given: JSON's numbers keep this many, also in JavaScript.
RANDOM_SEED_BITS = 53


def random_seed() -> int:
    """Return a seed that nobody has given."""
    return int.from_bytes(os.urandom(8)) >> (64 - RANDOM_SEED_BITS)


def _check_prompt(name: str, prompt: Any) -> str | tuple[int, ...]:
    if is_listed(prompt):
        if len(prompt) > MAX_PROMPT_TOKENS:
            raise PromptTooLong(f"{name} has {len(prompt)} tokens; the limit is {MAX_PROMPT_TOKENS}: shorten it")
        return check_token_ids(name, prompt)
    text = plain(prompt)
    if not isinstance(text, str):
        raise refusal(name, "a string or a list of token ids", prompt, of_type=True)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        character = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise BadRequest(f"{name} is not valid Unicode: {character}") from None
    if size > MAX_PROMPT_BYTES:
        raise PromptTooLong(f"{name} has {size} bytes; the limit is {MAX_PROMPT_BYTES}: shorten it")
    return text


def _check_stop(name: str, stop: Any) -> tuple[str, ...]:
    # One stop string is commonly given bare, and an empty one for none.
    given = plain(stop)
    if isinstance(given, str):
        given = (given,) if given else ()
    if not is_listed(given):
        raise refusal(name, "a string or a list of strings", stop, of_type=True)
    if len(given) > MAX_STOP_STRINGS:
        raise BadRequest(f"{name} holds {len(given)} strings; the limit is {MAX_STOP_STRINGS}")
    strings = tuple(map(plain, items_of(given)))
    for text in strings:
        if not isinstance(text, str):
            raise BadRequest(f"{name} must hold strings, not {described(text)}")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise BadRequest(f"a {name} string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}")
    return strings


def _check_kept_tokens(name: str, value: Any) -> Any:
    kept = _KEPT_TOKENS.check(name, value)
    if not kept:
        raise refusal(name, f"-1, for as many as fit, or between 1 and {MAX_PROMPT_TOKENS}", kept)
    return kept


_KEPT_TOKENS = whole(-1, MAX_PROMPT_TOKENS)
TOKEN_IDS_SCHEMA = token_ids_field(MAX_PROMPT_TOKENS).schema
_BARE_STOP_SCHEMA = {"type": "string", "maxLength": MAX_STOP_CHARACTERS}
_STOP_STRING_SCHEMA = {**_BARE_STOP_SCHEMA, "minLength": 1}
_STOP_STRINGS_SCHEMA = {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS}

Prompt = Annotated[str | tuple[int, ...], Field({"anyOf": [{"type": "string"}, TOKEN_IDS_SCHEMA]}, _check_prompt)]
StopStrings = Annotated[tuple[str, ...], Field({"anyOf": [_BARE_STOP_SCHEMA, _STOP_STRINGS_SCHEMA]}, _check_stop)]
StopTokenIds = Annotated[tuple[int, ...], token_ids_field(MAX_STOP_TOKEN_IDS)]
StopReason = Annotated[int | str, "The stop token, by its id, or the stop string that ended the text."]
Count = Annotated[int, whole(0)]
NewTokens = Annotated[int, whole(0, MAX_NEW_TOKENS)]
KeptTokens = Annotated[int, Field({**_KEPT_TOKENS.schema, "not": {"const": 0}}, _check_kept_tokens)]
Logprobs = Annotated[int, whole(0, MAX_LOGPROBS)]


_NEW_TOKENS_BY_DEFAULT = f"{DEFAULT_MAX_NEW_TOKENS} by default; in a chat, as many as there is room for."


@dataclass(frozen=True, slots=True)
class GenerationRequest(ChatOptions):
    """One prompt and how to continue it, checked when made; `TextOptions` has the options of how tokens are chosen.

    A chat has `messages` in place of a prompt; see `ChatOptions`.

    Args:
        prompt: the text to continue, or its token ids. An empty prompt starts from the model's beginning-of-text token.
        max_new_tokens: the most tokens to generate. None means 20, or `min_new_tokens` if that is more, or fewer where
            the model's positions leave less room; in a chat, as many as they leave room for. 0 generates nothing: the
            prompt may then fill all positions, and the model reads it only if the result tells of it.
        stop: generation ends before the first of these strings, and the text is cut there. One string may stand alone.
            A special token is no part of the text, but a string that names one, such as "<|im_end|>", stops at it.
        ignore_eos: go on past the end-of-text token.
        min_new_tokens: the number of tokens that come before the one with which an end-of-text token, a stop token or a
            stop string ends the text. Until then the likeliest other token is taken instead of an end-of-text token or
            a stop token, and a stop string is text like any other.
        logprobs: give each generated token's log probability, and those of this many likeliest tokens.
        prompt_logprobs: give the same for each of the prompt's tokens, given those before it.
        echo: the result's text begins with the prompt.
        stop_token_ids: generation ends with the first of these tokens, also with `ignore_eos`; the text leaves it out.
        truncate_prompt_tokens: of a longer prompt, read this many tokens, the last ones; -1 for as many as leave room
            for the new tokens. What the tokenizer puts before or behind every text stays, and counts. The result is
            that of a prompt of the tokens that were kept.

    Raises:
        BadRequest: a field has a wrong type or is out of bounds; the message names the field and the bound.
    """

    prompt: Prompt = ""
    max_new_tokens: Annotated[NewTokens | None, _NEW_TOKENS_BY_DEFAULT] = None
    stop: StopStrings = ()
    ignore_eos: bool = False
    min_new_tokens: NewTokens = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    echo: bool = False
    stop_token_ids: StopTokenIds = ()
    truncate_prompt_tokens: KeptTokens | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_chat()
        if self.messages is not None and len(self.prompt):
            raise BadRequest("prompt and messages are both given; a text continues one of them: leave one out")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise refusal("min_new_tokens", f"between 0 and {self.max_new_tokens}", self.min_new_tokens)
        if self.best_of is not None and self.best_of < self.n:
            raise BadRequest(
                f"best_of is {self.best_of} and n is {self.n}: raise best_of, which n may not exceed, or lower n"
            )
        told = self.texts * (1 + (self.logprobs or 0))
        if self.logprobs is not None and told > MAX_LOGPROBS_OF_TEXTS:
            raise BadRequest(
                f"logprobs is {self.logprobs} for {counted(self.texts, 'text')}, which makes {told} log probabilities "
                f"a place; the limit is {MAX_LOGPROBS_OF_TEXTS}: ask for fewer likeliest tokens, or for fewer texts"
            )
        guides = [name for name in ("choices", "regex", "json_schema") if getattr(self, name) not in ((), None)]
        if len(guides) > 1:
            raise BadRequest(f"{guides[0]} and {guides[1]} are both given; a text is guided by one: leave one out")

    def with_seed(self, seed: int) -> GenerationRequest:
        """Return the request with a seed if it needs one and has none."""
        return replace(self, seed=seed) if self.samples and self.seed is None else self

    def with_tokens(self, ids: Sequence[int]) -> GenerationRequest:
        """Return the request with the tokens that its prompt, or its chat, has come to as its prompt."""
        no_chat: dict[str, Any] = {
            field.name: field.default for field in fields(ChatOptions) if field.name in CHAT_FIELDS
        }
        return replace(self, prompt=tuple(ids), **no_chat)

    @property
    def given(self) -> Any:
        """Return the prompt as a caller gives it: a text, token ids, or a mapping with the messages of a chat."""
        return self.prompt if self.messages is None else {"messages": self.messages}

    def with_defaults(self, defaults: Mapping[str, Any]) -> GenerationRequest:
        """Return the request with the model's own options where it has none; its temperature is for `do_sample`."""
        given = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if not self.do_sample:
            given.pop("temperature", None)
        if not given:
            return self
        request = copy(self)
        for name, value in given.items():
            # Not `replace`: a model's files may ban more words than a request.
            object.__setattr__(request, name, value)
        return request

    def most_prompt_tokens(self, n_positions: int) -> int | None:
        """Return how many tokens of a longer prompt are read; None for all. The model has `n_positions`."""
        if self.truncate_prompt_tokens != -1:
            return self.truncate_prompt_tokens
        new_tokens = self.default_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return max(1, n_positions - new_tokens)

    @property
    def default_new_tokens(self) -> int:
        """Return the most tokens to generate where the request names none and the positions allow them."""
        return max(DEFAULT_MAX_NEW_TOKENS, self.min_new_tokens)

    @property
    def least_room(self) -> int:
        """Return how many positions the prompt must leave: 1 for a new token, 0 if no token is to be generated."""
        return 0 if self.max_new_tokens == 0 else 1

    def describe_positions(self, n_positions: int) -> str:
        """Return the positions that a prompt has to fit into, for messages."""
        described = f"the model's {n_positions} positions"
        return f"{described}, one of which a new token needs" if self.least_room else described

    def room(self, prompt_tokens: int, n_positions: int) -> int:
        """Return the most tokens to generate; raise PromptTooLong, which says by how much, if they do not fit.

        The prompt has `prompt_tokens`, the model `n_positions`.
        """
        left = n_positions - prompt_tokens
        if left < self.least_room:
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens}, over {self.describe_positions(n_positions)}: "
                f"shorten the prompt by at least {counted(self.least_room - left, 'token')}"
            )
        name, wanted = "max_new_tokens", self.max_new_tokens
        if wanted is None:
            name, wanted = "min_new_tokens", self.min_new_tokens
        if wanted > left:
            total = prompt_tokens + wanted
            excess = total - n_positions
            shorten = f", or shorten the prompt by {counted(excess, 'token')}" if excess < prompt_tokens else ""
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens} and {name} {wanted} make {total}, over the model's {n_positions} "
                f"positions: ask for at most {counted(left, 'new one')}{shorten}"
            )
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.messages is not None:
            return left
        return min(self.default_new_tokens, left)


class RequestFields(TypedDict, total=False):
    """The fields of a `GenerationRequest` as keyword arguments beside a prompt."""

    max_new_tokens: int | None
    stop: str | Iterable[str]
    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool | None
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]]
    documents: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any] | None
    ignore_eos: bool
    min_new_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    stop_token_ids: Sequence[int]
    truncate_prompt_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    seed: int | None
    n: int
    best_of: int | None
    choice_index: int
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str | Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    choices: Sequence[str]
    regex: str | None
    json_schema: Mapping[str, Any] | bool | str | None


def split_prompt(given: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the prompt of a mapping that holds one beside other fields, and these fields together with others.

    The prompt of a mapping with the messages of a chat is empty; the messages are among the fields.

    Args:
        fields: what holds where the mapping has no such field, or null.

    Raises:
        BadRequest: it holds no prompt.
    """
    has_messages = given.get("messages") is not None
    if "prompt" not in given and not has_messages:
        hint = '; for a chat of this one message, write {"messages": [message]}' if is_messages([given]) else ""
        raise BadRequest(f"prompt is missing in a mapping of a prompt and its fields{hint}")
    own = {name: value for name, value in given.items() if name != "prompt" and value is not None}
    prompt = given.get("prompt")
    return "" if prompt is None and has_messages else prompt, {**fields, **own}


def list_stops(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a request with a set or an iterator of stops, which one look uses up, as a tuple."""
    stop = fields.get("stop")
    if isinstance(stop, set | frozenset) or (isinstance(stop, Iterable) and not hasattr(stop, "__len__")):
        return {**fields, "stop": tuple(stop)}
    return fields


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, named as in OpenAI's API. Tokens are cached that another prompt began with."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Annotated[Count, "How many of the prompt's tokens were not computed."] = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Drafting:
    """The steps and guesses of the tokens after the first: steps + accepted = completion tokens - 1, if there are any.

    The first comes with the last step of the prompt. Guesses not accepted were wrong, or stood behind the end.
    """

    steps: Annotated[Count, "The steps that gave the tokens after the first."] = 0
    drafted: Annotated[Count, "The guesses that these steps verified."] = 0
    accepted: Annotated[Count, "The guesses that came true, each of which saved a step."] = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting in the queue, reading the prompt up to the first token, and generating all further tokens."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability: natural, and under the model's own distribution, as in OpenAI's API.

    That is the distribution before penalties, temperature and all else that a request does to it.

    Attributes:
        token: the token's text. Where its bytes are no whole characters, "bytes:" and their escapes, as in OpenAI's
            API; of a special token its name, such as "<|endoftext|>".
        logprob: None for the first token of a prompt, which nothing comes before.
        top: the likeliest tokens at this place, the likeliest first, as many as were asked for. They have neither `top`
            nor a `text_offset`.
        text_offset: where, in characters of the result's text, the character begins that this token's first byte
            belongs to. For a prompt's token, in the prompt alone. Not less than the text's length if a stop string has
            cut the token off or the token ends the text itself.
        special: the token is a special token, or the end-of-text token with which the text ended.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int = 0
    special: bool = False


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A continuation.

    Attributes:
        text: the generated text without special tokens, cut before a stop string; with `echo`, after the prompt.
        token_ids: every generated token, also the end-of-text token, a stop token and the tokens of a stop string.
        finish_reason: "stop" at an end-of-text token, a stop token or a stop string, "length" at `max_new_tokens`;
            "cancelled" or "timeout" if the job was ended so, when the result holds what had been generated.
        model: the model's id, as the worker or the engine was given it.
        logprobs: one for each of `token_ids`, if they were asked for.
        prompt_logprobs: one for each of the prompt's tokens, if they were asked for; fewer if the generation was ended
            while it read the prompt.
        drafting: in how many steps the tokens came, and by how many guesses that came true.
        stop_reason: the stop string or the stop token, by its id, that ended the text; None if something else did, as
            the model's own end-of-text token.
        seed: the seed of a text that was drawn: the same request with this seed gives the same text. None otherwise.
        choice_index: the index of the text.
        cumulative_logprob: the sum of the generated tokens' log probabilities, as `logprobs` has them; None unless
            these, `choices` or a `best_of` above `n` were asked for.
        alternatives: the other texts, if several were asked for: in the order of their indices, or, of a `best_of`
            above `n`, the better first. What is told of the prompt is told with the first text.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    drafting: Drafting = Drafting()
    stop_reason: StopReason | None = None
    seed: int | None = None
    choice_index: int = 0
    cumulative_logprob: float | None = None
    alternatives: tuple[GenerationResult, ...] = ()


def combine(request: GenerationRequest, results: Sequence[GenerationResult]) -> GenerationResult:
    """Return the result of a request from those of its texts, given in the order of their indices: the first text's.

    The others are its alternatives. Of more texts than are to be given, those are taken whose mean log probability a
    token is highest, as by OpenAI's API; of equal ones, those of the lower index.
    """
    chosen = list(results)
    if request.ranked:
        chosen = sorted(chosen, key=mean_logprob, reverse=True)[: request.n]
    # The prompt was read for the first text of all.
    usage = replace(chosen[0].usage, cached_tokens=results[0].usage.cached_tokens)
    prompt_logprobs = results[0].prompt_logprobs
    others = tuple(replace(result, prompt_logprobs=None) for result in chosen[1:])
    return replace(chosen[0], usage=usage, prompt_logprobs=prompt_logprobs, alternatives=others)


def mean_logprob(result: GenerationResult) -> float:
    """Return the mean log probability of a text's tokens, by which the best of several is told."""
    return (result.cumulative_logprob or 0.0) / max(1, len(result.token_ids))
