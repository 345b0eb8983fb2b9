"""A sequence on its way: what was asked of it, what it has generated, what of that is settled."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

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
from fastgpt2.engine.model.tokenizer import IncrementalDetokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request, tokenized and known to fit the model.

    Attributes:
        offsets: where in the prompt's text each of the ids begins; empty unless `prompt_logprobs` are asked for.
    """

    request: GenerationRequest
    ids: list[int]
    max_new_tokens: int
    offsets: Seq[int] = ()

    @property
    def positions(self) -> int:
        """How far the sequence can grow."""
        return len(self.ids) + self.max_new_tokens


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence on its way.

    Attributes:
        slot: its place in the KV cache; None once finished.
        prompt_ids: the prompt's tokens.
        pending: tokens not yet run: what is left of the prompt, then the token generated last.
        token_ids: the tokens generated.
        text: the text generated, complete characters only, cut before a stop string; with `echo` after the prompt's.
        generated_at: where in `text` the generated part begins.
        unscored: tokens of the prompt, each with its offset, whose log probabilities are asked for and not known yet.
        cached_tokens: how many of the prompt's tokens had not to be run, as their keys and values were known.
        prompt_logprobs, logprobs: of the prompt's tokens and of those generated, if they were asked for.
        finish_reason: None while running, and of a sequence that was dropped.
        step_seconds: how long each step took that moved it on: its prompt, and then a token each, or several.
        lookup: what its next tokens are guessed from, if they are.
        steps, drafted, accepted: as `Drafting` has them.
    """

    request: GenerationRequest
    prompt_ids: Seq[int]
    max_new_tokens: int
    slot: int | None
    pending: Seq[int]
    detokenizer: IncrementalDetokenizer
    admitted_at: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    generated_at: int = 0
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
        return self.slot is None

    @property
    def settled(self) -> int:
        """How many characters of `text` stay whatever follows; it never becomes less.

        All of them once the sequence is finished. Before that, all but the longest end of the generated text with which
        a stop string begins: the rest of it may follow.
        """
        if self.finished:
            return len(self.text)
        held = 0
        for stop in self.request.stop:
            longest = min(len(stop) - 1, len(self.text) - self.generated_at)
            held = next((n for n in range(longest, held, -1) if self.text.endswith(stop[:n])), held)
        return len(self.text) - held

    def result(self, model: str, reason: FinishReason | None = None) -> GenerationResult:
        """The result.

        Args:
            reason: of a sequence that runs or was dropped, why it ends here: what there is of it is the result. One
                that ended by itself keeps its own reason.

        Raises:
            ValueError: without a `reason`, while it runs or when it was dropped.
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
