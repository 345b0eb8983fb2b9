"""The sampler draws among the tokens that transformers would draw among, as often as their probabilities say.

Every seed is fixed: a test that passes passes always. tests/golden/make_processors.py asked transformers.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.chances import chi_squared_p, goodness_of_fit, independence
from support.processed import Case, cases

from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sampler import RandomNumbers, Sampler, Scratch, block_sums, kth_largest, pick, smallest

DRAWN = [case for case in cases if case.draws]
BY_NAME = {case.name: case for case in DRAWN}
# TEST_LONG=1 draws three times as many.
DRAWS = 100_000 if os.environ.get("TEST_LONG") else 30_000

# Of a hundred tests like these, each with seeds of its own, one in ten would have a p-value below this one.
LEAST_P = 0.001

# Less likely tokens than this, in nats below the likeliest, count as none.
FARTHEST = -700.0


def sampler(seed: int, choice_index: int = 0, vocab_size: int = 1000, **options: Any) -> Sampler:
    return Sampler(GenerationRequest("", seed=seed, do_sample=True, **options), choice_index, Scratch(vocab_size))


# ------------------------------------------------------------------------------------- as transformers has it


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_survivors_are_those_of_transformers(case: Case) -> None:
    scores = case.processed()
    before = scores.copy()
    ids, weights = Sampler(case.request(), 0, Scratch(len(scores))).survivors(scores)
    assert np.array_equal(scores, before), "the scores are changed"
    ids = np.arange(len(scores)) if ids is None else ids
    assert weights.dtype == np.float64
    assert np.array_equal(ids, np.sort(ids))
    left = ids[weights > 0]
    if case.left is not None:
        assert (len(left), hashlib.sha256(left.astype("<i4").tobytes()).hexdigest()) == case.left
        return
    expected = case.scores.astype(np.float64) - case.scores.max()
    possible = expected > FARTHEST
    weights, left = weights[weights > 0], left
    near = np.log(weights) > FARTHEST
    assert np.array_equal(left[near], case.ids[possible])
    probabilities = np.exp(expected[possible]) / np.exp(expected).sum()
    # A score of float32 has this error, and where it is large, so has the probability.
    rounding = 2.0**-23 * float(np.abs(case.scores).max())
    assert np.allclose(weights[near] / weights.sum(), probabilities, rtol=1e-6 + rounding, atol=1e-12)


# -------------------------------------------------------------------------------------------- the numbers


_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_MASK = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Return the four outputs of Philox4x64-10, as Salmon et al. 2011 describe it in section 3.3."""
    c, k = counter, key
    for _ in range(10):
        products = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        high, low = [p >> 64 for p in products], [p & _MASK for p in products]
        c = [high[1] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], low[0]]
        k = [(one + step) & _MASK for one, step in zip(k, _WEYL, strict=True)]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (
            "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
            "ffffffffffffffff ffffffffffffffff",
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
            "452821e638d01377 be5466cf34e90c6c",
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_the_reference_is_philox(counter: str, key: str, expected: str) -> None:
    """The known answers of Random123, the authors' own library (kat_vectors)."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert philox(words[0], words[1]) == words[2]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**53 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
@pytest.mark.parametrize("choice_index", [0, 1, 7, 2**31 - 1 + 127])
def test_a_number_is_a_function_of_seed_index_and_place(seed: int, choice_index: int) -> None:
    numbers = RandomNumbers(seed, choice_index)
    for position in (0, 1, 2, 3, 4, 63, 64, 65, 1000, 7):
        # numpy counts from 1.
        output = philox([position // 4 + 1, 0, 0, 0], [seed & _MASK, choice_index])[position % 4]
        assert numbers[position] == (output >> 11) / 2**53


def test_the_numbers_stay_the_same_for_ever() -> None:
    """Texts of seeds that people keep depend on them."""
    first = {
        (0, 0): "0x1.7a5d3204726c0p-7 0x1.eeb1585ce5460p-3 0x1.c8667a55d9028p-4 0x1.20faf40a5fab6p-1",
        (0, 1): "0x1.a06ff187f343ap-1 0x1.80ae833698420p-1 0x1.57e2622a22f60p-1 0x1.eeb80d77a9ba8p-2",
        (1, 0): "0x1.36da89edd58a0p-2 0x1.b289f407757c1p-1 0x1.3fc3972bb8304p-3 0x1.fda5da5a81200p-6",
        (-1, 3): "0x1.ab6b141dc31d8p-2 0x1.c0301cb5119e8p-2 0x1.3a590af3c3a9ap-2 0x1.494d390318b24p-3",
    }
    for (seed, choice_index), expected in first.items():
        numbers = RandomNumbers(seed, choice_index)
        assert [numbers[position].hex() for position in range(4)] == expected.split()
    assert [RandomNumbers(2**64 - 1, 3)[n] for n in range(4)] == [RandomNumbers(-1, 3)[n] for n in range(4)]


def test_places_may_be_asked_for_in_any_order() -> None:
    forwards, backwards = RandomNumbers(5, 0), RandomNumbers(5, 0)
    ahead = [backwards[position] for position in reversed(range(300))]
    assert [forwards[position] for position in range(300)] == ahead[::-1]
    assert all(0 <= number < 1 for number in ahead)


# ------------------------------------------------------------------------------------- draws and their counts


def expected_of(case: Case) -> NDArray[np.float64]:
    """Return the probabilities [vocab_size] that follow from what transformers leaves."""
    probabilities = np.zeros(len(case.row))
    raised = np.exp(case.scores.astype(np.float64) - case.scores.max())
    probabilities[case.ids] = raised / raised.sum()
    return probabilities


DISTRIBUTIONS = [
    "normal: temperature 1.0", "normal: temperature 0.7", "flat: temperature 1.9", "normal: top_k 50", "ties: top_k 5",
    "normal: top_p 0.9", "normal: min_p 0.1", "normal: typical_p 0.9", "normal: all rules", "positive: all 4",
    "model 0: top_p 0.95", "peaked: temperature 1.9",
]  # fmt: skip


class Remembering(Sampler):
    """A sampler that works out once who survives: the row is the same in all draws of a test."""

    def __init__(self, case: Case, request: GenerationRequest, choice_index: int = 0) -> None:
        super().__init__(request, choice_index, Scratch(len(case.row)))
        self.scores = case.processed()
        self._found = super().survivors(self.scores)

    def survivors(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
        assert scores is self.scores
        return self._found

    def renumber(self, seed: int, choice_index: int) -> None:
        self._numbers = RandomNumbers(seed, choice_index)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution(name: str) -> None:
    """At as many places of one text."""
    case = BY_NAME[name]
    one = Remembering(case, case.request())
    counts = np.bincount([one.draw(one.scores, position) for position in range(DRAWS)], minlength=len(case.row))
    expected = expected_of(case)
    assert not counts[expected == 0].any(), "a token was drawn that does not survive"
    assert goodness_of_fit(counts, expected) > LEAST_P


@pytest.mark.thorough
@pytest.mark.parametrize("varied", ["seeds", "texts", "far places"])
def test_draws_have_the_distribution_whatever_varies(varied: str) -> None:
    """One place of as many seeds, or of as many texts of one seed; and places of a few texts of many seeds."""
    case = BY_NAME["normal: all rules"]
    one, drawn = Remembering(case, case.request()), list[int]()
    for n in range(DRAWS):
        if varied == "seeds":
            one.renumber(n, 0)
            drawn.append(one.draw(one.scores, 0))
        elif varied == "texts":
            one.renumber(1234, n)
            drawn.append(one.draw(one.scores, 1))
        elif n % 20 == 0:
            one.renumber(n * 7919, n % 3)
            drawn += [one.draw(one.scores, position) for position in range(100, 120)]
    assert goodness_of_fit(np.bincount(drawn, minlength=len(case.row)), expected_of(case)) > LEAST_P


def classes(scores: NDArray[np.float32], drawn: list[int]) -> NDArray[np.intp]:
    """Return for each drawn token one of six classes that are about equally likely, by the order of probabilities."""
    probabilities = np.exp(scores.astype(np.float64))
    order = np.argsort(-probabilities)
    cumulative = np.cumsum(probabilities[order]) / probabilities.sum()
    found = np.empty(len(scores), np.intp)
    found[order] = np.minimum(cumulative * 6, 5).astype(np.intp)
    return np.unique(found[drawn], return_inverse=True)[1]


@pytest.mark.thorough
def test_neighbours_are_independent() -> None:
    """Neighbouring places of a text, within a block of the generator's four numbers and across two; and other pairs."""
    case = BY_NAME["normal: temperature 1.0"]
    one = Remembering(case, case.request())
    scores = one.scores
    one.renumber(99, 0)
    drawn = classes(scores, [one.draw(scores, position) for position in range(DRAWS)])
    for lag in (1, 2, 4, 64):
        for begin in (0, 1):
            pairs = np.arange(begin, len(drawn) - lag, 2)
            assert independence(drawn[pairs], drawn[pairs + lag]) > LEAST_P, (lag, begin)
    # A place of a seed's text and of the next seed's; of two texts of a seed, next to each other and not.
    for other_seed, other_text in ((1, 0), (0, 1), (1, 1)):
        sides: tuple[list[int], list[int]] = ([], [])
        for n in range(DRAWS // 5):
            for side, seed, text in zip(sides, (2 * n, 2 * n + other_seed), (0, other_text), strict=True):
                one.renumber(seed, text)
                side.append(one.draw(scores, 5))
        assert independence(classes(scores, sides[0]), classes(scores, sides[1])) > LEAST_P, (other_seed, other_text)


def test_the_chi_squared_test_finds_what_is_wrong() -> None:
    """It is a test of the test: a draw from another distribution, and neighbours that depend on one another."""
    assert chi_squared_p(3.841458820694124, 1) == pytest.approx(0.05)
    assert chi_squared_p(124.34211340400407, 100) == pytest.approx(0.05)
    assert chi_squared_p(100.0, 100) == pytest.approx(0.48119168452796)
    assert chi_squared_p(500.0, 300) == pytest.approx(3.3592224575792783e-12)
    scores = BY_NAME["normal: temperature 1.0"].processed()
    one = sampler(3, vocab_size=len(scores), temperature=1.1)
    counts = np.bincount([one.draw(scores, position) for position in range(20_000)], minlength=len(scores))
    assert goodness_of_fit(counts, expected_of(BY_NAME["normal: temperature 1.0"])) < 1e-4
    sides = np.arange(3000) % 3
    assert independence(sides, (sides + (np.arange(3000) % 10 == 0)) % 3) < 1e-6


# ----------------------------------------------------------------------------------------- a draw's own rules


def test_of_one_survivor_it_is_this_one() -> None:
    scores = BY_NAME["normal: temperature 1.0"].processed()
    best = int(scores.argmax())
    rules: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9}]
    for options in rules:
        one = sampler(5, vocab_size=len(scores), **options)
        assert {one.draw(scores, position) for position in range(50)} == {best}


