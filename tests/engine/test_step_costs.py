"""What a step takes by its rows is learnt from the steps, where a measurement was wrong too."""

from __future__ import annotations

import random

import pytest

from fastgpt2.engine.network.step_costs import StepCosts


def test_costs_of_what_was_not_noted_follow_what_was_measured() -> None:
    costs = StepCosts({1: 10.0, 2: 15.0, 4: 20.0, 8: 40.0})
    assert [costs.seconds(rows) for rows in (1, 3, 6, 16)] == [10.0, 17.5, 30.0, 80.0]
    # The machine is three times as fast as when it was measured.
    costs.note(1, 3.0)
    assert costs.seconds(4) == pytest.approx(6.0)
    costs.note(4, 9.0)
    assert costs.seconds(4) == pytest.approx(9.0)
    assert costs.seconds(8) == pytest.approx(18.0)
    # A step that was disturbed changes little, and not for long.
    costs.note(4, 900.0)
    assert costs.seconds(4) < 12.0
    for _ in range(20):
        costs.note(4, 9.0)
    assert costs.seconds(4) == pytest.approx(9.0, rel=0.02)
    # What was noted long ago counts less than what was noted lately.
    for _ in range(400):
        costs.note(1, 6.0)
    assert costs.seconds(4) == pytest.approx(12.0, rel=0.01)


def test_costs_without_a_measurement() -> None:
    costs = StepCosts()
    assert not costs.known
    assert costs.seconds(1) < costs.seconds(2) < 1.1 * costs.seconds(1)


# As a busy machine measured it, and as it is, in milliseconds.
BUSY = {1: 68.0, 2: 71.0, 4: 210.0, 8: 400.0, 16: 900.0}
TRUE = {1: 17.0, 2: 18.0, 4: 19.0, 8: 22.0, 16: 30.0}


def test_how_sizes_compare_is_learnt_for_good() -> None:
    costs = StepCosts(BUSY)
    for _ in range(12):
        for rows, took in TRUE.items():
            costs.note(rows, took)
    for _ in range(400):  # what the others take was seen long ago by now
        costs.note(1, 34.0)
    for rows, took in TRUE.items():
        assert costs.seconds(rows) == pytest.approx(2 * took, rel=0.02)
    learnt = costs.learnt()
    assert {rows: cost.seconds for rows, cost in learnt.items()} == pytest.approx(
        {rows: 2 * took for rows, took in TRUE.items()}, rel=0.02
    )
    assert all(cost.spread < 0.02 and cost.looks >= 3 for cost in learnt.values())


def test_disturbed_steps_do_not_mislead() -> None:
    dice, costs = random.Random(0), StepCosts(BUSY)
    for _ in range(200):
        rows = dice.choice(list(TRUE))
        costs.note(rows, TRUE[rows] * (dice.uniform(1, 5) if dice.random() < 0.15 else dice.uniform(1, 1.05)))
    for _ in range(400):
        costs.note(1, TRUE[1])
    for rows, took in TRUE.items():
        assert costs.seconds(rows) == pytest.approx(took, rel=0.15)


def test_what_is_not_seen_for_a_while_still_compares_with_the_rest() -> None:
    """By hand: while a text grows, each step takes 0.2% longer than the one before. The next text begins anew."""
    costs = StepCosts(BUSY)
    for _ in range(12):
        for rows, took in TRUE.items():
            costs.note(rows, took)
    for _ in range(300):
        for i in range(21):  # the last step of a text and the first of the next one are of one size
            rows = (1, 2)[i % 2]
            costs.note(rows, TRUE[rows] * (1 + 0.002 * i))
    learnt = costs.learnt()
    for rows, took in TRUE.items():
        assert learnt[rows].seconds / learnt[1].seconds == pytest.approx(took / TRUE[1], rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_nor_does_chance_lead_away_what_is_seen(seed: int) -> None:
    dice, costs = random.Random(seed), StepCosts(TRUE)
    for i in range(10_000):
        rows = dice.choice(list(TRUE) if i < 100 else (1, 2, 4))
        costs.note(rows, TRUE[rows] * (dice.uniform(1, 3) if dice.random() < 0.25 else 1.0))
    learnt = costs.learnt()
    assert learnt[16].seconds / learnt[1].seconds == pytest.approx(TRUE[16] / TRUE[1], rel=0.15)


def test_what_was_not_compared_goes_with_its_neighbour() -> None:
    costs = StepCosts({1: 10.0, 2: 20.0, 8: 80.0, 16: 160.0})
    for _ in range(10):
        costs.note(1, 10.0)
        costs.note(2, 11.0)
    learnt = costs.learnt()
    assert learnt[2].seconds == pytest.approx(11.0, rel=0.01)
    assert (learnt[16].looks, learnt[2].looks > 0) == (0, True)
    assert learnt[16].seconds == pytest.approx(88.0, rel=0.01)


def test_nothing_is_learnt_of_one_size_alone() -> None:
    costs = StepCosts(BUSY)
    for _ in range(100):
        costs.note(1, 17.0)
    assert costs.learnt() == {}


def test_figures_that_cannot_be_do_no_harm() -> None:
    costs = StepCosts({1: 0.0, 2: 15.0})
    costs.note(1, 0.0)
    costs.note(2, 0.0)
    assert costs.seconds(1) > 0
    assert costs.seconds(4) > 0
