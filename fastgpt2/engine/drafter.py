"""What of each sequence's guesses a step verifies, where they come from, and what is learnt from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from fastgpt2.engine import draft_plan
from fastgpt2.engine.drafting import MOST_DRAFTS, Acceptance, Lookup, Rate
from fastgpt2.engine.step import Segment
from fastgpt2.engine.step_costs import StepCosts

if TYPE_CHECKING:
    from fastgpt2.engine.gpt2 import GPT2
    from fastgpt2.engine.sequence import Sequence as Running

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