def test_neutral_values_leave_all() -> None:
    scores = BY_NAME["normal: temperature 1.0"].processed()
    ids, weights = sampler(5, vocab_size=len(scores)).survivors(scores)
    neutral = (("top_k", 0), ("top_k", -1), ("top_p", 1), ("min_p", 0), ("typical_p", 1), ("temperature", 1))
    for name, value in neutral:
        found, again = sampler(5, vocab_size=len(scores), **{name: value}).survivors(scores)
        assert found is None
        assert ids is None
        assert np.array_equal(weights, again)


@pytest.mark.parametrize("size", [300, 50_257])
def test_no_share_at_all_leaves_what_would_come_first(size: int) -> None:
    """Of a long row as well, where the surprise of no token is near the expected one."""
    scores = np.full(size, -8.0, np.float32)
    scores[[2, 5, 7]] = 0.0
    ids, _ = sampler(1, vocab_size=size, top_p=0.0).survivors(scores)
    assert ids is not None
    assert ids.tolist() == [2]
    ids, weights = sampler(1, vocab_size=size, typical_p=0.0).survivors(scores)
    assert ids is not None
    assert len(np.unique(weights)) == 1


def test_a_banned_token_is_never_drawn() -> None:
    scores = np.full(1000, -np.inf, np.float32)
    scores[[3, 700]] = 1.0
    rules: list[dict[str, Any]] = [{}, {"top_k": 500}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"typical_p": 0.9999}]
    for options in (*rules, {"temperature": 100.0}):
        one = sampler(8, **options)
        assert {one.draw(scores, position) for position in range(100)} == {3, 700}, options


