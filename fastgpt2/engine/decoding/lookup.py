"""Drafts: what a sequence may go on with, guessed from what it has said before, to be verified in one step.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), a form of speculative
decoding (Leviathan et al. 2023): where the last tokens have occurred before, what followed then is run along with the
next token, a row of the step each. As far as the rows before agree with a guess, its own row tells the token after it.
Greedy decoding makes that lossless: a token is taken if it is the likeliest, and for no other reason.

How often guesses come true is found out for nothing: each token that is generated anyway is compared with the guess
that there was for it, whether that had been drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterable

# The last so many tokens must have occurred before. One alone is followed by the same as before once in six times.
NGRAM = 2

# Guesses verified in a step, of one sequence, at most.
MOST_DRAFTS = 15

# Matches are measured up to here; longer ones go on in nineteen of twenty cases.
LONGEST_MATCH = 32

# How often a match was found to go on, in greedy texts of a small model and in Shakespeare alike: by the bits of its
# length, so of less than `NGRAM` (there are none), of 2 and 3 tokens, of 4 to 7, 8 to 15, 16 to 31, 32 and more. Weighs
# as much as so many trials.
_PRIOR = (0.0, 0.0, 0.38, 0.65, 0.75, 0.86, 0.95)
_PRIOR_TRIALS = 8.0

# Trials remembered: what the jobs of the last while were like counts, not those of a week ago.
_REMEMBERED = 500.0


class Lookup:
    """The tokens of one sequence, and where in them it may be now.

    Attributes:
        match: how many tokens before the guess have occurred in this order before; 0 without a guess.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        # Where each n-gram ended when it occurred last: the index of what followed.
        self._ends: dict[tuple[int, ...], int] = {}
        self._next = 0
        self.match = 0
        for token_id in ids:
            self.push(token_id)

    @property
    def guess(self) -> int | None:
        """The token expected next."""
        return self._ids[self._next] if self.match else None

    def push(self, token_id: int) -> None:
        """Go on by the token that came."""
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
            self._next, self.match = before, self._common_end(before)
        else:
            self.match = 0

    def _common_end(self, before: int) -> int:
        """How many tokens up to here are those up to an earlier place."""
        ids, length = self._ids, NGRAM
        while length < min(LONGEST_MATCH, before) and ids[-1 - length] == ids[before - 1 - length]:
            length += 1
        return length

    def draft(self, most: int) -> list[int]:
        """What may come next, as many tokens as asked for, or none. Where they run into the end, they begin anew."""
        if not self.match:
            return []
        period = len(self._ids) - self._next
        return [self._ids[self._next + i % period] for i in range(most)]


class Rate:
    """How often something comes true, as far as that is remembered."""

    def __init__(self, prior: float) -> None:
        self._trials, self._hits = _PRIOR_TRIALS, _PRIOR_TRIALS * prior

    def note(self, hit: bool) -> None:
        self._trials += 1
        self._hits += hit
        if self._trials > _REMEMBERED:
            self._trials /= 2
            self._hits /= 2

    @property
    def value(self) -> float:
        return self._hits / self._trials


class Acceptance:
    """How often guesses come true, by the length of the match that they go back to."""

    def __init__(self) -> None:
        self._rates = [Rate(prior) for prior in _PRIOR]

    def note(self, match: int, hit: bool) -> None:
        """A token came where there was a guess."""
        self._rates[match.bit_length()].note(hit)

    def rate(self, match: int) -> float:
        return self._rates[match.bit_length()].value

    def chances(self, match: int, most: int) -> list[float]:
        """Of each of so many drafted tokens, how likely it is taken: it and all before it come true."""
        chances, chance = [], 1.0
        for i in range(most if match else 0):
            chance *= self.rate(min(match + i, LONGEST_MATCH))
            chances.append(chance)
        return chances
