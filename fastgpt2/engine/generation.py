"""What is asked of a generation and what comes back: plain, validated records. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastgpt2.errors import BadRequest, PromptTooLong

FinishReason = Literal["stop", "length"]

DEFAULT_MAX_NEW_TOKENS = 20
MAX_PROMPT_BYTES = 1 << 20
MAX_NEW_TOKENS = 1 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it, checked when made.

    Args:
        prompt: the text to continue; empty means: start from the model's beginning-of-text token.
        max_new_tokens: at most so many tokens are generated; None means 20, or fewer where the model's positions
            leave less room.
        stop: generation ends before the first of these strings; they are cut from the text.
        ignore_eos: go on past the end-of-text token.

    Raises:
        BadRequest: a wrong type or a value out of bounds; the message names the field and the bound.
    """

    prompt: str
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # JSON has no tuples, and one stop string is commonly given bare.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if isinstance(stop, list | tuple):
            object.__setattr__(self, "stop", tuple(stop))
        _check_prompt(self.prompt)
        _check_max_new_tokens(self.max_new_tokens)
        _check_stop(self.stop)
        if not isinstance(self.ignore_eos, bool):
            raise BadRequest(f"ignore_eos must be true or false, not {_type_name(self.ignore_eos)}")

    def room(self, prompt_tokens: int, n_positions: int) -> int:
        """The number of tokens to generate at most, for a prompt of `prompt_tokens` on `n_positions` positions.

        Raises:
            PromptTooLong: prompt and continuation do not fit; the message says by how much.
        """
        left = n_positions - prompt_tokens
        if left < 1:
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens}, over the model's {n_positions} positions, one of which a new token "
                f"needs: shorten the prompt by at least {1 - left} tokens"
            )
        if self.max_new_tokens is None:
            return min(DEFAULT_MAX_NEW_TOKENS, left)
        if self.max_new_tokens > left:
            total = prompt_tokens + self.max_new_tokens
            excess = total - n_positions
            shorten = f", or shorten the prompt by {excess} tokens" if excess < prompt_tokens else ""
            raise PromptTooLong(
                f"prompt tokens {prompt_tokens} and max_new_tokens {self.max_new_tokens} make {total}, over the "
                f"model's {n_positions} positions: ask for at most {left} new ones{shorten}"
            )
        return self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, named as in OpenAI's API."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting in the queue, reading the prompt up to the first token, and all further tokens."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A continuation.

    Attributes:
        text: the generated text without the prompt, without special tokens, cut before a stop string.
        token_ids: every token generated, the end-of-text token and those of a stop string included.
        finish_reason: "stop" at the end-of-text token or a stop string, "length" at `max_new_tokens`.
        usage: token counts.
        timings: where the time went.
        model: the model's id, as the worker or the engine was told it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise BadRequest(f"prompt must be a string, not {_type_name(prompt)}")
    try:
        size = len(prompt.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"prompt is not valid Unicode: lone surrogate U+{ord(prompt[error.start]):04X} at character {error.start}"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise PromptTooLong(f"prompt has {size} bytes; the limit is {MAX_PROMPT_BYTES}: shorten it")


def _check_max_new_tokens(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequest(f"max_new_tokens must be a whole number, not {_type_name(value)}")
    if not 1 <= value <= MAX_NEW_TOKENS:
        raise BadRequest(f"max_new_tokens must be between 1 and {MAX_NEW_TOKENS}, not {value}")


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
