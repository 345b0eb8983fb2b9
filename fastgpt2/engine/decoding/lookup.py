"""Prompt lookup: the next tokens of a sequence are guessed from what the sequence has said before.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) is a form of speculative
decoding (`drafter.py`). Where the last tokens have occurred before, what followed them then is a draft. That is
lossless: a guess is accepted if it is the token that is chosen anyway, the likeliest or the one that the text's own
random number draws, and for no other reason.

It costs nothing to learn how often guesses come true: each token that is generated anyway is compared with the guess
that there was for it, whether that guess had been drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterable

# The last NGRAM tokens must have occurred before. One token alone is followed by the same as before once in six times.
NGRAM = 2

# A step verifies at most this many guesses of one sequence.
MOST_DRAFTS = 15

# Matches are measured up to this length; longer ones go on in nineteen of twenty cases.
LONGEST_MATCH = 32

# How often a match was found to go on, in greedy texts of a small model and in Shakespeare alike. The index is the
# number of bits of the match's length: 0 and 1 stand for less than `NGRAM` (there are no such matches), then come 2 and
# 3 tokens, 4 to 7, 8 to 15, 16 to 31, 32 and more. The prior weighs as much as `_PRIOR_TRIALS` trials.
_PRIOR = (0.0, 0.0, 0.38, 0.65, 0.75, 0.86, 0.95)
_PRIOR_TRIALS = 8.0

# At most this many trials are remembered: what the jobs of the last while were like counts, not those of a week ago.
_REMEMBERED = 500.0


class Lookup:
    """The tokens of one sequence, and the earlier place in them that the sequence may be repeating now.

    Attributes:
        match: how many tokens before the guess have occurred in this order before; 0 if there is no guess.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        # Where each n-gram ended when it occurred last: the index of what followed.
        self._ends: dict[tuple[int, ...], int] = {}
        self._next = self.match = 0
        for token_id in ids:
            self.push(token_id)

    @property
    def guess(self) -> int | None:
        """Return the token expected next; None if there is no match."""
        return self._ids[self._next] if self.match else None

    def push(self, token_id: int) -> None:
        ids = self._ids
        goes_on = self.match > 0 and ids[self._next] == token_id
        ids.append(token_id)
        if len(ids) < NGRAM:
            return
        ngram = tuple(ids[-NGRAM:])
        before = self._ends.get(ngram)
        self._ends[ngram] = len(ids)
        if goes_on:
            self._next += 1
            self.match = min(self.match + 1, LONGEST_MATCH)
        elif before is not None:
            self._next, self.match = before, self._common_length(before)
        else:
            self.match = 0

    def _common_length(self, before: int) -> int:
        """Count the last tokens that equal those before an earlier place, up to `LONGEST_MATCH`."""
        ids, length = self._ids, NGRAM
        while length < min(LONGEST_MATCH, before) and ids[-1 - length] == ids[before - 1 - length]:
            length += 1
        return length

    def draft(self, count: int) -> list[int]:
        """Return `count` tokens that may come next; [] if there is no match.

        Where the guesses run into the end of what there is, they go on with the first guess again.
        """
        if not self.match:
            return []
        period = len(self._ids) - self._next
        return [self._ids[self._next + i % period] for i in range(count)]


class Rate:
    """A rate: how often something comes true, in the trials that are remembered."""

    def __init__(self, prior: float) -> None:
        self._trials, self._hits = _PRIOR_TRIALS, _PRIOR_TRIALS * prior

    def note(self, hit: bool) -> None:
        self._trials += 1
        if hit:
            self._hits += 1
        if self._trials > _REMEMBERED:
            self._trials /= 2
            self._hits /= 2

    @property
    def value(self) -> float:
        return self._hits / self._trials


class Acceptance:
    """The acceptance of guesses: how often they come true, by the length of the match that they follow."""

    def __init__(self) -> None:
        self._rates = [Rate(prior) for prior in _PRIOR]

    def note(self, match: int, hit: bool) -> None:
        """Note whether the guess after a match of this length came true."""
        self._rates[match.bit_length()].note(hit)

    def rate(self, match: int) -> float:
        return self._rates[match.bit_length()].value

    def chances(self, match: int, most: int) -> list[float]:
        """Return how likely each of the next `most` guesses comes true with all before it; [] without a match."""
        chances, chance = [], 1.0
        for i in range(most if match else 0):
            chance *= self.rate(min(match + i, LONGEST_MATCH))
            chances.append(chance)
        return chances
