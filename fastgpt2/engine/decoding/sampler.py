"""The sampler draws a token by its probability: transformers' warpers, in their order, and one random number a token.

The number is a function of the seed, the text's index and the token's place in the text. So a text is the same alone,
in any batch, behind any drafts, and when it is begun again elsewhere.

A row of 50,257 scores is never sorted: what cannot survive is left out first, and of the rest only what stands at the
edge is put in order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.records import GenerationRequest

Scores = NDArray[np.float32]
Ids = NDArray[np.intp]
Floats = NDArray[np.float64]

# A temperature below this one is this one: it would make zeros of differences that float32 has.
LEAST_TEMPERATURE = 1e-6

# Elements up to this number are sorted; of more, those at the edge are found by buckets of this width, in nats.
_SORTED_AT_ONCE = 1024
_BUCKET = 1 / 64
_LARGEST_KEY = 100.0

# A token this far below the likeliest, in nats, has no weight. Below -708, `exp` takes five times as long.
_LEAST_LOGIT = -700.0

# Tokens of at least this probability are a few hundred, and mostly have all that a nucleus takes.
_LIKELY = 1e-4

# A sum of float32 is off by less than this.
_MARGIN = 1.00001

# The number of values in a group: the largest of each group bound what the k-th largest of all can be.
_GROUP = 64

# Probabilities are added up in blocks of this size first: only one block's running sums are wanted.
_BLOCK = 256

# Random numbers are made this many at a time.
_AHEAD = 64


class RandomNumbers:
    """The random numbers of one text, from 0 to below 1, by their places in the text.

    They come of a counter-based generator, Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
    2, 3"), whose key is the seed and the text's index. Each count, from 1 on, gives four outputs; the upper 53 bits of
    an output make a number.
    """

    def __init__(self, seed: int, choice_index: int) -> None:
        from numpy.random import Philox  # who draws nothing does not wait for it

        self._philox = Philox(key=np.array([seed % (1 << 64), choice_index], np.uint64))
        self._numbers: list[float] = []

    def __getitem__(self, position: int) -> float:
        while position >= len(self._numbers):
            raw: NDArray[np.uint64] = self._philox.random_raw(_AHEAD)
            self._numbers += ((raw >> np.uint64(11)) * 2.0**-53).tolist()
        return self._numbers[position]


class Scratch:
    """Rows [vocab_size] to compute in, for all texts of a decoder. New memory of their size would come page by page."""

    def __init__(self, vocab_size: int) -> None:
        self.scores, self.logits, self.weights, self.keys, self.products = np.empty((5, vocab_size), np.float32)
        self.exact_weights = np.empty(vocab_size, np.float64)


class Sampler:
    """Draws the tokens of one text.

    Args:
        request: with a seed.
        choice_index: the text's.
    """

    def __init__(self, request: GenerationRequest, choice_index: int, scratch: Scratch) -> None:
        assert request.seed is not None
        self._numbers, self._scratch = RandomNumbers(request.seed, choice_index), scratch
        temperature = 1.0 if request.temperature is None else request.temperature
        self._temperature = max(temperature, LEAST_TEMPERATURE)
        self._top_k, self._top_p = max(request.top_k or 0, 0), _share(request.top_p)
        self._min_p, self._typical_p = request.min_p or 0.0, _share(request.typical_p)

    def draw(self, scores: Scores, position: int) -> int:
        """Return the token at a place of the text, by the processed scores [vocab_size], one of them finite."""
        ids, weights = self.survivors(scores)
        index = pick(weights, self._numbers[position])
        return index if ids is None else int(ids[index])

    def survivors(self, scores: Scores) -> tuple[Ids | None, Floats]:
        """Return the tokens that may be drawn, in the order of their ids, and how much each weighs.

        Returns:
            The ids, or None for all tokens; float64 weights in proportion to the probabilities, valid until the next
            call.
        """
        scratch, logits, ids = self._scratch, self._scratch.logits, None
        # Differences of the largest, so that none is too large for `exp`: log probabilities, but for a constant.
        np.subtract(scores, scores.max(), out=logits)
        if self._temperature != 1:
            with np.errstate(over="ignore"):
                np.divide(logits, self._temperature, out=logits)
        if 0 < self._top_k < len(logits):
            ids = np.flatnonzero(logits >= kth_largest(logits, self._top_k))
        if self._top_p is not None:
            ids = _nucleus(logits, ids, self._top_p, scratch)
        if self._min_p:
            # Of two tokens' probabilities, the ratio is all that counts.
            ids = _those(ids, (logits if ids is None else logits[ids]) >= np.log(self._min_p))
        if self._typical_p is not None:
            ids = _typical(logits, ids, self._typical_p, scratch)
        if ids is not None:
            return ids, np.exp(logits[ids], dtype=np.float64)
        weights = np.exp(
            np.maximum(logits, _LEAST_LOGIT, out=scratch.keys), out=scratch.exact_weights, dtype=np.float64
        )
        return None, np.multiply(weights, logits > _LEAST_LOGIT, out=weights)


def _share(value: float | None) -> float | None:
    """Return a share; None for one that leaves all."""
    return None if value == 1 else value


def _those(ids: Ids | None, kept: NDArray[np.bool]) -> Ids:
    """Return the ids at the places that a mask keeps."""
    if ids is not None:
        return ids[kept]
    return np.flatnonzero(kept)


def _nucleus(logits: Scores, ids: Ids | None, top_p: float, scratch: Scratch) -> Ids:
    """Return the likeliest tokens that together reach a share of the probability (Holtzman et al. 2020).

    A token stays if those that are likelier have less than the share; so does the likeliest itself.
    """
    rest = 0.0
    if ids is None:
        weights = np.exp(logits, out=scratch.weights)
        total = float(weights.sum())
        ids = np.flatnonzero(weights >= np.float32(_LIKELY * total))
        rest = max(0.0, total - float(weights[ids].sum()))
        if total - rest < top_p * total * _MARGIN:
            return smallest(np.negative(logits, out=scratch.keys), weights, top_p * total)
    candidates = logits[ids].astype(np.float64)
    exact_weights = np.exp(candidates)
    return ids[smallest(-candidates, exact_weights, top_p * (float(exact_weights.sum()) + rest))]


def _typical(logits: Scores, ids: Ids | None, typical_p: float, scratch: Scratch) -> Ids:
    """Return the tokens whose surprise is nearest the expected one, which together reach a share (Meister et al. 2023).

    As in transformers, those that are as near as the last one stay as well. Surprises are compared as logits: what is
    added to both, and the sign, make no difference.
    """
    if ids is not None:
        candidates = np.maximum(logits[ids], _LEAST_LOGIT, dtype=np.float64)
        weights = np.exp(candidates)
        total = float(weights.sum())
        return ids[_near(candidates, float((weights * candidates).sum()) / total, typical_p * total)[0]]
    # A banned token has no part in the expected surprise: next to nothing, where infinity would make NaN.
    clipped = np.maximum(logits, _LEAST_LOGIT, out=scratch.keys)
    likely = np.exp(clipped, out=scratch.weights)
    total = float(likely.sum())
    expected = float(np.multiply(likely, clipped, out=scratch.products).sum()) / total
    ids = np.flatnonzero(likely >= np.float32(_LIKELY * total))
    if float(likely[ids].sum()) > typical_p * total * _MARGIN:
        kept, farthest = _near(logits[ids].astype(np.float64), expected, typical_p * total)
        # No other token is as near.
        if farthest < expected - np.log(_LIKELY * total):
            return ids[kept]
    return np.flatnonzero(_near(clipped.astype(np.float64), expected, typical_p * total)[0])


def _near(logits: Floats, expected: float, target: float) -> tuple[NDArray[np.bool], float]:
    """Return which tokens nearest the expected logit reach a target weight together, and how near the last one is."""
    distance = np.abs(logits - expected)
    farthest = float(distance[smallest(distance, np.exp(logits), target)].max())
    return distance <= farthest, farthest


def kth_largest(values: Scores, k: int) -> np.float32:
    """Return the k-th largest of at least k values."""
    groups = len(values) // _GROUP
    if k <= groups // 2:
        # As k groups have a value that is not below it, this one is not above the k-th largest.
        largest = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        values = values[values >= np.partition(largest, groups - k)[groups - k]]
    kth: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return kth


def smallest(keys: NDArray[np.floating], weights: NDArray[np.floating], target: float) -> Ids:
    """Return the indices, in their order, of the smallest keys whose weights together reach a target; at least one.

    An element stays if the elements before it weigh less than the target. Among equal keys, the lower index is before.

    Args:
        keys: none below 0.
    """
    if len(keys) <= _SORTED_AT_ONCE:
        order = np.argsort(keys, kind="stable")
        count = int(np.searchsorted(np.cumsum(weights[order]), target)) + 1
        return np.sort(order[:count])
    # By buckets of keys, the last bucket of which some may stay; only there is an order needed.
    # By way of int32, which takes a tenth of the time.
    buckets = (np.minimum(keys, _LARGEST_KEY) / _BUCKET).astype(np.int32)
    before = np.cumsum(np.bincount(buckets, weights))
    # A target of 0 is reached before any: by the first bucket that has an element.
    last = max(int(np.searchsorted(before, target)), int(buckets.min()))
    at_edge = np.flatnonzero(buckets == last)
    left = target - float(before[last - 1]) if last else target
    kept = buckets < last
    order = at_edge[np.argsort(keys[at_edge], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), left)) + 1
    kept[order[:count]] = True
    return np.flatnonzero(kept)


def pick(weights: Floats, number: float) -> int:
    """Return the index that a number from 0 to below 1 falls on, as often as its share of all weights is."""
    offset = 0
    if len(weights) > 2 * _BLOCK:
        sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)))
        wanted = number * float(sums[-1])
        block = _first_above(sums, wanted)
        wanted -= float(sums[block - 1]) if block else 0.0
        offset = block * _BLOCK
        running = np.cumsum(weights[offset : offset + _BLOCK])
    else:
        running = np.cumsum(weights)
        wanted = number * float(running[-1])
    return offset + _first_above(running, wanted)


def _first_above(running: Floats, wanted: float) -> int:
    """Return the first index whose running sum is above a value, or else, by rounding, the last that adds anything."""
    index = int(np.searchsorted(running, wanted, side="right"))
    return index if index < len(running) else int(np.searchsorted(running, running[-1]))
