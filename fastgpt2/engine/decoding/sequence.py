"""A sequence: a prompt and the tokens generated after it, from its admission by the decoder to its result."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal

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
from fastgpt2.engine.decoding.stop_strings import StopStrings
from fastgpt2.engine.text.detokenizer import Detokenizer
from fastgpt2.errors import FastGPT2Error

if TYPE_CHECKING:
    from concurrent.futures import Future

    from fastgpt2.engine.decoding.chooser import Chooser
    from fastgpt2.engine.decoding.grammar import Grammar

# How far a sequence has come. "prefill": its prompt waits to be read or is partly read, and it has no token yet.
# "decode": it has its first token, and each step gives it one more, or several. "finished": it ended by itself or was
# dropped, and holds no slot any more. Strings, as a member of an enum takes five times as long to look up in each step.
Status = Literal["prefill", "decode", "finished"]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A request whose prompt is tokenized and known to fit the model.

    Attributes:
        request: with the model's own options where it had none, and with a seed if tokens are drawn.
        ids: the prompt's tokens, at least one.
        offsets: where in the prompt's text each of the ids begins; empty unless `prompt_logprobs` are asked for.
        bad_words: the tokens of the request's `bad_words`.
        grammar: the form of a guided text, once it is compiled; None if the text is not guided.
        eos_token_ids: the tokens that end the text by themselves, none if the request passes over them.
    """

    request: GenerationRequest
    ids: list[int]
    max_new_tokens: int
    offsets: Seq[int] = ()
    bad_words: Seq[tuple[int, ...]] = ()
    grammar: Future[Grammar] | None = None
    eos_token_ids: frozenset[int] = frozenset()

    @property
    def positions(self) -> int:
        """Return how many positions the sequence can grow to."""
        return len(self.ids) + self.max_new_tokens


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence that a decoder was given.

    Attributes:
        prompt_ids: the prompt's tokens: one list for all texts of one prompt.
        choice_index: the text's index among those of its seed.
        slot: its place in the KV cache, its own until it is finished.
        pending: tokens not yet run: what is left of the prompt, then the token generated last.
        detokenizer: what makes the tokens' text; it holds back what later tokens may change.
        eos_token_ids: the model's own tokens that end the text.
        end_ids: these, and those that the request names.
        least_new_tokens: how many tokens come before the first that may be one of these.
        stops: the request's stop strings; None without any.
        text: the text generated, complete characters only, cut before a stop string; with `echo` after the prompt's.
        echo_length: how many characters at the beginning of `text` are the prompt's.
        unstoppable: how many characters came with the first `min_new_tokens` tokens, and what was held back by then.
        unscored: tokens of the prompt, each with its offset, whose log probabilities are asked for and not known yet.
        cached_tokens: how many of the prompt's tokens were not run, as their keys and values were known.
        prompt_logprobs, logprobs: those of the prompt's tokens and of the generated ones, if they were asked for.
        finish_reason: None while it runs, and if it was dropped.
        stop_reason: as in `GenerationResult`.
        admitted_at, first_token_at, finished_at: seconds on the clock of `time.perf_counter`.
        urgency: prompts of a lower one are read later.
        rows_ahead: how many rows of prompts that came later were read while this one's waited.
        step_seconds: how long each step took that advanced it: those of its prompt, then those that gave tokens.
        lookup: from what its next tokens are guessed; None if they are not.
        chooser: takes the next token; None if that is the likeliest one, whatever came before.
        sums_logprobs: whether the sum of the generated tokens' log probabilities is wanted.
        logprob_sum: that sum, if it is wanted.
        error: why the sequence failed alone; None if it did not.
        steps, drafted, accepted: as in `Drafting`.
    """

    request: GenerationRequest
    prompt_ids: Seq[int]
    max_new_tokens: int
    slot: int
    pending: Seq[int]
    detokenizer: Detokenizer
    eos_token_ids: frozenset[int]
    end_ids: frozenset[int]
    least_new_tokens: int
    stops: StopStrings | None
    admitted_at: float
    choice_index: int = 0
    urgency: int = 0
    rows_ahead: int = 0
    chooser: Chooser | None = None
    status: Status = "prefill"
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    echo_length: int = 0
    unstoppable: int = 0
    unscored: Seq[tuple[int, int]] = ()
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_token_at: float = 0.0
    finished_at: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    lookup: Lookup | None = None
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    sums_logprobs: bool = False
    logprob_sum: float = 0.0
    error: FastGPT2Error | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def usage(self) -> Usage:
        """Return the counts of the tokens so far."""
        return Usage(self.prompt_tokens, len(self.token_ids), self.cached_tokens)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    def append_text(self, token_id: int) -> bool:
        """Append the text of the token generated last, and cut it before a stop string. Tell whether there was one."""
        before = len(self.text)
        self.text += self.detokenizer.push(token_id)
        return self.stops is not None and self._stops_at(self.stops, before, token_id)

    def _stops_at(self, stops: StopStrings, before: int, token_id: int) -> bool:
        # Were it to end here, what is held back would be text too.
        text = self.text + self.detokenizer.pending
        stops.note(token_id, len(text))
        # As vLLM's `min_tokens`: what ends in the text of the first `min_new_tokens` tokens is no match.
        if len(self.token_ids) <= self.request.min_new_tokens:
            self.unstoppable = len(text)
            return False
        # It may begin in the text of earlier tokens, but not in the prompt. The earliest counts, whichever it is.
        found = stops.find(text, max(before, self.unstoppable), token_id)
        if found is None:
            return False
        self.text, self.stop_reason = text[: found[0]], found[1]
        return True

    def flush_text(self) -> None:
        """Append what is left of the text as no token follows: what was held back, and U+FFFD for half a character."""
        self.text += self.detokenizer.flush()

    @property
    def settled(self) -> int:
        """Return how many characters of `text` stay whatever follows; the number never falls.

        All of them stay once the sequence is finished. Before that, the longest end of the generated text with which
        a stop string begins is left out: the rest of the stop string may follow.
        """
        if self.finished:
            return len(self.text)
        return len(self.text) - (self.stops.held(self.text) if self.stops is not None else 0)

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
        is_first = self.choice_index == self.request.choice_index
        return GenerationResult(
            text=self.text if self.finish_reason else self.text + self.detokenizer.pending,
            token_ids=tuple(self.token_ids),
            finish_reason=finish_reason,
            usage=self.usage,
            timings=Timings(
                queue_seconds=0.0,
                prefill_seconds=first_token_at - self.admitted_at,
                decode_seconds=finished_at - first_token_at,
            ),
            model=model,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            prompt_logprobs=tuple(self.prompt_logprobs)
            if self.request.prompt_logprobs is not None and is_first
            else None,
            drafting=Drafting(self.steps, self.drafted, self.accepted),
            stop_reason=self.stop_reason,
            seed=self.request.seed if self.request.samples else None,
            choice_index=self.choice_index,
            cumulative_logprob=self.logprob_sum if self.sums_logprobs else None,
        )