def test_equal_scores_fall_under_a_rule_by_their_ids() -> None:
    """Where transformers keeps one or another of equals, as its sort has it, the lower id stays."""
    scores = np.zeros(100, np.float32)
    ids, _ = sampler(1, vocab_size=100, top_p=0.25).survivors(scores)
    assert ids is not None
    assert ids.tolist() == list(range(25))
    ids, _ = sampler(1, vocab_size=100, top_k=5).survivors(scores)
    assert ids is not None
    assert len(ids) == 100


@given(st.integers(1, 400), st.integers(0, 2**32), st.booleans(), st.data())
@settings(deadline=None)
def test_the_kth_largest(size: int, seed: int, rounded: bool, data: st.DataObject) -> None:
    values = np.random.default_rng(seed).standard_normal(size * 7).astype(np.float32)
    if rounded:
        values = np.round(values)
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(values, k) == np.sort(values)[-k]


@given(st.integers(0, 2**32), st.sampled_from((10, 1500, 5000)), st.floats(0, 1), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_smallest_that_reach_a_target(seed: int, size: int, share: float, rounded: bool) -> None:
    dice = np.random.default_rng(seed)
    keys = dice.exponential(dice.choice([0.01, 3.0, 60.0]), size)
    keys = np.round(keys, 1) if rounded else keys
    weights = dice.random(size) * (dice.random(size) < 0.9)
    target = share * weights.sum()
    found = smallest(keys, weights, target)
    order = np.argsort(keys, kind="stable")
    # By rounding, one at the edge may stay or go.
    counts = [int((np.cumsum(weights[order]) < target * nudge).sum()) + 1 for nudge in (1 - 1e-12, 1 + 1e-12)]
    assert any(np.array_equal(found, np.sort(order[: min(count, size)])) for count in range(counts[0], counts[1] + 1))


@given(st.integers(0, 2**32), st.sampled_from((1, 7, 511, 513, 50257)), st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=100)
def test_a_number_falls_on_the_token_whose_share_it_is_in(seed: int, size: int, number: float) -> None:
    dice = np.random.default_rng(seed)
    weights = np.exp(dice.standard_normal(size) * 5) * (dice.random(size) < 0.7)
    weights[dice.integers(size)] = 1.0
    for one in (number, 0.0, 1 - 2.0**-53):
        index = pick(weights, block_sums(weights), one)
        running = np.cumsum(weights)
        assert weights[index] > 0
        assert running[index] >= one * running[-1] * (1 - 1e-12)
        assert running[index] - weights[index] <= one * running[-1] * (1 + 1e-12)
