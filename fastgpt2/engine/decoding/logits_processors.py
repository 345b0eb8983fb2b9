"""Logits processors: what a request does to the scores of a text's next token before the token is chosen.

They are transformers' processors, to the letter and in their order (`_get_logits_processor` in generation/utils.py).
OpenAI's two penalties, which transformers has not, stand behind the repetition penalty, as in vLLM.

A text grows at its end alone, and what drafts put there is taken off again: each processor keeps what it needs of the
tokens by `push` and `pop`, so that a token costs the same however long the text is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.records import GenerationRequest

Scores = NDArray[np.float32]


class LogitsProcessor:
    """A processor of the scores [vocab_size] of one text's next token."""

    def apply(self, scores: Scores) -> None:
        """Change the scores in place."""
        raise NotImplementedError

    def push(self, tokens: Sequence[int]) -> None:
        """Take in the last of the tokens, which are the prompt's and the text's."""

    def pop(self, tokens: Sequence[int]) -> None:
        """Forget the last of the tokens, which is still there."""


class LogitsProcessors:
    """The processors that a request asks for, for one text.

    Args:
        prompt_ids: the tokens before the text.
        bad_words: the tokens of the request's `bad_words`; no end of text among them, which may always come.
    """

    def __init__(
        self, request: GenerationRequest, prompt_ids: Sequence[int], bad_words: Iterable[tuple[int, ...]] = ()
    ) -> None:
        self._processors = _processors_of(request, len(prompt_ids), list(bad_words))
        self._tokens: list[int] = []
        if self._processors:
            for token_id in prompt_ids:
                self.push(token_id)

    def __bool__(self) -> bool:
        return bool(self._processors)

    def apply(self, scores: Scores) -> None:
        """Process the scores [vocab_size] of the next token, in place."""
        for processor in self._processors:
            processor.apply(scores)

    def push(self, token_id: int) -> None:
        """Take in the text's next token."""
        self._tokens.append(token_id)
        for processor in self._processors:
            processor.push(self._tokens)

    def pop(self) -> None:
        """Forget the last token."""
        for processor in self._processors:
            processor.pop(self._tokens)
        self._tokens.pop()


def _processors_of(
    request: GenerationRequest, prompt_tokens: int, bad_words: list[tuple[int, ...]]
) -> list[LogitsProcessor]:
    """Return the processors that a request asks for, in their order; none for a value that does nothing."""
    processors: list[LogitsProcessor] = []
    if request.logit_bias:
        processors.append(LogitBias(list(request.logit_bias), list(request.logit_bias.values())))
    if request.repetition_penalty not in (None, 1):
        assert request.repetition_penalty is not None
        processors.append(RepetitionPenalty(request.repetition_penalty))
    if request.presence_penalty or request.frequency_penalty:
        presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
        processors.append(CountPenalties(presence, frequency, prompt_tokens))
    if request.no_repeat_ngram_size:
        processors.append(NoRepeatNgram(request.no_repeat_ngram_size))
    if bad_words:
        processors.append(BadWords(bad_words))
    if request.suppress_tokens:
        processors.append(SuppressTokens(request.suppress_tokens))
    return processors


class LogitBias(LogitsProcessor):
    """Adds a bias to the scores of some tokens, as OpenAI's `logit_bias` and transformers' `sequence_bias`."""

    def __init__(self, token_ids: Sequence[int], biases: Sequence[float]) -> None:
        self._ids, self._biases = np.array(token_ids, np.intp), np.array(biases, np.float32)

    def apply(self, scores: Scores) -> None:
        scores[self._ids] += self._biases


class TokenCounts:
    """The different tokens of a growing text, in the order in which they came first, and how often each has come."""

    def __init__(self) -> None:
        self._ids, self._counts = np.empty(256, np.intp), np.zeros(256, np.float32)
        self._places: dict[int, int] = {}

    @property
    def ids(self) -> NDArray[np.intp]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def remove(self, token_id: int) -> None:
        """Take back the token that was added last."""
        place = self._places[token_id]
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._places[token_id]


class RepetitionPenalty(LogitsProcessor):
    """Divides the scores of the tokens that there are, or multiplies them where they are negative.

    Source: Keskar et al. 2019, "CTRL"; transformers' `RepetitionPenaltyLogitsProcessor`.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty, self._found = penalty, TokenCounts()

    def apply(self, scores: Scores) -> None:
        ids = self._found.ids
        found = scores[ids]
        scores[ids] = np.where(found < 0, found * self._penalty, found / self._penalty)

    def push(self, tokens: Sequence[int]) -> None:
        self._found.add(tokens[-1])

    def pop(self, tokens: Sequence[int]) -> None:
        self._found.remove(tokens[-1])


class CountPenalties(LogitsProcessor):
    """Subtracts `presence` from the score of each token that was generated, and `frequency` once for each time.

    The prompt's tokens do not count. Source: OpenAI's API reference, "Frequency and presence penalties".
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence, self._frequency, self._prompt_tokens = presence, frequency, prompt_tokens
        self._generated = TokenCounts()

    def apply(self, scores: Scores) -> None:
        scores[self._generated.ids] -= self._generated.counts * self._frequency + self._presence

    def push(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._prompt_tokens:
            self._generated.add(tokens[-1])

    def pop(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._prompt_tokens:
            self._generated.remove(tokens[-1])


class NoRepeatNgram(LogitsProcessor):
    """Bans each token that would repeat `size` tokens in a row, as transformers' `NoRepeatNGramLogitsProcessor`."""

    def __init__(self, size: int) -> None:
        self._size = size
        # What has followed on each `size` - 1 tokens.
        self._followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._last: tuple[int, ...] = ()

    def apply(self, scores: Scores) -> None:
        scores[self._followers.get(self._last, [])] = -np.inf

    def push(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self._size:
            self._followers[self._last].append(tokens[-1])
        self._last = tuple(tokens[1 - self._size :]) if self._size > 1 else ()

    def pop(self, tokens: Sequence[int]) -> None:
        self._last = tuple(tokens[-self._size : -1])
        if len(tokens) >= self._size:
            self._followers[self._last].pop()


class BadWords(LogitsProcessor):
    """Bans the last token of each word whose other tokens stand at the end, as transformers' `NoBadWords...`.

    Args:
        words: each at least one token.
    """

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        # By the token before the last: that token and those before it, and the last.
        self._longer: defaultdict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        single = set[int]()
        for word in words:
            if len(word) == 1:
                single.add(word[0])
            else:
                self._longer[word[-2]].append((word[:-1], word[-1]))
        self._single = np.array(sorted(single), np.intp)
        self._tokens: Sequence[int] = ()

    def apply(self, scores: Scores) -> None:
        scores[self._single] = -np.inf
        for before, last in self._longer.get(self._tokens[-1], ()) if self._tokens else ():
            if tuple(self._tokens[-len(before) :]) == before:
                scores[last] = -np.inf

    def push(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens  # the one list, which grows and shrinks


class SuppressTokens(LogitsProcessor):
    """Bans some tokens."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids = np.array(token_ids, np.intp)

    def apply(self, scores: Scores) -> None:
        scores[self._ids] = -np.inf
