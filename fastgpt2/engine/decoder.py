"""Greedy decoding of many sequences at once: admit, step, finish. No I/O, no clock but a stopwatch."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

from fastgpt2.engine.generation import FinishReason, GenerationRequest, GenerationResult, Timings, Usage
from fastgpt2.engine.gpt2 import DEFAULT_MAX_ROWS, GPT2
from fastgpt2.engine.step import Segment
from fastgpt2.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from fastgpt2.errors import CheckpointError, TokenizerError

# Rows of prompts read in one step: bounds the time for which a prompt keeps the other sequences waiting.
PREFILL_ROWS = DEFAULT_MAX_ROWS


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request, tokenized and known to fit the model."""

    request: GenerationRequest
    ids: list[int]
    max_new_tokens: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One sequence on its way.

    Attributes:
        slot: its place in the KV cache; None once finished.
        pending: tokens not yet run: what is left of the prompt, then the token generated last.
        token_ids: the tokens generated.
        text: the text generated, complete characters only, cut before a stop string.
        finish_reason: None while running.
        step_seconds: how long each step took that moved it on: its prompt, and then a token each.
    """

    request: GenerationRequest
    prompt_tokens: int
    max_new_tokens: int
    slot: int | None
    pending: Seq[int]
    detokenizer: IncrementalDetokenizer
    admitted_at: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    first_token_at: float = 0.0
    finished_at: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.slot is None

    def result(self, model: str) -> GenerationResult:
        """The result of a sequence that ended by itself. Raises ValueError while it runs or when it was dropped."""
        if self.finish_reason is None:
            raise ValueError("the sequence has not ended by itself")
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            usage=Usage(self.prompt_tokens, len(self.token_ids)),
            timings=Timings(
                queue_seconds=0.0,
                prefill_seconds=self.first_token_at - self.admitted_at,
                decode_seconds=self.finished_at - self.first_token_at,
            ),
            model=model,
        )


class Decoder:
    """Decodes as many sequences side by side as the network has slots, each as if it were alone."""

    def __init__(self, model: GPT2, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.running: list[Sequence] = []

    @property
    def free_slots(self) -> int:
        return self.model.cache.free_slots

    def prepare(self, request: GenerationRequest) -> Prompt:
        """Tokenize a request and see that it fits.

        Raises:
            PromptTooLong: prompt and continuation exceed the model's positions.
            TokenizerError: the tokenizer gives a token that the model does not have.
        """
        ids = self.tokenizer.encode(request.prompt) or [self._beginning()]
        if max(ids) >= self.model.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer gives token {max(ids)}, and the model's vocabulary has {self.model.config.vocab_size}: "
                "they do not belong together"
            )
        return Prompt(request, ids, request.room(len(ids), self.model.config.n_positions))

    def admit(self, prompt: Prompt) -> Sequence:
        """Take a prompt in; it is decoded from the next step on.

        Raises:
            IndexError: no slot is free: ask `free_slots` first.
        """
        sequence = Sequence(
            request=prompt.request,
            prompt_tokens=len(prompt.ids),
            max_new_tokens=prompt.max_new_tokens,
            slot=self.model.cache.allot(),
            pending=prompt.ids,
            detokenizer=IncrementalDetokenizer(self.tokenizer),
            admitted_at=perf_counter(),
        )
        self.running.append(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Advance every running sequence: a chunk of its prompt, or one token. Returns those that ended in this step.

        A prompt longer than what is left of `PREFILL_ROWS` is read over several steps; those who decode go first.

        Raises:
            CheckpointError: the logits are not finite.
        """
        started_at = perf_counter()
        segments, movers = self._next_segments()
        if not segments:
            return []
        logits = self.model.forward(segments)
        # Row by row: over an axis, numpy would copy the logits first. Of a NaN, if there is one.
        best = [int(row.argmax()) for row in logits]
        if not all(math.isfinite(row[token_id]) for row, token_id in zip(logits, best, strict=True)):
            raise CheckpointError(
                "the model computes values that are not finite: its weights are damaged; fetch it again"
            )
        chosen = iter(best)
        now = perf_counter()
        ended = []
        for sequence, segment in zip(movers, segments, strict=True):
            sequence.step_seconds.append(now - started_at)
            if not segment.n_logits:
                continue
            self._append(sequence, next(chosen), now)
            if sequence.finished:
                ended.append(sequence)
        return ended

    def finish(self, sequence: Sequence) -> None:
        """Drop a running sequence; what it has generated stays readable. Does nothing to one that ended."""
        if sequence.slot is None:
            return
        self.model.cache.release(sequence.slot)
        sequence.slot = None
        sequence.finished_at = perf_counter()
        self.running.remove(sequence)

    def _next_segments(self) -> tuple[list[Segment], list[Sequence]]:
        segments, movers = [], []
        rows = PREFILL_ROWS
        for sequence in sorted(self.running, key=_order):
            assert sequence.slot is not None
            ids = sequence.pending[: max(rows, 0)] if not sequence.token_ids else sequence.pending
            if not ids:
                continue
            rows -= len(ids)
            sequence.pending = sequence.pending[len(ids) :]
            segments.append(Segment(sequence.slot, ids, n_logits=0 if sequence.pending else 1))
            movers.append(sequence)
        return segments, movers

    def _append(self, sequence: Sequence, token_id: int, now: float) -> None:
        """Take a token up into a sequence, and end the sequence where a stop rule says so."""
        if not sequence.token_ids:
            sequence.first_token_at = now
        sequence.token_ids.append(token_id)
        sequence.pending = [token_id]
        if token_id in self.model.config.eos_token_ids and not sequence.request.ignore_eos:
            self._end(sequence, "stop")
            return
        self._extend_text(sequence, sequence.detokenizer.push(token_id))
        if sequence.finish_reason is None and len(sequence.token_ids) >= sequence.max_new_tokens:
            self._end(sequence, "length")

    def _extend_text(self, sequence: Sequence, piece: str) -> None:
        before = len(sequence.text)
        sequence.text += piece
        if not piece:
            return
        # A stop string may begin in the text of earlier tokens; the earliest match counts, whichever string it is.
        matches = [
            at
            for stop in sequence.request.stop
            if (at := sequence.text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if matches:
            sequence.text = sequence.text[: min(matches)]
            self._end(sequence, "stop", flush=False)

    def _end(self, sequence: Sequence, reason: FinishReason, flush: bool = True) -> None:
        sequence.finish_reason = reason
        if flush:
            sequence.text += sequence.detokenizer.flush()
        self.finish(sequence)

    def _beginning(self) -> int:
        """The token that an empty prompt starts from: the beginning of a text, which in GPT-2 is the end of another."""
        config = self.model.config
        return config.bos_token_id if config.bos_token_id is not None else (config.eos_token_ids or (0,))[0]


def _order(sequence: Sequence) -> tuple[bool, int]:
    """Those who decode go first, in the order of their slots: neighbours are attended together."""
    return (not sequence.token_ids, (sequence.slot or 0) if sequence.token_ids else 0)
