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
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from time import perf_counter

from fastgpt2.engine.decoding.lookup import MOST_DRAFTS, Acceptance, Lookup, Rate
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import DRAFT_WEIGHTS, Segment

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

# What a row beside another costs, as a share of the first row, where nothing was measured.
_ASSUMED_SHARE = 0.05

# How much one step counts for what is known of its kind. A quicker one counts more, as a disturbance only ever adds.
# One that takes `_DISTURBED` times as long as expected, or longer, was disturbed, and counts as that much.
_WEIGHT, _WEIGHT_IF_QUICKER, _DISTURBED = 0.15, 0.4, 3.0

# After this many steps, other numbers of rows tell more: something else may share the machine by then.
_STALE_STEPS = 300


class Drafter:
    """The drafts of one decoder's sequences.

    Args:
        most: look up this many guesses of each sequence that has any, 0 for none at all; None for as many as pay.
        measured: what steps cost here, as `StepCosts` takes it.
    """

    def __init__(self, model: GPT2, most: int | None = 0, measured: Mapping[int, float] | None = None) -> None:
        self._model, self._most = model, most
        self._costs, self._model_costs = StepCosts(measured), StepCosts()
        # Of greedy texts, and of those whose tokens are chosen otherwise: their guesses come true less often.
        self._acceptances = Acceptance(), Acceptance()
        self._model_rates = Rate(_PRIOR_RATE), Rate(_PRIOR_RATE)
        self._by_model = False

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
                rate, cost = sum(rates) / len(rates), self._costs.seconds
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
        return plan_drafts(chances, self._costs.seconds)

    def _acceptance(self, sequence: Sequence) -> Acceptance:
        return self._acceptances[sequence.chooser is not None]

    def _model_cost(self, rows: int) -> float:
        return self._model_costs.seconds(rows) if self._model_costs.known else _PRIOR_COST * self._costs.seconds(rows)

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
        self._costs.note(rows, seconds)


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


class StepCosts:
    """The seconds that a step takes by its number of rows, on this machine as it is now.

    What was seen lately counts, as it is. What was not seen lately is derived from the nearest number of rows that was,
    by how the two compared when the machine was measured.

    Args:
        measured: seconds by rows of some steps when nothing else ran, if that is known; only their ratios count.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._measured = dict(sorted((measured or {}).items()))
        self._noted: dict[int, tuple[float, int]] = {}  # by rows: seconds, and the number of the step noted last
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        self._steps += 1
        expected, at = self._noted.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            weight = _WEIGHT_IF_QUICKER if seconds < expected else _WEIGHT
            seconds = expected + weight * (min(seconds, _DISTURBED * expected) - expected)
        self._noted[rows] = seconds, self._steps

    @property
    def known(self) -> bool:
        return bool(self._noted)

    def seconds(self, rows: int) -> float:
        """Return what a step of this many rows is expected to take, in seconds if any step has been noted."""
        seconds, at = self._noted.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            return seconds
        lately = [other for other, (_, at) in self._noted.items() if self._steps - at < _STALE_STEPS]
        if not lately:
            return self._measured_cost(rows)
        nearest = min(lately, key=lambda other: (abs(other - rows), other))
        return self._noted[nearest][0] * self._measured_cost(rows) / self._measured_cost(nearest)

    def _measured_cost(self, rows: int) -> float:
        """Return the relative cost as it was measured: on straight lines between measurements, in proportion beyond."""
        known = self._measured
        if rows in known:
            return known[rows]
        below = max((n for n in known if n < rows), default=None)
        above = min((n for n in known if n > rows), default=None)
        if below is None:
            return known[above] if above is not None else 1 + _ASSUMED_SHARE * (rows - 1)
        if above is None:
            return known[below] * rows / below
        share = (rows - below) / (above - below)
        return known[below] + share * (known[above] - known[below])
