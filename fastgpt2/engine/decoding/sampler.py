"""The sampler draws a token by its probability, among those that transformers' warpers leave, in their order.

Its random numbers are functions of the seed, the text's index and the token's place in the text. So a text is the same
alone, in any batch, behind any drafts, and when it is begun again elsewhere.

A row of 50,257 scores is never sorted. A token is drawn from all, and drawn again unless it is in the nucleus; or what
cannot survive is left out first, and of the rest only what stands at the edge is put in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

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

# A token this far below the likeliest, in nats, has no weight worth a sum.
_LEAST_LOGIT = -700.0

# The number of values in a group: the largest of each group bound what the k-th largest of all can be.
_GROUP = 64

# Probabilities are added up in blocks of this size first: only one block's running sums are wanted.
_BLOCK = 256

# Where tokens of this share or more may be drawn, tokens are drawn from all this often before those are worked out.
_LEAST_SHARE, _MOST_DRAWS = 0.5, 8

# To add up weights here and there costs no more than to add up all, up to this number.
_FEW = 4096

# Random numbers are made this many at a time.
_AHEAD = 64


class RandomNumbers:
    """The random numbers of one text, from 0 to below 1, by their places in the text.

    They come of a counter-based generator, Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
    2, 3"), whose key is the seed and the text's index. Each count, from 1 on, gives four outputs; the upper 53 bits of
    an output make a number.
    """

    def __init__(self, seed: int, choice_index: int) -> None:
        self._key = np.array([seed % (1 << 64), choice_index], np.uint64)
        self._known, self._next = list[float](), self._count_from(0)

    def __getitem__(self, position: int) -> float:
        """Return the number of a place."""
        while position >= len(self._known):
            self._known.append(next(self._next))
        return self._known[position]

    def at(self, position: int) -> Iterator[float]:
        """Yield the number of a place, and then further ones, for a draw that needs several."""
        yield self[position]
        # Of counts that no place counts to.
        yield from self._count_from(position + 1)

    def _count_from(self, high: int) -> Iterator[float]:
        """Yield the numbers of the counts from 1 on, above them `high` as the counter's second word of 64 bits."""
        from numpy.random import Philox  # who draws nothing does not wait for it

        philox = Philox(key=self._key, counter=np.array([0, high, 0, 0], np.uint64))
        while True:
            raw: NDArray[np.uint64] = philox.random_raw(_AHEAD)
            yield from ((raw >> np.uint64(11)) * 2.0**-53).tolist()


class Scratch:
    """Rows [vocab_size] to compute in, for all texts of a decoder. New memory of their size would come page by page."""

    def __init__(self, vocab_size: int) -> None:
        self.scores, self.logits, self.weights = np.empty((3, vocab_size), np.float32)
        self.mask = np.empty(vocab_size, np.bool)


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
        shares = [share for share in (self._top_p, self._typical_p) if share is not None]
        leaves_most = not shares or (len(shares) == 1 and shares[0] >= _LEAST_SHARE)
        self._draws_from_all = leaves_most and not (self._top_k or self._min_p)

    def draw(self, scores: Scores, position: int) -> int:
        """Return the token at a place of the text, by the processed scores [vocab_size]; 0 if all are banned."""
        numbers, largest = self._numbers.at(position), scores.max()
        if largest == -np.inf:
            return 0
        if self._draws_from_all:
            # A token that is drawn from all, and thrown away where it may not be drawn, has the probability that it has
            # among those that may.
            logits = self._logits_of(scores, largest)
            for number in islice(numbers, _MOST_DRAWS):
                weights = np.exp(logits, out=self._scratch.weights)
                sums = block_sums(weights)
                token_id = pick(weights, sums, number)
                if self._may_be_drawn(token_id, logits, float(sums[-1])):
                    return token_id
        ids, weights_left = self.survivors(scores)
        index = pick(weights_left, block_sums(weights_left), next(numbers))
        return index if ids is None else int(ids[index])

    def _may_be_drawn(self, token_id: int, logits: Scores, total: float) -> bool:
        """Tell whether `top_p` or `typical_p`, if there is one, leaves a token. The weights are used up.

        It does if the tokens that come before the token, in the order that `_nucleus` or `_typical` has, weigh less
        than the share.
        """
        weights, before = self._scratch.weights, self._scratch.mask
        if self._top_p is not None:
            share, logit = self._top_p, logits[token_id]
            np.greater_equal(logits[:token_id], logit, out=before[:token_id])
            np.greater(logits[token_id:], logit, out=before[token_id:])
        elif self._typical_p is not None:
            share, distance = self._typical_p, _distances(logits, weights, total)
            np.less(distance, distance[token_id], out=before)
        else:
            return True
        if np.count_nonzero(before) > _FEW:
            np.multiply(weights, before, out=weights)
        else:
            weights = weights[np.flatnonzero(before)]
        return bool(weights.sum(dtype=np.float64) < share * total)

    def _logits_of(self, scores: Scores, largest: np.float32) -> Scores:
        """Return log probabilities, but for a constant: the largest is 0, so that none is too large for `exp`."""
        logits: Scores = np.subtract(scores, largest, out=self._scratch.logits)
        if self._temperature != 1:
            with np.errstate(over="ignore"):
                np.divide(logits, self._temperature, out=logits)
        return logits

    def survivors(self, scores: Scores) -> tuple[Ids | None, Floats]:
        """Return the tokens that may be drawn, in the order of their ids, and how much each weighs.

        Returns:
            The ids, or None for all tokens; float64 weights in proportion to the probabilities.
        """
        logits, ids = self._logits_of(scores, scores.max()), None
        if 0 < self._top_k < len(logits):
            ids = np.flatnonzero(logits >= kth_largest(logits, self._top_k))
        if self._top_p is not None:
            ids = _nucleus(logits, ids, self._top_p)
        if self._min_p:
            # Of two tokens' probabilities, the ratio is all that counts.
            ids = _those(ids, (logits if ids is None else logits[ids]) >= np.log(self._min_p))
        if self._typical_p is not None:
            ids = _typical(logits, ids, self._typical_p)
        return ids, np.exp(logits if ids is None else logits[ids], dtype=np.float64)


