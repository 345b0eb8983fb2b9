"""A sequence: a prompt and the tokens generated after it, from its admission by the decoder to its result."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from fastgpt2.engine.decoding.lookup import Lookup
from fastgpt2.engine.decoding.records import (
    Drafting,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Timings,
    TokenLogprob,
    Usage,
)
from fastgpt2.engine.model.detokenizer import Detokenizer

# How far a sequence has come. "prefill": its prompt waits to be read or is partly read, and it has no token yet.
# "decode": it has its first token, and each step gives it one more, or several. "finished": it ended by itself or was
# dropped, and holds no slot any more. Strings, as a member of an enum takes five times as long to look up in each step.
Status = Literal["prefill", "decode", "finished"]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A request whose prompt is tokenized and known to fit the model.

    Attributes:
        ids: the prompt's tokens, at least one.
        offsets: where in the prompt's text each of the ids begins; empty unless `prompt_logprobs` are asked for.
    """

    request: GenerationRequest
    ids: list[int]
    max_new_tokens: int
    offsets: Seq[int] = ()

    @property
    def positions(self) -> int:
        """Return how many positions the sequence can grow to."""
        return len(self.ids) + self.max_new_tokens


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence that a decoder was given.

    Attributes:
        slot: its place in the KV cache, its own until it is finished.
        pending: tokens not yet run: what is left of the prompt, then the token generated last.
        text: the text generated, complete characters only, cut before a stop string; with `echo` after the prompt's.
        echo_length: how many characters at the beginning of `text` are the prompt's.
        unscored: tokens of the prompt, each with its offset, whose log probabilities are asked for and not known yet.
        cached_tokens: how many of the prompt's tokens were not run, as their keys and values were known.
        prompt_logprobs, logprobs: those of the prompt's tokens and of the generated ones, if they were asked for.
        finish_reason: None while it runs, and if it was dropped.
        admitted_at, first_token_at, finished_at: seconds on the clock of `time.perf_counter`.
        step_seconds: how long each step took that advanced it: those of its prompt, then those that gave tokens.
        lookup: from what its next tokens are guessed; None if they are not.
        steps, drafted, accepted: as in `Drafting`.
    """

    request: GenerationRequest
    prompt_ids: Seq[int]
    max_new_tokens: int
    slot: int
    pending: Seq[int]
    detokenizer: Detokenizer
    admitted_at: float
    status: Status = "prefill"
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    echo_length: int = 0
    unscored: Seq[tuple[int, int]] = ()
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_at: float = 0.0
    finished_at: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    lookup: Lookup | None = None
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def append_text(self, piece: str) -> bool:
        """Append the text of the token generated last, and cut it before a stop string. Tell whether there was one."""
        before = len(self.text)
        self.text += piece
        # As vLLM's `min_tokens`: what ends in the text of the first `min_new_tokens` tokens is no match.
        if not piece or len(self.token_ids) <= self.request.min_new_tokens:
            return False
        # It may begin in the text of earlier tokens, but not in the prompt.
        found = [self.text.find(stop, max(self.echo_length, before - len(stop) + 1)) for stop in self.request.stop]
        # The earliest counts, whichever string it is.
        end = min((at for at in found if at >= 0), default=None)
        self.text = self.text[:end]
        return end is not None

    def flush_text(self) -> None:
        """Append what is left of the text as no token follows: U+FFFD for an unfinished character, else nothing."""
        self.text += self.detokenizer.flush()

    @property
    def settled(self) -> int:
        """Return how many characters of `text` stay whatever follows; the number never falls.

        All of them stay once the sequence is finished. Before that, the longest end of the generated text with which
        a stop string begins is left out: the rest of the stop string may follow.
        """
        if self.finished:
            return len(self.text)
        held = 0
        for stop in self.request.stop:
            longest = min(len(stop) - 1, len(self.text) - self.echo_length)
            held = next((n for n in range(longest, held, -1) if self.text.endswith(stop[:n])), held)
        return len(self.text) - held

    def result(self, model: str, reason: FinishReason | None = None) -> GenerationResult:
        """Return the result: what the sequence has generated so far.

        Args:
            reason: why a sequence ends here that runs or was dropped, needed then (ValueError). One that ended by
                itself keeps its own reason.
        """
        finish_reason = self.finish_reason or reason
        if finish_reason is None:
            raise ValueError("the sequence has not ended by itself")
        finished_at = self.finished_at if self.finished else perf_counter()
        first_token_at = self.first_token_at if self.token_ids else finished_at
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=finish_reason,
            usage=Usage(self.prompt_tokens, len(self.token_ids), self.cached_tokens),
            timings=Timings(
                queue_seconds=0.0,
                prefill_seconds=first_token_at - self.admitted_at,
                decode_seconds=finished_at - first_token_at,
            ),
            model=model,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            prompt_logprobs=tuple(self.prompt_logprobs) if self.request.prompt_logprobs is not None else None,
            drafting=Drafting(self.steps, self.drafted, self.accepted),
        )
