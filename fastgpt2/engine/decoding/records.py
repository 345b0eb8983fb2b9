"""What is asked of a generation and what comes back: plain, validated records. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastgpt2.errors import BadRequest, PromptTooLong

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
DEFAULT_MAX_NEW_TOKENS = 20
MAX_PROMPT_BYTES = 1 << 20
MAX_PROMPT_TOKENS = 1 << 17
MAX_NEW_TOKENS = 1 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20

# Far beyond any vocabulary; what a model does not have, the decoder refuses.
MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it, checked when made.

    Args:
        prompt: the text to continue, or its token ids; empty means: start from the model's beginning-of-text token.
        max_new_tokens: at most so many tokens are generated; None means 20, or `min_new_tokens` if that is more, or
            fewer where the model's positions leave less room. 0 generates nothing: the prompt is read, if anything is
            to be told of it, and may fill all positions.
        stop: generation ends before the first of these strings; they are cut from the text.
        ignore_eos: go on past the end-of-text token.
        min_new_tokens: so many tokens come before the one with which an end-of-text token or a stop string ends the
            text; until then the likeliest other token is taken instead of the former, and the latter is text.
        logprobs: tell each generated token's log probability, and those of this many likeliest tokens.
        prompt_logprobs: tell so of each of the prompt's tokens, given those before it.
        echo: the result's text begins with the prompt.

    Raises:
        BadRequest: a wrong type or a value out of bounds; the message names the field and the bound.
    """

    prompt: str | tuple[int, ...]
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        # JSON has no tuples, and one stop string is commonly given bare.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if isinstance(stop, list | tuple):
            object.__setattr__(self, "stop", tuple(stop))
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))
        _check_prompt(self.prompt)
        _check_whole("max_new_tokens", self.max_new_tokens, 0, MAX_NEW_TOKENS, optional=True)
        _check_stop(self.stop)
        most = MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        _check_whole("min_new_tokens", self.min_new_tokens, 0, most)
        for name in ("logprobs", "prompt_logprobs"):
            _check_whole(name, getattr(self, name), 0, MAX_LOGPROBS, optional=True)
        for name in ("ignore_eos", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise BadRequest(f"{name} must be true or false, not {_type_name(getattr(self, name))}")

    @property
    def least_room(self) -> int:
        """How many positions the prompt must leave: one for a new token, none if there shall be none."""
        return 0 if self.max_new_tokens == 0 else 1

    def positions_in_words(self, n_positions: int) -> str:
        """What a prompt has to fit into, for messages."""
        return f"the model's {n_positions} positions" + ", one of which a new token needs" * self.least_room

    def room(self, prompt_tokens: int, n_positions: int) -> int:
        """The number of tokens to generate at most, for a prompt of `prompt_tokens` on `n_positions` positions.

        Raises:
            PromptTooLong: prompt and continuation do not fit; the message says by how much.
        """
        left = n_positions - prompt_tokens
        if left < self.least_room:
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens}, over {self.positions_in_words(n_positions)}: "
                f"shorten the prompt by at least {self.least_room - left} tokens"
            )
        name, wanted = "max_new_tokens", self.max_new_tokens
        if wanted is None:
            name, wanted = "min_new_tokens", self.min_new_tokens
        if wanted > left:
            total = prompt_tokens + wanted
            excess = total - n_positions
            shorten = f", or shorten the prompt by {excess} tokens" if excess < prompt_tokens else ""
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens} and {name} {wanted} make {total}, over the model's {n_positions} "
                f"positions: ask for at most {left} new ones{shorten}"
            )
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return min(max(DEFAULT_MAX_NEW_TOKENS, self.min_new_tokens), left)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, named as in OpenAI's API.

    Attributes:
        cached_tokens: of the prompt's, those that were not computed, as another prompt had begun with the same ones.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Drafting:
    """How the tokens after the first one came: steps + accepted = completion tokens - 1, if there are any.

    Attributes:
        steps: those that gave tokens after the first, which comes with the last step of the prompt.
        drafted: guesses that they verified beside the next token.
        accepted: those of them that were taken as tokens, and each saved a step. The others came untrue, or stood
            behind the end.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting in the queue, reading the prompt up to the first token, and all further tokens."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability, natural, under the model's distribution before anything is excluded.

    Attributes:
        token: its text; where its bytes are no whole characters, "bytes:" and their escapes, as in OpenAI's API; of a
            special token its name, such as "<|endoftext|>".
        logprob: None of the first token of a prompt, which nothing comes before.
        top: the likeliest tokens at its place, the likeliest first, as many as were asked for; they have neither `top`
            nor a `text_offset`.
        text_offset: where, in characters of the result's text, the one begins that this token's first byte belongs to.
            Of a prompt's token in the prompt alone. Not less than the text's length if a stop string has cut the token
            off or it ends the text itself.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    text_offset: int = 0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A continuation.

    Attributes:
        text: the generated text without special tokens, cut before a stop string; after the prompt with `echo`.
        token_ids: every token generated, the end-of-text token and those of a stop string included.
        finish_reason: "stop" at the end-of-text token or a stop string, "length" at `max_new_tokens`; "cancelled" or
            "timeout" for what had been generated of a job that was ended so.
        usage: token counts.
        timings: where the time went.
        model: the model's id, as the worker or the engine was told it.
        logprobs: one for each of `token_ids`, where they were asked for.
        prompt_logprobs: one for each of the prompt's tokens, where they were asked for; fewer if the generation was
            ended while it read the prompt.
        drafting: in how many steps, and by how many guesses that came true.
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


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, tuple):
        _check_prompt_ids(prompt)
        return
    if not isinstance(prompt, str):
        raise BadRequest(f"prompt must be a string or a list of token ids, not {_type_name(prompt)}")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"prompt is not valid Unicode: lone surrogate U+{ord(prompt[error.start]):04X} at character {error.start}"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise PromptTooLong(f"prompt has {size} bytes; the limit is {MAX_PROMPT_BYTES}: shorten it")


def _check_prompt_ids(ids: tuple[object, ...]) -> None:
    if len(ids) > MAX_PROMPT_TOKENS:
        raise PromptTooLong(f"prompt has {len(ids)} tokens; the limit is {MAX_PROMPT_TOKENS}: shorten it")
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise BadRequest(f"prompt, a list, must hold token ids, not {_type_name(token_id)}")
        if not 0 <= token_id <= MAX_TOKEN_ID:
            raise BadRequest(f"prompt holds {str(token_id)[:40]}, which is no token id")


def _check_whole(name: str, value: object, low: int, high: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequest(f"{name} must be a whole number, not {_type_name(value)}")
    if not low <= value <= high:
        raise BadRequest(f"{name} must be between {low} and {high}, not {str(value)[:40]}")


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple):
        raise BadRequest(f"stop must be a string or a list of strings, not {_type_name(stop)}")
    if len(stop) > MAX_STOP_STRINGS:
        raise BadRequest(f"stop holds {len(stop)} strings; the limit is {MAX_STOP_STRINGS}")
    for text in stop:
        if not isinstance(text, str):
            raise BadRequest(f"stop must hold strings, not {_type_name(text)}")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise BadRequest(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}")


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__
