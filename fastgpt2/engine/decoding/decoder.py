"""Greedy decoding of many sequences at once: admit, step, finish. No I/O, no clock but a stopwatch."""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.drafter import Drafter
from fastgpt2.engine.decoding.records import FinishReason, GenerationRequest, TokenLogprob
from fastgpt2.engine.decoding.sequence import Prompt, Sequence
from fastgpt2.engine.model.tokenizer import IncrementalDetokenizer, Tokenizer
from fastgpt2.engine.network.gpt2 import DEFAULT_MAX_ROWS, GPT2, PREFILL_ROWS_BESIDE
from fastgpt2.engine.network.prefixes import Prefixes
from fastgpt2.engine.network.step import Segment
from fastgpt2.errors import BadRequest, CheckpointError, TokenizerError

# Rows of prompts read in one step while no sequence decodes; while some do, PREFILL_ROWS_BESIDE.
PREFILL_ROWS = DEFAULT_MAX_ROWS


class Decoder:
    """Decodes as many sequences side by side as the network has slots, each as if it were alone.

    Args:
        prefixes: where keys and values of prompts are kept for others that begin alike; None: nowhere.
        drafter: what guesses tokens; None: nothing does.
    """

    def __init__(
        self, model: GPT2, tokenizer: Tokenizer, prefixes: Prefixes | None = None, drafter: Drafter | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefixes = prefixes
        self.drafter = drafter or Drafter(model)
        self.running: list[Sequence] = []

    @property
    def free_slots(self) -> int:
        return self.model.cache.free_slots

    @property
    def kv_bytes_reserved(self) -> int:
        """Bytes that keys and values take at most: of the sequences that run, and what free slots keep."""
        return self.model.cache.bytes_reserved

    @property
    def kv_bytes_limit(self) -> int:
        """Bytes that keys and values may take."""
        return self.model.cache.bytes_limit

    @property
    def prefix_bytes(self) -> int:
        """Bytes that kept prefixes have come to take, of this process alone; they are not given back."""
        return self.prefixes.bytes_committed if self.prefixes is not None else 0

    @property
    def prefix_bytes_limit(self) -> int:
        """Bytes that kept prefixes may take, beside `kv_bytes_limit`."""
        return self.prefixes.bytes_limit if self.prefixes is not None else 0

    def prepare(self, request: GenerationRequest) -> Prompt:
        """Tokenize a request and see that it fits.

        Raises:
            BadRequest: the prompt holds a token id that the model does not have.
            PromptTooLong: prompt and continuation exceed the model's positions.
            TokenizerError: the tokenizer gives a token that the model does not have.
        """
        ids = self._ids(request)
        max_new_tokens = request.room(len(ids), self.model.config.n_positions)
        return Prompt(request, ids, max_new_tokens, self._offsets(request, ids))

    def _ids(self, request: GenerationRequest) -> list[int]:
        vocab_size = self.model.config.vocab_size
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt)
            if ids and max(ids) >= vocab_size:
                raise TokenizerError(
                    f"the tokenizer gives token {max(ids)}, and the model's vocabulary has {vocab_size}: "
                    "they do not belong together"
                )
        else:
            ids = list(request.prompt)
            if ids and max(ids) >= vocab_size:
                raise BadRequest(
                    f"prompt holds token id {max(ids)}, and the model's vocabulary has {vocab_size}: "
                    f"give ids from 0 to {vocab_size - 1}"
                )
        return ids or [self._beginning()]

    def _offsets(self, request: GenerationRequest, ids: list[int]) -> list[int]:
        """Where in the prompt's text its tokens begin, for `prompt_logprobs`."""
        if request.prompt_logprobs is None:
            return []
        if isinstance(request.prompt, str):
            return self.tokenizer.offsets(request.prompt) or [0]
        detokenizer, length, offsets = IncrementalDetokenizer(self.tokenizer), 0, []
        for token_id in ids:
            offsets.append(length + detokenizer.breaks_off(token_id))
            length += len(detokenizer.push(token_id))
        return offsets

    def has_room(self, prompt: Prompt) -> bool:
        """Whether `admit` takes this prompt in now: there are a slot and memory for all that it can grow to."""
        return self.model.cache.has_room(prompt.positions)

    def admit(self, prompt: Prompt) -> Sequence:
        """Take a prompt in; it is decoded from the next step on.

        Raises:
            IndexError: there is no room: ask `has_room` first.
        """
        detokenizer = IncrementalDetokenizer(self.tokenizer)
        text = self._echoed(prompt.request, detokenizer) if prompt.request.echo else ""
        scored = list(zip(prompt.ids, prompt.offsets, strict=False))
        sequence = Sequence(
            request=prompt.request,
            prompt_ids=prompt.ids,
            max_new_tokens=prompt.max_new_tokens,
            slot=self.model.cache.allot(prompt.positions),
            # A token is read for the sake of the next one: to generate it, or to know how likely it was.
            pending=prompt.ids if prompt.max_new_tokens else prompt.ids[: len(scored[1:])],
            detokenizer=detokenizer,
            admitted_at=perf_counter(),
            text=text,
            generated_at=len(text),
            unscored=scored[1:],
            prompt_logprobs=[
                TokenLogprob(token_id, self.tokenizer.token_text(token_id), None, text_offset=offset)
                for token_id, offset in scored[:1]
            ],
            lookup=self.drafter.begin(prompt.ids, prompt.max_new_tokens),
        )
        self.running.append(sequence)
        return sequence

    def step(self) -> list[Sequence]:
        """Advance every running sequence: a chunk of its prompt, or a token. Returns those that ended by this step.

        Those who decode each get a token, and one more for each guess that comes true (`drafting.py`). Beside them,
        `PREFILL_ROWS_BESIDE` rows of prompts are read, so that nobody waits long for the next token; `PREFILL_ROWS` if
        none decodes. The prompt that came first is read first.

        Raises:
            CheckpointError: the logits are not finite.
        """
        movers, segments = self._next_segments()
        if segments:
            self._advance(movers, segments)
        ended = [sequence for sequence in movers if sequence.finished]
        # They generate nothing, and what had to be read of their prompts has been.
        for sequence in [sequence for sequence in self.running if not sequence.pending]:
            self._end(sequence, "length")
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

    def _next_segments(self) -> tuple[list[Sequence], list[Segment]]:
        movers, segments = [], []
        decoding = sum(1 for sequence in self.running if sequence.token_ids)
        rows = min(PREFILL_ROWS_BESIDE, self.model.max_rows - decoding) if decoding else PREFILL_ROWS
        # Logits are 200 KB a row of gpt2, and the memory that a step has once used for them stays committed.
        scored_rows = PREFILL_ROWS_BESIDE
        for sequence in sorted(self.running, key=_order):
            assert sequence.slot is not None
            if rows and not sequence.token_ids:
                self._reuse(sequence, sequence.slot)
            ids = sequence.pending
            if not sequence.token_ids:
                ids = ids[: min(rows, scored_rows) if sequence.unscored else rows]
                rows -= len(ids)
            if not ids:
                continue
            sequence.pending = sequence.pending[len(ids) :]
            n_logits = 0 if sequence.pending else 1
            if sequence.unscored:
                scored_rows -= len(ids)
                n_logits = len(ids)
            segments.append(Segment(sequence.slot, ids, n_logits))
            movers.append(sequence)
        # Beside prompts, a step takes long enough for those who decode.
        if 0 < decoding == len(movers):
            guesses = self.drafter.guesses(movers, self.model.max_rows - decoding)
            segments = [
                Segment(segment.slot, [*segment.ids, *guess], 1 + len(guess)) if guess else segment
                for segment, guess in zip(segments, guesses, strict=True)
            ]
        return movers, segments

    def _reuse(self, sequence: Sequence, slot: int) -> None:
        """Have a prompt that now begins to be read begin behind what is known of it.

        Not when it is admitted: of prompts that come together, the second finds what has been read of the first.
        """
        cache = self.model.cache
        # Of a prompt that is scored, every row's logits are wanted.
        if self.prefixes is None or cache.lengths[slot] or sequence.request.prompt_logprobs is not None:
            return
        # The last token is run in any case, for what comes next.
        known = self.prefixes.copy_to(cache, slot, sequence.pending[:-1])
        sequence.cached_tokens, sequence.pending = known, sequence.pending[known:]

    def _keep(self, sequence: Sequence) -> None:
        """Keep what there is of a sequence for others that begin alike; of one that is scored, nothing."""
        if self.prefixes is None or sequence.slot is None or sequence.request.prompt_logprobs is not None:
            return
        self.prefixes.keep(self.model.cache, sequence.slot, [*sequence.prompt_ids, *sequence.token_ids])

    def _advance(self, movers: list[Sequence], segments: list[Segment]) -> None:
        started_at = perf_counter()
        logits = self.model.forward(segments)
        # Row by row: over an axis, numpy would copy the logits first. Of a NaN, if there is one.
        best = [int(row.argmax()) for row in logits]
        if not all(math.isfinite(row[token_id]) for row, token_id in zip(logits, best, strict=True)):
            raise CheckpointError(
                "the model computes values that are not finite: its weights are damaged; fetch it again"
            )
        now = perf_counter()
        if all(sequence.token_ids for sequence in movers):
            self.drafter.stepped(len(best), now - started_at)
        begin = 0
        for sequence, segment in zip(movers, segments, strict=True):
            sequence.step_seconds.append(now - started_at)
            end = begin + segment.n_logits
            if sequence.token_ids:
                self._go_on(sequence, segment, logits[begin:end], best[begin:end], now)
            else:
                if sequence.unscored:
                    self._score(sequence, logits[begin:end])
                self._keep(sequence)
                # The last row of a prompt tells what comes next.
                if not sequence.pending and sequence.max_new_tokens:
                    self._take(sequence, logits[end - 1], best[end - 1], now)
            begin = end

    def _go_on(
        self, sequence: Sequence, segment: Segment, logits: NDArray[np.float32], best: list[int], now: float
    ) -> None:
        """Take the token that follows the last one, and that after each guess as long as they come true.

        The cache then holds what has come true, and no more.
        """
        slot, guess = segment.slot, segment.ids[1:]
        length, accepted = self.model.cache.lengths[slot] - len(guess), 0
        for row, token_id in zip(logits, best, strict=True):
            self.model.cache.retract(slot, length + accepted)
            self._take(sequence, row, token_id, now)
            if sequence.finished or accepted == len(guess) or sequence.token_ids[-1] != guess[accepted]:
                break
            accepted += 1
        sequence.steps += 1
        sequence.drafted += len(guess)
        sequence.accepted += accepted
        self.drafter.verified(len(guess), accepted)

    def _score(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        """Tell how likely the prompt's next tokens were: each row is about the token that follows that of the row."""
        k = sequence.request.prompt_logprobs
        assert k is not None
        known, sequence.unscored = sequence.unscored[: len(logits)], sequence.unscored[len(logits) :]
        # The last row of all is about the first token to be generated.
        for row, (token_id, offset) in zip(logits, known, strict=False):
            sequence.prompt_logprobs.append(token_logprob(self.tokenizer, row, token_id, k, offset))

    def _take(self, sequence: Sequence, logits: NDArray[np.float32], best: int, now: float) -> None:
        """Take the next token up into a sequence, and end the sequence where a stop rule says so.

        The least length is that of transformers' `MinNewTokensLengthLogitsProcessor`: so many tokens before the first
        that may be an end of text. With `ignore_eos` none ends the text, and none is passed over.
        """
        request, token_id = sequence.request, best
        ends = self.model.config.eos_token_ids if not request.ignore_eos else ()
        if best in ends and len(sequence.token_ids) < request.min_new_tokens:
            others = logits.copy()
            others[list(ends)] = -np.inf
            token_id = int(others.argmax())
        is_end = token_id in ends and len(sequence.token_ids) >= request.min_new_tokens
        if request.logprobs is not None:
            detokenizer = sequence.detokenizer
            # An end of text is none of it, and stands behind what an unfinished character becomes.
            beyond = detokenizer.unfinished if is_end else detokenizer.breaks_off(token_id)
            offset = len(sequence.text) + beyond
            sequence.logprobs.append(token_logprob(self.tokenizer, logits, token_id, request.logprobs, offset))
        if not sequence.token_ids:
            sequence.first_token_at = now
        sequence.token_ids.append(token_id)
        sequence.pending = [token_id]
        self.drafter.took(sequence, token_id)
        if is_end:
            self._end(sequence, "stop")
            return
        self._extend_text(sequence, sequence.detokenizer.push(token_id))
        if sequence.finish_reason is None and len(sequence.token_ids) >= sequence.max_new_tokens:
            self._end(sequence, "length")

    def _extend_text(self, sequence: Sequence, piece: str) -> None:
        before = len(sequence.text)
        sequence.text += piece
        # As vLLM's `min_tokens`: what ends in the text of the first so many tokens is no match.
        if not piece or len(sequence.token_ids) <= sequence.request.min_new_tokens:
            return
        # A stop string may begin in the text of earlier tokens; the earliest match counts, whichever string it is.
        matches = [
            at
            for stop in sequence.request.stop
            if (at := sequence.text.find(stop, max(sequence.generated_at, before - len(stop) + 1))) >= 0
        ]
        if matches:
            sequence.text = sequence.text[: min(matches)]
            self._end(sequence, "stop", flush=False)

    def _end(self, sequence: Sequence, reason: FinishReason, flush: bool = True) -> None:
        sequence.finish_reason = reason
        if flush:
            sequence.text += sequence.detokenizer.flush()
        # What was generated may be the beginning of the next prompt, as in a conversation.
        self._keep(sequence)
        self.finish(sequence)

    def _echoed(self, request: GenerationRequest, detokenizer: IncrementalDetokenizer) -> str:
        """The prompt as text. Token ids may end within a character, which the first generated token then completes."""
        if isinstance(request.prompt, str):
            return request.prompt
        return "".join(map(detokenizer.push, request.prompt))

    def _beginning(self) -> int:
        """The token that an empty prompt starts from: the beginning of a text, which in GPT-2 is the end of another."""
        config = self.model.config
        return config.bos_token_id if config.bos_token_id is not None else (config.eos_token_ids or (0,))[0]


def _order(sequence: Sequence) -> tuple[bool, int]:
    """Those who decode go first, in the order of their slots: neighbours are attended together."""
    return (not sequence.token_ids, (sequence.slot or 0) if sequence.token_ids else 0)


# NOTE engine.logprobs: Log probabilities of one token's place.


def token_logprob(
    tokenizer: Tokenizer, logits: NDArray[np.float32], token_id: int, k: int, text_offset: int = 0
) -> TokenLogprob:
    """The log-softmax, in float64, of a token and of the `k` likeliest; of two that are alike, the lower id first.

    Args:
        logits: [vocab_size], as the model gives them; not changed.
    """
    told = [token_id, *likeliest(logits, k)]
    values = logits.astype(np.float64)
    values -= values.max()
    logprobs = values[told]
    logprobs -= np.log(np.exp(values, out=values).sum())
    of, *top = zip(told, map(tokenizer.token_text, told), logprobs.tolist(), strict=True)
    return TokenLogprob(*of, tuple(TokenLogprob(*other) for other in top), text_offset)


def likeliest(values: NDArray[np.floating[Any]], k: int) -> list[int]:
    """Where the k largest are, the largest first, the lower index first among equals."""
    k = min(k, len(values))
    if k == 0:
        return []
    # All that reach the k-th largest: more than k where some equal it. Sorting everything would take milliseconds.
    found = np.flatnonzero(values >= np.partition(values, -k)[-k])
    ordered: list[int] = found[np.argsort(-values[found], kind="stable")][:k].tolist()
    return ordered
