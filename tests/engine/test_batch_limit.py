"""How many sequences are decoded together follows what their steps take, up as well as down."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt2.engine.network.batch_limit import BatchLimit, largest_that_pays

Curve = Callable[[int], float]


def curve(**milliseconds: float) -> Curve:
    """Return the seconds of a step by its sequences: on straight lines between those given, as `_8=20`."""
    points = sorted((int(name[1:]), value / 1e3) for name, value in milliseconds.items())

    def seconds(n: int) -> float:
        below = max(point for point in points if point[0] <= n)
        above = min((point for point in points if point[0] >= n), default=below)
        if above[0] == below[0]:
            return below[1]
        return below[1] + (n - below[0]) / (above[0] - below[0]) * (above[1] - below[1])

    return seconds


# A BLAS with a kernel for few rows: up to 32 are worth their time; up to 8 are; and one without, for which two rows are
# dearer than four.
WIDE = curve(_1=17, _2=18, _4=19, _8=22, _16=30, _32=48)
NARROW = curve(_1=17, _2=18, _4=19, _8=22, _16=44, _32=88)
STEEP = curve(_1=33, _2=77, _4=55, _8=56, _16=90, _32=130)


@dataclass
class Jobs:
    """As many texts of `tokens` tokens as there is room for, of which `demand` are there; steps take what `curve` says.

    Attributes:
        seconds: that all steps took so far.
        waited: how many steps in a row a text had to wait for its turn, at most.
    """

    curve: Curve
    limit: int
    demand: int = 100
    n_slots: int = 32
    tokens: int = 60
    disturb: Callable[[], float] = lambda: 1.0
    seconds: float = 0.0
    generated: int = 0
    waited: int = 0
    left: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cache: Any = SimpleNamespace(usable_slots=self.limit, n_slots=self.n_slots)
        network: Any = SimpleNamespace(cache=cache)
        self.cache, self.batch_limit = cache, BatchLimit(network)
        self.network = network
        self.dice = random.Random(0)

    def step(self) -> None:
        while len(self.left) < min(self.cache.usable_slots, self.demand):
            # Tokens to go, and steps without a turn. A prompt is read first, in a step that is no look.
            self.left.append([self.dice.randint(self.tokens // 2, self.tokens), 0])
            self.batch_limit.note(0.005)
            self.seconds += 0.005
        taken = self.batch_limit.take(self.left)
        took = self.curve(len(taken)) * self.disturb()
        self.batch_limit.note(took)
        self.seconds += took
        self.generated += len(taken)
        turns = {id(text) for text in taken}
        for text in self.left:
            text[0], text[1] = (text[0] - 1, 0) if id(text) in turns else (text[0], text[1] + 1)
            self.waited = max(self.waited, text[1])
        self.left = [text for text in self.left if text[0] > 0]

    def run(self, seconds: float) -> list[int]:
        """Take steps for that long; return the limits that there were, one after the other."""
        limits, until = [self.cache.usable_slots], self.seconds + seconds
        while self.seconds < until:
            self.step()
            if self.cache.usable_slots != limits[-1]:
                limits.append(self.cache.usable_slots)
        return limits


@pytest.mark.parametrize("tokens", [16, 60])
@pytest.mark.parametrize(("start", "found", "steps"), [(8, 32, WIDE), (1, 32, WIDE), (32, 8, NARROW), (16, 8, NARROW)])
def test_a_wrong_figure_is_corrected_within_seconds(start: int, found: int, steps: Curve, tokens: int) -> None:
    jobs = Jobs(steps, start, tokens=tokens)
    jobs.run(6)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == found


def test_where_two_do_not_pay_four_are_tried() -> None:
    jobs = Jobs(STEEP, 1)
    jobs.run(15)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == 32


@pytest.mark.parametrize(("right", "steps"), [(32, WIDE), (8, NARROW), (32, STEEP)])
def test_a_right_figure_stays_and_costs_little_to_look_at(right: int, steps: Curve) -> None:
    jobs = Jobs(steps, right)
    limits = jobs.run(200)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == right
    assert len(limits) < 12
    plain = Jobs(steps, right)
    plain.batch_limit = BatchLimit(plain.network, adapts=False)
    assert plain.run(200) == [right]
    assert jobs.generated > 0.98 * plain.generated


def test_the_situation_may_change() -> None:
    jobs = Jobs(WIDE, 32)
    jobs.run(30)
    jobs.curve = NARROW
    jobs.run(130)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == 8
    jobs.curve = WIDE
    jobs.run(250)
    assert jobs.batch_limit.finding.sequences == 32


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("start", "found", "steps"), [(8, 32, WIDE), (32, 8, NARROW)])
def test_other_programs_disturb_and_do_not_mislead(start: int, found: int, steps: Curve, seed: int) -> None:
    dice = random.Random(seed)
    # One step in four takes up to four times as long.
    jobs = Jobs(steps, start, disturb=lambda: dice.uniform(1, 4) if dice.random() < 0.25 else dice.uniform(1, 1.1))
    jobs.run(60)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == found


def test_a_steady_neighbour_makes_no_difference() -> None:
    for start, found, steps in ((8, 32, WIDE), (32, 8, NARROW)):
        jobs = Jobs(steps, start, disturb=lambda: 2.0)
        jobs.run(60)
        assert jobs.batch_limit.finding is not None
        assert jobs.batch_limit.finding.sequences == found


def test_few_jobs_tell_nothing_of_many() -> None:
    for demand in (1, 2, 3, 7):
        jobs = Jobs(NARROW, 16, demand=demand)
        assert jobs.run(60) == [16]
        assert jobs.batch_limit.finding is None
    # Nobody waits: a higher limit is there, and is not filled.
    jobs = Jobs(WIDE, 8, demand=8)
    jobs.run(100)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == 8


def test_fewer_jobs_than_a_limit_that_is_too_high_lower_it() -> None:
    jobs = Jobs(NARROW, 32, demand=24)
    jobs.run(60)
    assert jobs.batch_limit.finding is not None
    assert jobs.batch_limit.finding.sequences == 8


def test_every_text_has_its_turn() -> None:
    jobs = Jobs(WIDE, 16, n_slots=16)
    jobs.run(40)
    assert 1 <= jobs.waited <= 4


def test_a_limit_that_somebody_has_set_stays() -> None:
    cache = SimpleNamespace(usable_slots=8, n_slots=8)
    network: Any = SimpleNamespace(cache=cache)
    limit = BatchLimit(network, adapts=False)
    given: Sequence[int] = range(8)
    for _ in range(1000):
        assert limit.take(given) is given
        assert not limit.is_looking
        limit.note(1.0)
    assert cache.usable_slots == 8
    assert limit.finding is None


def test_the_largest_that_pays_may_begin_at_more_than_one() -> None:
    assert largest_that_pays(NARROW, 16, 4) == 8
    assert largest_that_pays(WIDE, 24, 6) == 24
    assert largest_that_pays(WIDE, 3, 3) == 3
