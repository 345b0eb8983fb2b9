"""Chi-squared tests: how likely counts are that deviate so far from what is expected."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Fewer than this many expected in a class make the test inexact; such classes are put together.
LEAST_EXPECTED = 5.0


def chi_squared_p(statistic: float, freedom: int) -> float:
    """Return the probability that a chi-squared variable of so many degrees of freedom is at least the statistic.

    That is the regularised upper incomplete gamma function Q(freedom / 2, statistic / 2), by its series or its
    continued fraction. Source: Press et al., "Numerical Recipes", section 6.2.
    """
    a, x = freedom / 2, statistic / 2
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > total * 1e-15:
            n += 1
            term *= x / n
            total += term
        return 1.0 - total * scale
    # Lentz's method.
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for i in range(1, 10_000):
        factor = -i * (i - a)
        b += 2
        d = 1 / (factor * d + b)
        c = b + factor / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return fraction * scale


def goodness_of_fit(counts: NDArray[np.intp], probabilities: NDArray[np.float64]) -> float:
    """Return the p-value of counts under a distribution. The rarest classes are put together into one."""
    expected = probabilities * counts.sum()
    order = np.argsort(expected, kind="stable")
    # The fewest of the rarest that together are often enough.
    rare = int(np.searchsorted(np.cumsum(expected[order]), LEAST_EXPECTED)) + 1
    while rare < len(order) and expected[order[rare]] < LEAST_EXPECTED:
        rare += 1
    merged_counts = np.array([counts[order[:rare]].sum(), *counts[order[rare:]]], np.float64)
    merged = np.array([expected[order[:rare]].sum(), *expected[order[rare:]]])
    return chi_squared_p(float(((merged_counts - merged) ** 2 / merged).sum()), len(merged) - 1)


def independence(first: NDArray[np.intp], second: NDArray[np.intp]) -> float:
    """Return the p-value of pairs of classes under independence, by their contingency table."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    if expected.min() < LEAST_EXPECTED:
        raise ValueError(f"a cell expects {expected.min():.2f} only")
    statistic = float(((table - expected) ** 2 / expected).sum())
    return chi_squared_p(statistic, (table.shape[0] - 1) * (table.shape[1] - 1))
