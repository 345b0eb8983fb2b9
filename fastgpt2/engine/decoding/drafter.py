"""The drafter decides which guesses the next step verifies.

Speculative decoding (Leviathan et al. 2023): a step runs guesses of what comes next beside each sequence's next token,
a row for each guess, whose result is the token after it, and accepts them as long as they come true. The guesses are
looked up in the sequence itself (`lookup.py`), or a draft model makes them: the network's second set of weights, if it
has one. The drafter takes whichever is expected to gain more.

A row more makes a step longer, for everybody in it. So a plan needs two things: how likely guesses come true, which is
learnt from every token that comes (`Acceptance`, `Rate`), and what a step costs by its number of rows, which is learnt
from every step (`StepCosts`). Of all plans, the one with the most tokens a second is taken, if no sequence is expected
to be slower by it than without guesses.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from time import perf_counter

from fastgpt2.engine.decoding.lookup import MOST_DRAFTS, Acceptance, Lookup, Rate
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import DRAFT_WEIGHTS, Segment
from fastgpt2.engine.network.step_costs import StepCosts

# A step may take this much longer for a sequence than what the sequence gains by it.
TOLERANCE = 0.03

# Drafting must be expected to gain at least this factor, as costs are not known better than that.
LEAST_DRAFT_GAIN = 1.02

# A step verifies at most this many guesses, of all sequences together.
MOST_DRAFT_ROWS = 32

# The draft model makes at most this many steps before a step that verifies them.
MOST_DRAFT_STEPS = 8

# At first sight this share of the draft model's guesses comes true; and its step takes this share of a step that
# verifies, until one was seen.
_PRIOR_RATE, _PRIOR_COST = 0.9, 0.35

# Of the steps in which more guesses would pay if rows were cheap, a trial takes this many. Every second one tries
# whether rows are, with twice the guesses and at least `_TRIAL_GUESSES`. The next trial comes after twice the number of
# steps, within these bounds. What was once measured as dear would else never be seen to be cheap.
_TRIAL_STEPS, _TRIAL_GUESSES = 6, 3
_LEAST_BETWEEN_TRIALS, _MOST_BETWEEN_TRIALS = 50, 3200

# What a row costs if it is cheap, as a share of a step without it.
_CHEAP_SHARE = 0.05


class Drafter:
    """The drafts of one decoder's sequences.

    Args:
        most: look up this many guesses of each sequence that has any, 0 for none at all; None for as many as pay.
        costs: what steps cost here, with what was measured of it; None if nothing is known.

    Attributes:
        costs: the same, with what was learnt since.
    """

    def __init__(self, model: GPT2, most: int | None = 0, costs: StepCosts | None = None) -> None:
        self._model, self._most = model, most
        self.costs, self._model_costs = costs or StepCosts(), StepCosts()
        # Of greedy texts, and of those whose tokens are chosen otherwise: their guesses come true less often.
        self._acceptances = Acceptance(), Acceptance()
        self._model_rates = Rate(_PRIOR_RATE), Rate(_PRIOR_RATE)
        self._by_model = False
        self._steps, self._next_trial, self._between_trials = 0, _LEAST_BETWEEN_TRIALS, _LEAST_BETWEEN_TRIALS
        self._trial_steps = 0

    def warm_up(self) -> None:
        cache = self._model.cache
        if self._model.can_draft and cache.has_room(1):
            slot = cache.allot(1)
            self._model.forward([Segment(slot, [0])], DRAFT_WEIGHTS)
            cache.release(slot)

    def lookup_for(self, ids: Seq[int], max_new_tokens: int) -> Lookup | None:
        """Return a new sequence's lookup; None if nothing will be guessed: its first token and its last never are."""
        return Lookup(ids) if self._most != 0 and max_new_tokens > 2 else None

    def draft(self, sequences: Seq[Sequence], rows: int) -> list[list[int]]:
        """Return the guesses to verify of each sequence that the next step decodes, at most `rows` in all."""
        room = [sequence.max_new_tokens - len(sequence.token_ids) - 1 for sequence in sequences]
        lookups = [sequence.lookup for sequence in sequences]
        self._by_model = False
        if self._most is not None:
            counts = _fixed_counts(lookups, room, self._most, rows)
        else:
            counts, gain = self._plan_lookups(sequences, room, rows)
            if self._model.can_draft:
                rates = [self._model_rates[sequence.chooser is not None].value for sequence in sequences]
                rate, cost = sum(rates) / len(rates), self.costs.seconds
                steps, model_gain = plan_model_drafts(len(sequences), rate, self._model_cost, cost)
                if steps and model_gain > gain:
                    self._by_model = True
                    return self._draft_by_model(sequences, [min(steps, left) for left in room])
        return [
            lookup.draft(count) if lookup is not None and count else []
            for lookup, count in zip(lookups, counts, strict=True)
        ]

    def _plan_lookups(self, sequences: Seq[Sequence], room: Seq[int], rows: int) -> tuple[list[int], float]:
        most = min(MOST_DRAFTS, rows // max(1, len(sequences)))
        chances = [
            self._acceptance(sequence).chances(sequence.lookup.match, min(most, left)) if sequence.lookup else []
            for sequence, left in zip(sequences, room, strict=True)
        ]
        if not any(chances):
            return [0] * len(sequences), 1.0
        counts, gain = plan_drafts(chances, self.costs.seconds)
        if self._steps >= self._next_trial:
            return self._try_more(chances, counts), gain
        return counts, gain

    def _try_more(self, chances: Seq[Seq[float]], planned: list[int]) -> list[int]:
        """Return the guesses of a trial of how dear rows are: those that would pay if rows were cheap."""
        base = len(chances)
        most = base + max(_TRIAL_GUESSES, 2 * sum(planned))
        counts, _ = plan_drafts(chances, lambda rows: 1 + _CHEAP_SHARE * (rows - base) if rows <= most else math.inf)
        if sum(counts) <= sum(planned):
            return planned
        self._trial_steps += 1
        is_plain = self._trial_steps % 2 == 0
        if self._trial_steps == _TRIAL_STEPS:
            self._next_trial, self._trial_steps = self._steps + self._between_trials, 0
            self._between_trials = min(2 * self._between_trials, _MOST_BETWEEN_TRIALS)
        return planned if is_plain else counts

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        return self._acceptances[sequence.chooser is not None]

    def _model_cost(self, rows: int) -> float:
        return self._model_costs.seconds(rows) if self._model_costs.known else _PRIOR_COST * self.costs.seconds(rows)

    def _draft_by_model(self, sequences: Seq[Sequence], counts: Seq[int]) -> list[list[int]]:
        """Return what the draft model goes on with, one token a step, from the network's own keys and values."""
        cache = self._model.cache
        drafts: list[list[int]] = [[] for _ in sequences]
        slots = [sequence.slot for sequence in sequences]
        lengths = [cache.lengths[slot] for slot in slots]
        last = [sequence.token_ids[-1] for sequence in sequences]
        for k in range(max(counts)):
            drafting = [i for i, count in enumerate(counts) if k < count and k == len(drafts[i])]
            if not drafting:
                break
            started = perf_counter()
            logits = self._model.forward([Segment(slots[i], [last[i]]) for i in drafting], DRAFT_WEIGHTS)
            for i, row in zip(drafting, logits, strict=True):
                chooser = sequences[i].chooser
                guess = int(row.argmax()) if chooser is None else chooser.guess(row)
                if guess is not None:
                    last[i] = guess
                    drafts[i].append(guess)
            self._model_costs.note(len(drafting), perf_counter() - started)
        for sequence in sequences:
            if sequence.chooser is not None:
                sequence.chooser.forget_guesses()
        # The step that verifies replaces the keys and values of the draft model.
        for slot, length in zip(slots, lengths, strict=True):
            cache.truncate(slot, length)
        return drafts

    def note_token(self, sequence: Sequence, token_id: int) -> None:
        """Learn from a sequence's next token, however it came."""
        lookup = sequence.lookup
        if lookup is None:
            return
        if lookup.match:
            self._acceptance(sequence).note(lookup.match, lookup.guess == token_id)
        lookup.push(token_id)

    def note_verified(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how many of a sequence's guesses in this step came true, one after the other."""
        if self._by_model:
            # Behind the first guess that did not come true, nothing was tried.
            for i in range(min(drafted, accepted + 1)):
                self._model_rates[sequence.chooser is not None].note(i < accepted)

    def note_step(self, rows: int, seconds: float) -> None:
        """Learn how long a step without prompts took."""
        self._steps += 1
        self.costs.note(rows, seconds)


def _fixed_counts(lookups: Seq[Lookup | None], room: Seq[int], most: int, rows: int) -> list[int]:
    """Return `most` guesses for each sequence that has any, as far as its own room and the step's rows go."""
    counts = []
    for lookup, left in zip(lookups, room, strict=True):
        count = min(most, left, rows) if lookup is not None and lookup.match else 0
        counts.append(count)
        rows -= count
    return counts


def plan_drafts(chances: Seq[Seq[float]], cost: Callable[[int], float]) -> tuple[list[int], float]:
    """Return how many guesses to verify of each sequence, and by which factor that gives more tokens a second.

    The plan gives the most tokens a second of those in which no sequence is expected to be slower than without guesses,
    beyond `TOLERANCE`. Guesses are added in the order of their chances, so that only their number is to be chosen.

    Args:
        chances: for each sequence that has a token to run in this step, and for each of its guesses, the chance that
            the guess and all before it come true; falling.
        cost: of a step, by its rows.
    """
    base = len(chances)
    plain = cost(base)
    heap = [(-of_guesses[0], i) for i, of_guesses in enumerate(chances) if of_guesses]
    heapq.heapify(heap)
    counts, gains = [0] * base, [1.0] * base
    best, best_gain = list(counts), 1.0
    rows, tokens = base, float(base)
    while heap and rows < base + MOST_DRAFT_ROWS:
        chance, i = heapq.heappop(heap)
        gains[i] -= chance
        counts[i] += 1
        rows, tokens = rows + 1, tokens - chance
        if counts[i] < len(chances[i]):
            heapq.heappush(heap, (-chances[i][counts[i]], i))
        longer = cost(rows) / plain
        gain = tokens / base / longer
        if gain > max(best_gain, LEAST_DRAFT_GAIN) and min(gains) >= longer * (1 - TOLERANCE):
            best, best_gain = list(counts), gain
    return best, best_gain


def plan_model_drafts(
    sequences: int, rate: float, draft_cost: Callable[[int], float], cost: Callable[[int], float]
) -> tuple[int, float]:
    """Return how many tokens the draft model is to guess of each sequence, and the factor in tokens a second.

    Leviathan et al. 2023, with the costs as they are here: k steps of the draft model and one that verifies give
    1 + p + ... + p^k tokens of each sequence.

    Args:
        rate: p, how likely a guess comes true if those before it did.
        draft_cost, cost: of the draft model's step, and of one that verifies, by its rows.
    """
    best, best_gain, tokens = 0, 1.0, 1.0
    plain, draft_step = cost(sequences), draft_cost(sequences)
    for k in range(1, MOST_DRAFT_STEPS + 1):
        if sequences * k > MOST_DRAFT_ROWS:
            break
        tokens += rate**k
        gain = tokens * plain / (k * draft_step + cost(sequences * (1 + k)))
        if gain > max(best_gain, LEAST_DRAFT_GAIN):
            best, best_gain = k, gain
    return best, best_gain
