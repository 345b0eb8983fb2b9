"""The chooser takes the next token of one text, where that is not simply the likeliest one.

The scores go through the logits processors and the grammar, if there are any. Then the likeliest token is taken, or
one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.logits_processors import LogitsProcessors
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sampler import Sampler, Scratch
from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.grammar import Matcher


class Chooser:
    """Chooses the tokens of one text.

    Args:
        processors: those of the text, which have taken in its prompt.
        sampler: draws the tokens; None to take the likeliest.
        matcher: the text's place in its grammar; None if it has none.
        end_ids: the tokens that end the text.
        least_new_tokens: how many tokens come before the first that may be one of these.
        scratch: rows to compute in.
    """

    def __init__(
        self,
        processors: LogitsProcessors,
        sampler: Sampler | None,
        matcher: Matcher | None,
        end_ids: Iterable[int],
        least_new_tokens: int,
        scratch: Scratch,
    ) -> None:
        self._processors, self._sampler, self._matcher = processors, sampler, matcher
        self._end_ids = np.array(sorted(end_ids), np.intp)
        self._least_new_tokens, self._scores = least_new_tokens, scratch.scores
        self._length = self._guesses = 0
        self._guesses_end = False

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing can follow the text so far."""
        return self._matcher is not None and self._matcher.is_complete

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return the next token, by the model's own logits [vocab_size], which are not changed.

        Where everything is banned, the token is 0, as in transformers' greedy search.

        Raises:
            BadRequest: the grammar has met a limit.
        """
        scores = self._scores
        np.copyto(scores, logits)
        self._processors.apply(scores)
        may_end = self._length >= self._least_new_tokens
        if self._matcher is not None:
            self._guide(self._matcher, scores, logits, may_end)
        elif not may_end:
            scores[self._end_ids] = -np.inf
        return int(scores.argmax()) if self._sampler is None else self._sampler.draw(scores, self._length)

    def _guide(self, matcher: Matcher, scores: NDArray[np.float32], logits: NDArray[np.float32], may_end: bool) -> None:
        """Leave what the grammar allows. Where the processors have banned all of that, the grammar goes before them.

        A token that ends the text is allowed where the text is complete, and nowhere else, be it a part of the text.
        """
        kept = scores[self._end_ids] if may_end and matcher.may_end else -np.inf
        matcher.mask(scores)
        scores[self._end_ids] = kept
        if scores.max() == -np.inf:
            np.copyto(scores, logits)
            matcher.mask(scores)
            scores[self._end_ids] = logits[self._end_ids] if may_end and matcher.may_end else -np.inf
        if scores.max() == -np.inf:
            raise BadRequest("every token that may come next would end the text, which is not complete: allow others")

    def push(self, token_id: int) -> None:
        """Take in the text's next token, which is no end of it.

        Raises:
            BadRequest: the grammar has met a limit.
        """
        if self._matcher is not None:
            self._matcher.push(token_id)
        self._processors.push(token_id)
        self._length += 1

    def pop(self) -> None:
        """Forget the token that was pushed last."""
        self._length -= 1
        self._processors.pop()
        if self._matcher is not None:
            self._matcher.pop()

    def guess(self, logits: NDArray[np.float32]) -> int | None:
        """Return the next token by a draft model's logits [vocab_size]; None if nothing can follow the guesses so far.

        The guess counts as the text's token until `forget_guesses`. The same random numbers choose it as will choose
        by the network's own logits, so that what is drawn is mostly the same.
        """
        if self._guesses_end:
            return None
        try:
            token_id = self.choose(logits)
            if token_id in self._end_ids:
                self._guesses_end = True
            else:
                self.push(token_id)
                self._guesses += 1
                self._guesses_end = self.is_complete
        except BadRequest:  # which the network's own token meets as well
            self._guesses_end = True
            return None
        return token_id

    def forget_guesses(self) -> None:
        """Have the text end where it ended before the guesses."""
        for _ in range(self._guesses):
            self.pop()
        self._guesses, self._guesses_end = 0, False


def new_chooser(
    request: GenerationRequest,
    choice_index: int,
    prompt_ids: Sequence[int],
    bad_words: Iterable[tuple[int, ...]],
    matcher: Matcher | None,
    end_ids: frozenset[int],
    least_new_tokens: int,
    scratch: Scratch,
) -> Chooser | None:
    """Return the chooser of a new text; None if the likeliest token is to be taken, whatever came before."""
    processors = LogitsProcessors(request, prompt_ids, bad_words)
    sampler = Sampler(request, choice_index, scratch) if request.samples else None
    if not processors and sampler is None and matcher is None:
        return None
    return Chooser(processors, sampler, matcher, end_ids, least_new_tokens, scratch)
