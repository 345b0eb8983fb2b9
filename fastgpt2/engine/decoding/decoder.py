"""The decoder: it generates many sequences side by side. It does no I/O, and knows no clock but a stopwatch.

A sequence's life is four methods: `prepare` tokenizes a request, `admit` gives it a slot, each `step` reads a piece of
its prompt or generates tokens, and it finishes in the step of its last token, or by `finish` when nobody wants it any
more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.chooser import new_chooser
from fastgpt2.engine.decoding.drafter import Drafter
from fastgpt2.engine.decoding.logprobs import logprob_of, token_logprob
from fastgpt2.engine.decoding.prompt_reader import PromptReader
from fastgpt2.engine.decoding.prompt_rows import PromptRows
from fastgpt2.engine.decoding.records import FinishReason, GenerationRequest, TokenLogprob, random_seed
from fastgpt2.engine.decoding.sampler import Scratch
from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
from fastgpt2.engine.decoding.stop_strings import StopStrings
from fastgpt2.engine.model.generation_config import GenerationConfig
from fastgpt2.engine.network.batch_limit import BatchLimit
from fastgpt2.engine.network.gpt2 import DEFAULT_MAX_ROWS, GPT2, PREFILL_ROWS_BESIDE
from fastgpt2.engine.network.prefixes import Prefixes
from fastgpt2.engine.network.step import Segment
from fastgpt2.engine.text.chat_template import ChatTemplate
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest, CheckpointError

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.grammar import Grammars

Array = NDArray[np.float32]

# The sequences that a step advances, each with what the step runs of it.
Batch = list[tuple[Sequence, Segment]]

# Rows of prompts that a step reads while no sequence decodes; while some do, as many of them as `PromptRows` says.
PREFILL_ROWS = DEFAULT_MAX_ROWS

# Of prompts that wait, the shortest is read first, until this many rows of prompts that came later have gone before one
# that came earlier: the rows of one step or two. Many more would make the slowest requests of a full pool slower.
MOST_ROWS_AHEAD = 128

# Rows of scored prompts that a step reads, all of which want logits. Logits are 200 KB a row of gpt2, and the memory
# that a step has once used for them stays committed.
SCORED_ROWS = PREFILL_ROWS_BESIDE


class Decoder:
    """Decodes as many sequences side by side as the network has slots, each as if it were alone.

    Args:
        generation: which tokens begin and end a text.
        chat_template: what makes prompts of chats.
        prefixes: where keys and values of prompts are kept for others that begin alike; None to keep none.
        drafter: what guesses tokens; None to guess none.
        limit: what sets how many slots are used, by what steps take; None to leave that as it is.

    Attributes:
        running: the sequences that have a slot, in the order in which they were admitted.
        prompt_rows: how many rows of prompts a step reads beside sequences that decode.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        generation: GenerationConfig,
        prefixes: Prefixes | None = None,
        drafter: Drafter | None = None,
        chat_template: ChatTemplate | None = None,
        limit: BatchLimit | None = None,
    ) -> None:
        self.model, self.tokenizer, self.generation, self.prefixes = model, tokenizer, generation, prefixes
        self.chat_template = chat_template or ChatTemplate({})
        self.drafter = drafter or Drafter(model)
        self.limit = limit or BatchLimit(model, adapts=False)
        self._scratch = Scratch(model.config.vocab_size)
        self.prompt_rows = PromptRows(PREFILL_ROWS_BESIDE, PREFILL_ROWS)
        self.running: list[Sequence] = []

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars of guided texts. Who starts without one does not wait for their modules."""
        from fastgpt2.engine.decoding.grammar import Grammars

        return Grammars(self.tokenizer, self.model.config.vocab_size)

    def close(self) -> None:
        """End what compiles grammars and renders chats. The decoder still decodes."""
        self.chat_template.close()
        if "grammars" in vars(self):
            self.grammars.close()

    @property
    def prefix_bytes(self) -> int:
        """Return the bytes that kept prefixes have come to take, in this process alone; they are not given back."""
        return self.prefixes.bytes_committed if self.prefixes is not None else 0

    @property
    def prefix_bytes_limit(self) -> int:
        """Return the bytes that kept prefixes may take, beside the cache's `bytes_limit`."""
        return self.prefixes.bytes_limit if self.prefixes is not None else 0

    def prepare(self, request: GenerationRequest) -> TokenizedPrompt:
        """Tokenize a request's prompt and check that it fits.

        Raises:
            BadRequest: the prompt cannot be encoded, or the model lacks a token of it or of an option.
            NoChatTemplate: the request has messages, and the model no chat template.
            PromptTooLong: prompt and continuation exceed the model's positions.
        """
        reader = PromptReader(self.tokenizer, self.generation, self.chat_template, self.model.config)
        asked, eos_token_ids = request, reader.eos_token_ids(request)
        request, ids = reader.tokenize(request)
        reader.check_ids("stop_token_ids", request.stop_token_ids)
        reader.check_ids("suppress_tokens", request.suppress_tokens or ())
        reader.check_ids("logit_bias", request.logit_bias or ())
        max_new_tokens = asked.room(len(ids), self.model.config.n_positions)
        request = request.with_seed(random_seed()).with_defaults(self.generation.options)
        offsets, bad_words = reader.offsets(request, ids), reader.bad_words(request, eos_token_ids)
        grammar = self.grammars.compile(request, ids) if request.guided else None
        return TokenizedPrompt(request, ids, max_new_tokens, offsets, bad_words, grammar, eos_token_ids)

    def has_room(self, prompt: TokenizedPrompt) -> bool:
        """Tell whether `admit` takes this prompt in now: there are a slot and memory for all that it can grow to."""
        return self.model.cache.has_room(prompt.positions)

    def admit(self, prompt: TokenizedPrompt, index: int = 0, urgency: int = 0) -> Sequence:
        """Take a text of a prompt in; it is decoded from the next step on. Raises IndexError without room.

        Args:
            prompt: there must be room for one text of it (`has_room`), and its grammar, if it has one, be compiled.
            index: which of the prompt's texts. The first is told of the prompt's log probabilities.
            urgency: its prompt is read before those of a lower urgency.

        Raises:
            BadRequest: there is no such grammar.
        """
        request, given = prompt.request, prompt.request.prompt
        matcher = prompt.grammar.result().matcher() if prompt.grammar is not None else None
        end_ids, choice_index = prompt.eos_token_ids.union(request.stop_token_ids), request.choice_index + index
        least = request.min_new_tokens or self.generation.least_new_tokens(len(prompt.ids))
        text, detokenizer = "", self.tokenizer.detokenizer(prompt.ids)
        if request.echo and given:
            # Token ids may end within a character, which the first generated token completes.
            detokenizer = detokenizer if isinstance(given, str) else self.tokenizer.detokenizer()
            text = given if isinstance(given, str) else "".join(map(detokenizer.push, given))
        scored = list(zip(prompt.ids, prompt.offsets, strict=False)) if index == 0 else []
        sequence = Sequence(
            request=request,
            prompt_ids=prompt.ids,
            max_new_tokens=prompt.max_new_tokens,
            slot=self.model.cache.allot(prompt.positions),
            # A token is run for the sake of the next one: to generate it, or to know how likely it was.
            pending=prompt.ids if prompt.max_new_tokens else prompt.ids[: len(scored[1:])],
            detokenizer=detokenizer,
            eos_token_ids=prompt.eos_token_ids,
            end_ids=end_ids,
            least_new_tokens=least,
            stops=self._stop_strings(request, len(text)),
            admitted_at=perf_counter(),
            choice_index=choice_index,
            urgency=urgency,
            chooser=new_chooser(
                request, choice_index, prompt.ids, prompt.bad_words, matcher, end_ids, least, self._scratch
            ),
            text=text,
            echo_length=len(text),
            unscored=scored[1:],
            # The first token has no log probability: nothing comes before it.
            prompt_logprobs=[
                TokenLogprob(
                    token_id,
                    self.tokenizer.token_text(token_id),
                    None,
                    text_offset=offset,
                    special=self.tokenizer.is_special(token_id),
                )
                for token_id, offset in scored[:1]
            ],
            lookup=self.drafter.lookup_for(prompt.ids, prompt.max_new_tokens),
            sums_logprobs=request.logprobs is not None or bool(request.choices) or request.ranked,
        )
        self.running.append(sequence)
        return sequence

    def _stop_strings(self, request: GenerationRequest, begin: int) -> StopStrings | None:
        return StopStrings(request.stop, self.tokenizer.special_tokens, begin) if request.stop else None

    def step(self) -> list[Sequence]:
        """Advance every running sequence by a piece of its prompt, or by a token. Return those that finished.

        A sequence that decodes gets a token, and one more for each guess that comes true. Beside these sequences, as
        many rows of prompts are read as `prompt_rows` says, so that nobody waits long for the next token;
        `PREFILL_ROWS` if none decodes. The rows may be of several prompts (`_in_turn`).

        Raises:
            CheckpointError: the logits are not finite.
        """
        # In the order of their slots: neighbours are attended together.
        decoding = sorted((s for s in self.running if s.status == "decode"), key=attrgetter("slot"))
        prefills = self._plan_prefill(len(decoding))
        # Beside prompts, a step takes long enough for those that decode: nothing is drafted.
        if not prefills:
            decoding = list(self.limit.take(decoding))
        batch = [*self._plan_decode(decoding, draft=not prefills and not self.limit.is_looking), *prefills]
        if batch:
            started_at = perf_counter()
            logits = self.model.forward([segment for _, segment in batch])
            best = argmax(logits)
            now = perf_counter()
            if prefills:
                rows = sum(len(segment.ids) for _, segment in prefills)
                self.prompt_rows.note(len(decoding), rows, now - started_at)
            else:
                self.drafter.note_step(len(best), now - started_at)
            self.limit.note(now - started_at)
            self._accept_rows(batch, logits, best, started_at, now)
        finished = [sequence for sequence, _ in batch if sequence.finished]
        # Those that generate nothing finish when what had to be read of their prompts has been read.
        for sequence in [sequence for sequence in self.running if not sequence.pending]:
            sequence.flush_text()
            self.finish(sequence, "length")
            finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason | None = None) -> None:
        """Take a sequence out, unless it is finished, and give its slot back; what it has generated stays readable.

        Args:
            reason: why the sequence ended by itself; None if the caller drops it.
        """
        if sequence.finished:
            return
        if reason is not None:
            sequence.finish_reason = reason
            # What was generated may be the beginning of the next prompt, as in a conversation.
            self._keep_prefix(sequence)
        self._hand_on_prompt(sequence)
        self.model.cache.release(sequence.slot)
        sequence.status = "finished"
        sequence.finished_at = perf_counter()
        self.running.remove(sequence)

    def _plan_prefill(self, decoding: int) -> Batch:
        """Take the next pieces of prompts, as many rows as fit beside `decoding` sequences that decode."""
        rows, scored_rows = PREFILL_ROWS, SCORED_ROWS
        if decoding:
            rows = min(self.prompt_rows.beside(decoding), self.model.max_rows - decoding)
        batch: Batch = []
        for sequence in self._in_turn():
            if not rows:
                break
            self._reuse_prefix(sequence)
            ids = sequence.pending[: min(rows, scored_rows) if sequence.unscored else rows]
            if not ids:
                continue
            rows -= len(ids)
            sequence.pending = sequence.pending[len(ids) :]
            if sequence.unscored:
                scored_rows -= len(ids)
                n_logits = len(ids)
            else:
                n_logits = 0 if sequence.pending else 1
            batch.append((sequence, Segment(sequence.slot, ids, n_logits)))
        self._count_rows_ahead(batch)
        return batch

    def _in_turn(self) -> list[Sequence]:
        """Return the sequences whose prompts are to be read, in the order in which they are.

        First those before which others have gone for long enough, in the order in which they came. Of the others, the
        more urgent ones, and of these the ones of which the least is left to read: a short prompt that comes while a
        long one is read does not wait for it, and costs it little.
        """
        waiting = [s for s in self.running if s.status == "prefill" and not self._awaits_sibling(s)]
        if len(waiting) < 2:
            return waiting
        overdue = [sequence for sequence in waiting if sequence.rows_ahead >= MOST_ROWS_AHEAD]
        others = [sequence for sequence in waiting if sequence.rows_ahead < MOST_ROWS_AHEAD]
        return overdue + sorted(others, key=lambda sequence: (-sequence.urgency, self._unread(sequence)))

    def _unread(self, sequence: Sequence) -> int:
        """Return how many tokens of a prompt are to be run, if it is read now."""
        left = len(sequence.pending)
        if self.model.cache.lengths[sequence.slot] or sequence.unscored:
            return left
        if any(sibling.status == "decode" for sibling in self._siblings(sequence)):
            return min(left, 1)
        if self.prefixes is None or sequence.request.prompt_logprobs is not None:
            return left
        return left - self.prefixes.known(sequence.pending[:-1])

    def _count_rows_ahead(self, batch: Batch) -> None:
        """Note of each prompt that is not read yet how many rows of others that came later go before it now."""
        rows = {sequence: len(segment.ids) for sequence, segment in batch}
        later = 0
        for sequence in reversed(self.running):
            if sequence.status == "prefill" and sequence.pending:
                sequence.rows_ahead += later
            later += rows.get(sequence, 0)

    def _plan_decode(self, decoding: list[Sequence], draft: bool) -> Batch:
        """Take each sequence's last token, with `draft` and the guesses to verify behind it."""
        if not draft or not decoding:
            return [(sequence, Segment(sequence.slot, sequence.pending)) for sequence in decoding]
        drafts = self.drafter.draft(decoding, self.model.max_rows - len(decoding))
        return [
            (sequence, Segment(sequence.slot, [*sequence.pending, *guesses], 1 + len(guesses)))
            for sequence, guesses in zip(decoding, drafts, strict=True)
        ]

    def _siblings(self, sequence: Sequence) -> list[Sequence]:
        """Return the other running texts of a text's prompt, in the order in which they came."""
        if sequence.request.texts == 1:
            return []
        # They have one list of prompt tokens, which no other sequence has.
        return [s for s in self.running if s.prompt_ids is sequence.prompt_ids and s is not sequence]

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Tell whether another text of the same prompt is the one to read the prompt."""
        if self.model.cache.lengths[sequence.slot]:
            return False
        siblings = self._siblings(sequence)
        if any(sibling.status == "decode" for sibling in siblings):
            return False
        return any(sibling.choice_index < sequence.choice_index for sibling in siblings)

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Have a prompt that now begins to be read begin behind what is known of it.

        This is not done when the prompt is admitted: of prompts that come together, the second finds what has been read
        of the first.
        """
        cache = self.model.cache
        # Of a prompt that is scored, every row's logits are wanted.
        if cache.lengths[sequence.slot] or sequence.unscored:
            return
        sibling = next((s for s in self._siblings(sequence) if s.status == "decode"), None)
        if sibling is not None:
            self._take_over(sequence, cache.copy(sibling.slot, sequence.slot, len(sequence.pending) - 1))
        # Of prompts that are scored, nothing was kept.
        elif self.prefixes is not None and sequence.request.prompt_logprobs is None:
            self._take_over(sequence, self.prefixes.copy_to(cache, sequence.slot, sequence.pending[:-1]))

    def _hand_on_prompt(self, sequence: Sequence) -> None:
        """Give what is known of a prompt to another of its texts, as a text that has read the prompt leaves.

        That is so if nobody else has it: where a text ends with its first token.
        """
        cache, siblings = self.model.cache, self._siblings(sequence)
        if cache.lengths[sequence.slot] < len(sequence.prompt_ids) or any(s.status == "decode" for s in siblings):
            return
        heir = next((s for s in siblings if s.pending and not (cache.lengths[s.slot] or s.unscored)), None)
        if heir is not None:
            self._take_over(heir, cache.copy(sequence.slot, heir.slot, len(heir.pending) - 1))

    def _take_over(self, sequence: Sequence, known: int) -> None:
        """Note that a prompt's first `known` tokens need not be run. The last is in any case, for what comes next."""
        sequence.cached_tokens, sequence.pending = known, sequence.pending[known:]

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep what there is of a sequence for others that begin alike; nothing of one that is scored."""
        if self.prefixes is None or sequence.request.prompt_logprobs is not None:
            return
        self.prefixes.keep(self.model.cache, sequence.slot, [*sequence.prompt_ids, *sequence.token_ids])

    def _accept_rows(self, batch: Batch, logits: Array, best: list[int], started_at: float, now: float) -> None:
        """Give each sequence its rows: logits [sum of n_logits, vocab_size], and the likeliest token of each."""
        begin = 0
        for sequence, segment in batch:
            sequence.step_seconds.append(now - started_at)
            end = begin + segment.n_logits
            if sequence.status == "decode":
                self._verify(sequence, segment, logits[begin:end], best[begin:end], now)
            else:
                if sequence.unscored:
                    self._score_prompt(sequence, logits[begin:end])
                self._keep_prefix(sequence)
                # The last row of a prompt tells what comes next.
                if not sequence.pending and sequence.max_new_tokens:
                    self._accept(sequence, logits[end - 1], best[end - 1], now)
            begin = end

    def _score_prompt(self, sequence: Sequence, logits: Array) -> None:
        """Note how likely the prompt's next tokens were: each row is about the token that follows the row's own."""
        k = sequence.request.prompt_logprobs
        assert k is not None
        scored, sequence.unscored = sequence.unscored[: len(logits)], sequence.unscored[len(logits) :]
        # The last row of all is about the first token to be generated.
        for row, (token_id, offset) in zip(logits, scored, strict=False):
            sequence.prompt_logprobs.append(token_logprob(self.tokenizer, row, token_id, k, offset))

    def _verify(self, sequence: Sequence, segment: Segment, logits: Array, best: list[int], now: float) -> None:
        """Accept the token that follows the last one, and the one after each guess as long as the guesses come true.

        The cache then holds what has come true, and no more.
        """
        slot, guesses = segment.slot, segment.ids[1:]
        length, accepted = self.model.cache.lengths[slot] - len(guesses), 0
        for row, token_id in zip(logits, best, strict=True):
            self.model.cache.truncate(slot, length + accepted)
            self._accept(sequence, row, token_id, now)
            if sequence.finished or accepted == len(guesses) or sequence.token_ids[-1] != guesses[accepted]:
                break
            accepted += 1
        sequence.steps += 1
        sequence.drafted += len(guesses)
        sequence.accepted += accepted
        self.drafter.note_verified(sequence, len(guesses), accepted)

    def _accept(self, sequence: Sequence, logits: Array, best: int, now: float) -> None:
        """Append the next token to a sequence, and finish the sequence where a stop rule says so.

        The least length is that of transformers' `MinNewTokensLengthLogitsProcessor`: `min_new_tokens` tokens come
        before the first that may be an end of text or a stop token. Where none is to end the text, none is passed over.
        """
        request, token_id, end_ids = sequence.request, best, sequence.end_ids
        may_end = len(sequence.token_ids) >= sequence.least_new_tokens
        if sequence.chooser is not None:
            try:
                token_id = sequence.chooser.choose(logits)
                if not (may_end and token_id in end_ids):
                    sequence.chooser.push(token_id)
            except BadRequest as error:
                sequence.error = error
                self.finish(sequence)
                return
        elif best in end_ids and not may_end:
            others = logits.copy()
            others[list(end_ids)] = -np.inf
            token_id = int(others.argmax())
        is_end = may_end and token_id in end_ids
        # As in transformers, the model's own end is text if it is no special token; as in vLLM, a stop token is not.
        is_eos = is_end and token_id in sequence.eos_token_ids
        is_text = not is_end or (is_eos and not self.tokenizer.is_special(token_id))
        if not is_text:
            sequence.flush_text()
        if request.logprobs is not None:
            offset = _text_offset(sequence, token_id, is_text)
            told = token_logprob(self.tokenizer, logits, token_id, request.logprobs, offset)
            sequence.logprobs.append(replace(told, special=True) if is_eos else told)
            assert told.logprob is not None
            sequence.logprob_sum += told.logprob
        elif sequence.sums_logprobs:
            sequence.logprob_sum += logprob_of(logits, token_id)
        if sequence.status == "prefill":
            sequence.status = "decode"
            sequence.first_token_at = now
        sequence.token_ids.append(token_id)
        sequence.pending = [token_id]
        self.drafter.note_token(sequence, token_id)
        if is_text and sequence.append_text(token_id):
            self.finish(sequence, "stop")
        elif is_end:
            if is_text:
                sequence.flush_text()
            sequence.stop_reason = None if is_eos else token_id
            self.finish(sequence, "stop")
        elif sequence.chooser is not None and sequence.chooser.is_complete:
            sequence.flush_text()
            self.finish(sequence, "stop")
        elif len(sequence.token_ids) >= sequence.max_new_tokens:
            sequence.flush_text()
            self.finish(sequence, "length")


def argmax(logits: Array) -> list[int]:
    """Return the likeliest token of each row [rows, vocab_size]; raise CheckpointError if its value is not finite."""
    # Row by row: over an axis, numpy would copy the logits first. A NaN, if there is one, is the largest.
    best = [int(row.argmax()) for row in logits]
    if not all(math.isfinite(row[token_id]) for row, token_id in zip(logits, best, strict=True)):
        raise CheckpointError("the model computes values that are not finite: its weights are damaged; fetch it again")
    return best


def _text_offset(sequence: Sequence, token_id: int, is_text: bool) -> int:
    """Return where in the text a token begins that is about to be appended; what is no text stands at its end."""
    offset = len(sequence.text) + (sequence.detokenizer.begin(token_id) if is_text else 0)
    # What was held back may have come out shorter than it was.
    return max(offset, sequence.logprobs[-1].text_offset) if sequence.logprobs else offset