def _share(value: float | None) -> float | None:
    """Return a share; None for one that leaves all."""
    return None if value == 1 else value


def _those(ids: Ids | None, kept: NDArray[np.bool]) -> Ids:
    """Return the ids at the places that a mask keeps."""
    if ids is not None:
        return ids[kept]
    return np.flatnonzero(kept)


def _nucleus(logits: Scores, ids: Ids | None, top_p: float) -> Ids:
    """Return the likeliest tokens that together reach a share of the probability (Holtzman et al. 2020).

    A token stays if those that are likelier have less than the share; so does the likeliest itself.
    """
    candidates = (logits if ids is None else logits[ids]).astype(np.float64)
    weights = np.exp(candidates)
    kept = smallest(-candidates, weights, top_p * float(weights.sum()))
    return kept if ids is None else ids[kept]


def _typical(logits: Scores, ids: Ids | None, typical_p: float) -> Ids:
    """Return the tokens whose surprise is nearest the expected one, which together reach a share (Meister et al. 2023).

    As in transformers, those that are as near as the last one stay as well.
    """
    candidates = (logits if ids is None else logits[ids]).astype(np.float64)
    weights = np.exp(candidates)
    total = float(weights.sum())
    distance = _distances(candidates, weights, total)
    return _those(ids, distance <= distance[smallest(distance, weights, typical_p * total)].max())


def _distances(logits: NDArray[Any], weights: NDArray[Any], total: float) -> NDArray[Any]:
    """Return how far each token's surprise is from the expected one.

    Logits serve as surprises: what is added to all of them, and the sign, make no difference.
    """
    # A banned token has no part in what is expected: next to nothing, where infinity would make NaN.
    finite = np.maximum(logits, _LEAST_LOGIT)
    expected = float((finite * weights).sum(dtype=np.float64)) / total
    distances: NDArray[Any] = np.abs(np.subtract(finite, expected, out=finite), out=finite)
    return distances


def kth_largest(values: Scores, k: int) -> np.float32:
    """Return the k-th largest of at least k values."""
    groups = len(values) // _GROUP
    if k <= groups // 2:
        # As k groups have a value that is not below it, this one is not above the k-th largest.
        largest = values[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        values = values[values >= np.partition(largest, groups - k)[groups - k]]
    kth: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return kth


def smallest(keys: NDArray[Any], weights: NDArray[Any], target: float) -> Ids:
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


def block_sums(weights: NDArray[Any]) -> Floats:
    """Return the running sums of all weights at the end of each block."""
    return np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))


def pick(weights: NDArray[Any], sums: Floats, number: float) -> int:
    """Return the index that a number from 0 to below 1 falls on, as often as its share of all weights is.

    Args:
        sums: the weights' `block_sums`.
    """
    wanted = number * float(sums[-1])
    block = _first_above(sums, wanted)
    begin = block * _BLOCK
    running = np.cumsum(weights[begin : begin + _BLOCK], dtype=np.float64)
    return begin + _first_above(running, wanted - (float(sums[block - 1]) if block else 0.0))


def _first_above(running: Floats, wanted: float) -> int:
    """Return the first index whose running sum is above a value, or else, by rounding, the last that adds anything."""
    index = int(np.searchsorted(running, wanted, side="right"))
    return index if index < len(running) else int(np.searchsorted(running, running[-1]))
