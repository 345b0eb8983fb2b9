"""How many guesses each sequence's next step verifies: as many as pay, and nobody else pays for."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

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
