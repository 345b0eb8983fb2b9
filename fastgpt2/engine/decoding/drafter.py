"""What of each sequence's guesses a step verifies, where they come from, and what is learnt from it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from fastgpt2.engine.decoding import drafter as draft_plan
from fastgpt2.engine.decoding.lookup import MOST_DRAFTS, Acceptance, Lookup, Rate
from fastgpt2.engine.network.step import Segment

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.sequence import Sequence as Running
    from fastgpt2.engine.network.gpt2 import GPT2


# Of the compact model's guesses come true at first sight; and its step's share of one that verifies, until it is seen.
_PRIOR_RATE, _PRIOR_COST = 0.9, 0.35


class Drafter:
    """Guesses for the sequences of one decoder.

    They are looked up in the sequence itself (`drafting.py`), or made by the network's other set of weights if it has
    one, whichever is expected to gain more.

    Args:
        most: look up so many guesses of each sequence that has any, 0 none at all; None for as many as pay.
        measured: what steps cost here, as `StepCosts` takes it.
    """

    def __init__(self, model: GPT2, most: int | None = 0, measured: Mapping[int, float] | None = None) -> None:
        self._model = model
        self._most = most
        self._costs, self._model_costs = StepCosts(measured), StepCosts()
        self._acceptance, self._model_rate = Acceptance(), Rate(_PRIOR_RATE)
        self._by_model = False

    def warm_up(self) -> None:
        """Touch the other set of weights, if there is one."""
        cache = self._model.cache
        if self._model.can_draft and cache.has_room(1):
            slot = cache.allot(1)
            self._model.draft([Segment(slot, [0])])
            cache.release(slot)

    def begin(self, ids: Sequence[int], max_new_tokens: int) -> Lookup | None:
        """What a prompt's sequence is guessed from; None where nothing is: the first token and the last never are."""
        return Lookup(ids) if self._most != 0 and max_new_tokens > 2 else None

    def guesses(self, sequences: Sequence[Running], rows: int) -> list[list[int]]:
        """For each of the sequences that the next step decodes, the tokens to verify; together at most so many."""
        room = [sequence.max_new_tokens - len(sequence.token_ids) - 1 for sequence in sequences]
        lookups = [sequence.lookup for sequence in sequences]
        self._by_model = False
        if self._most is not None:
            counts = []
            for lookup, left in zip(lookups, room, strict=True):
                counts.append(min(self._most, left, rows) if lookup is not None and lookup.match else 0)
                rows -= counts[-1]
        else:
            counts, gain = self._plan(lookups, room, rows)
            if self._model.can_draft:
                k, models_gain = draft_plan.plan_model(
                    len(sequences), self._model_rate.value, self._model_cost, self._costs.of
                )
                if k and models_gain > gain:
                    self._by_model = True
                    return self._by_the_model(sequences, [min(k, left) for left in room])
        return [
            lookup.draft(count) if lookup is not None and count else []
            for lookup, count in zip(lookups, counts, strict=True)
        ]

    def _plan(self, lookups: Sequence[Lookup | None], room: Sequence[int], rows: int) -> tuple[list[int], float]:
        most = min(MOST_DRAFTS, rows // max(1, len(lookups)))
        chances = [
            self._acceptance.chances(lookup.match, min(most, left)) if lookup is not None else []
            for lookup, left in zip(lookups, room, strict=True)
        ]
        return draft_plan.plan(chances, self._costs.of) if any(chances) else ([0] * len(lookups), 1.0)

    def _model_cost(self, rows: int) -> float:
        return self._model_costs.of(rows) if self._model_costs.seen else _PRIOR_COST * self._costs.of(rows)

    def _by_the_model(self, sequences: Sequence[Running], counts: Sequence[int]) -> list[list[int]]:
        """What the other set of weights goes on with, a step a token.

        It reads the cache of the first, and adds keys and values of its own, which the step that verifies replaces.
        """
        cache = self._model.cache
        guesses: list[list[int]] = [[] for _ in sequences]
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        lengths = list(cache.lengths)
        last = [sequence.token_ids[-1] for sequence in sequences]
        for k in range(max(counts)):
            drafting = [i for i, count in enumerate(counts) if k < count]
            started = perf_counter()
            logits = self._model.draft([Segment(slots[i], [last[i]]) for i in drafting])
            for i, row in zip(drafting, logits, strict=True):
                last[i] = int(row.argmax())
                guesses[i].append(last[i])
            self._model_costs.note(len(drafting), perf_counter() - started)
        for slot in slots:
            cache.retract(slot, lengths[slot])
        return guesses

    def took(self, sequence: Running, token_id: int) -> None:
        """A sequence goes on by a token."""
        lookup = sequence.lookup
        if lookup is None:
            return
        if lookup.match:
            self._acceptance.note(lookup.match, lookup.guess == token_id)
        lookup.push(token_id)

    def verified(self, guesses: int, accepted: int) -> None:
        """So many of a sequence's guesses of this step have come true, one after the other."""
        if self._by_model:
            for i in range(min(guesses, accepted + 1)):
                self._model_rate.note(i < accepted)

    def stepped(self, rows: int, seconds: float) -> None:
        """A step without prompts took so long."""
        self._costs.note(rows, seconds)


# NOTE engine.draft_plan: How many guesses each sequence's next step verifies: as many as pay, and nobody else pays
# for.

# By how much a step may take longer for a sequence than what it gains by it.
TOLERANCE = 0.03

# What drafting must be expected to gain, as costs are known no better.
WORTHWHILE = 1.02

# Rows of guesses in a step, at most.
MOST_ROWS = 32

# Steps of a smaller model before one that verifies, at most.
MOST_BY_MODEL = 8


def plan(chances: Sequence[Sequence[float]], cost: Callable[[int], float]) -> tuple[list[int], float]:
    """How many guesses to verify of each sequence, and how many times as many tokens a second that gives.

    The step that gives the most tokens a second of those in which nobody is expected to be slower than without guesses,
    beyond `TOLERANCE`. Guesses are added by how likely they are to be taken, so that only their number is to be chosen.

    Args:
        chances: of each sequence that has a token to run in this step, of each of its guesses, the chance that it and
            all before it come true; falling.
        cost: of a step, by its rows.
    """
    base = len(chances)
    plain = cost(base)
    heap = [(-of[0], i) for i, of in enumerate(chances) if of]
    heapq.heapify(heap)
    taken, gains = [0] * base, [1.0] * base
    best, best_gain = list(taken), 1.0
    rows, tokens = base, float(base)
    while heap and rows < base + MOST_ROWS:
        chance, i = heapq.heappop(heap)
        gains[i] -= chance
        taken[i] += 1
        rows, tokens = rows + 1, tokens - chance
        if taken[i] < len(chances[i]):
            heapq.heappush(heap, (-chances[i][taken[i]], i))
        longer = cost(rows) / plain
        gain = tokens / base / longer
        if gain > max(best_gain, WORTHWHILE) and min(gains) >= longer * (1 - TOLERANCE):
            best, best_gain = list(taken), gain
    return best, best_gain


def plan_model(
    sequences: int, rate: float, draft_cost: Callable[[int], float], cost: Callable[[int], float]
) -> tuple[int, float]:
    """How many tokens a smaller model is to guess of each sequence, and how many times as many tokens a second.

    Leviathan et al. 2023, with the costs as they are here: k of its steps and one that verifies give, of each sequence,
    1 + p + ... + p^k tokens.

    Args:
        rate: p, how likely a guess comes true if those before it did.
        draft_cost: of its step, by its rows.
    """
    best, best_gain, tokens = 0, 1.0, 1.0
    plain, step = cost(sequences), draft_cost(sequences)
    for k in range(1, MOST_BY_MODEL + 1):
        if sequences * k > MOST_ROWS:
            break
        tokens += rate**k
        gain = tokens * plain / (k * step + cost(sequences * (1 + k)))
        if gain > max(best_gain, WORTHWHILE):
            best, best_gain = k, gain
    return best, best_gain


# NOTE engine.step_costs: What a step costs by its number of rows, on this machine as it is now.

# Where nothing was measured: a row beside another costs so much of the first.
_ASSUMED_SHARE = 0.05

# How much a step counts for what is known of its kind: one that is quicker for more, as what disturbs only ever adds.
# One that takes so many times as long as expected was disturbed.
_WEIGHT, _WEIGHT_IF_QUICKER, _DISTURBED = 0.15, 0.4, 3.0

# After so many steps, others tell more: something else may share the machine by then.
_STALE_STEPS = 300


class StepCosts:
    """Seconds of a step by its rows.

    What was seen lately counts, as it is. What was not is derived from the nearest number of rows that was, by how the
    two compared when the machine was measured.

    Args:
        measured: seconds by rows of some steps when nothing else ran, if that is known; ratios are all that counts.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._measured = dict(sorted((measured or {}).items()))
        self._seen: dict[int, tuple[float, int]] = {}  # seconds, and at which step
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        known, at = self._seen.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            weight = _WEIGHT_IF_QUICKER if seconds < known else _WEIGHT
            seconds = known + weight * (min(seconds, _DISTURBED * known) - known)
        self._seen[rows] = seconds, self._steps

    @property
    def seen(self) -> bool:
        """Whether any step was."""
        return bool(self._seen)

    def of(self, rows: int) -> float:
        """What a step of so many rows is expected to take. Seconds, if any step was seen yet."""
        seconds, at = self._seen.get(rows, (0.0, -_STALE_STEPS))
        if self._steps - at < _STALE_STEPS:
            return seconds
        lately = [seen for seen, (_, at) in self._seen.items() if self._steps - at < _STALE_STEPS]
        if not lately:
            return self._shape(rows)
        nearest = min(lately, key=lambda seen: (abs(seen - rows), seen))
        return self._seen[nearest][0] * self._shape(rows) / self._shape(nearest)

    def _shape(self, rows: int) -> float:
        """The relative cost as it was measured, with straight lines between, and on in proportion beyond."""
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
