"""Intervals and tests against published examples, closed forms and their own error rates."""

from __future__ import annotations

import math
import random
import statistics as plain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mithridate.measures.statistics import (
    difference,
    equivalence,
    gini,
    interquartile_mean,
    over_seeds,
    paired_difference,
    share_interval,
    survival,
)
from mithridate.measures.trajectory import wilson

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=4)


def test_newcombes_own_example() -> None:
    low, high = difference(56 / 70, 70, 48 / 80, 80, level=0.95)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_paired_difference_of_perfect_agreement_still_has_a_width() -> None:
    estimate, low, high = paired_difference([1] * 100, [1] * 100, level=0.9)
    assert estimate == 0
    assert low == -high
    # 1/2 in each discordant cell: variance (1 / 102) / 102 of the mean of 102 differences.
    assert high == pytest.approx(stats.norm.isf(0.05) / 102)


def test_pairing_sees_what_independent_items_cannot() -> None:
    a, b = [1] * 150 + [0] * 50, [1] * 149 + [0] * 51
    _, low, high = paired_difference(a, b, level=0.9)
    loose = difference(150 / 200, 200, 149 / 200, 200, level=0.9)
    assert high - low < (loose[1] - loose[0]) / 5
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1], [1, 0], level=0.9)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (-0.009, 0.009, "holds"),
        (-0.01, 0.009, "inconclusive"),
        (-0.02, 0.0, "inconclusive"),
        (-0.03, -0.011, "fails"),
        (0.011, 0.03, "fails"),
        (-0.03, -0.01, "inconclusive"),
    ],
)
def test_equivalence_at_its_boundaries(low: float, high: float, answer: str) -> None:
    assert equivalence(low, high, 0.01) == answer


def test_one_seed_is_wilson() -> None:
    found = share_interval([0.25], 40)
    assert (found.low, found.high) == pytest.approx(wilson(10, 40))


def test_nothing_seen_is_not_nothing_there() -> None:
    for n, highest in ((100, 0.037), (313, 0.0122), (700, 0.0055)):
        found = share_interval([0.0] * 5, n)
        assert found.low == 0
        assert 0.9 * highest < found.high < highest


def test_seeds_that_disagree_widen_the_interval() -> None:
    together = share_interval([0.5] * 4, 400)
    apart = share_interval([0.1, 0.3, 0.7, 0.9], 400)
    assert apart.low < together.low - 0.1
    assert apart.high > together.high + 0.1
    assert share_interval([0.1, 0.3, 0.7, 0.9], 400) == apart


def test_a_cut_off_correction_does_not_hide_its_noise() -> None:
    assert share_interval([0.0], 100, raw=[0.1]).high > share_interval([0.0], 100).high + 0.02


@given(SHARES, st.integers(0, 3), st.floats(0, 1), st.integers(1, 300))
def test_a_larger_share_never_lowers_a_bound(
    shares: list[float], which: int, more: float, n: int
) -> None:
    which %= len(shares)
    raised = [*shares]
    raised[which] += more * (1 - raised[which])
    before, after = share_interval(shares, n), share_interval(raised, n)
    assert after.low >= before.low - 1e-12
    assert after.high >= before.high - 1e-12
    assert 0 <= before.low <= before.estimate + 1e-12
    assert before.estimate - 1e-12 <= before.high <= 1


def test_the_two_level_interval_covers_the_mean_of_seeds() -> None:
    noise = random.Random(0)
    missed = 0
    for _ in range(120):
        chances = [min(max(noise.gauss(0.3, 0.1), 0), 1) for _ in range(5)]
        seen = [sum(noise.random() < p for _ in range(100)) / 100 for p in chances]
        interval = share_interval(seen, 100)
        missed += not interval.low <= 0.3 <= interval.high
    assert missed <= 12


def test_survival_by_hand() -> None:
    # At risk 5, 4, 2; breaks at 10, 20, 40; censored at 20 (after the break) and 50.
    found = survival([10, 20, None, 40, None], [50, 50, 20, 50, 50])
    alive = [1.0, 4 / 5, 4 / 5 * 3 / 4, 4 / 5 * 3 / 4 * 1 / 2]
    assert found.restricted_mean == pytest.approx(
        10 * alive[0] + 10 * alive[1] + 20 * alive[2] + 10 * alive[3]
    )
    assert (found.broken, found.attacks, found.median, found.horizon) == (3, 5, 40, 50)


def test_an_unbroken_model_is_censored_and_not_eternal() -> None:
    found = survival([None, None], [40, 40])
    assert (found.broken, found.median, found.restricted_mean) == (0, None, 40)


def test_all_broken_without_censoring_is_the_plain_mean() -> None:
    found = survival([5.0, 10.0, 30.0], [40, 40, 40])
    assert found.restricted_mean == pytest.approx(15)
    assert found.median == 10


def test_students_interval_and_means() -> None:
    values = [0.1, 0.4, 0.2, 0.3]
    low, high = over_seeds(values)
    half = stats.t.isf(0.025, 3) * plain.stdev(values) / 2
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half))
    assert over_seeds([0.2, 0.2]) == (0.2, 0.2)
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([0.2])
    assert interquartile_mean([9.0, 1.0, 2.0, 0.0]) == 1.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_gini_is_a_mean_of_differences(values: list[float]) -> None:
    total = math.fsum(abs(a - b) for a in values for b in values)
    mean = math.fsum(values) / len(values)
    expected = total / (2 * len(values) ** 2 * mean) if mean > 1e-12 else 0.0
    if mean > 1e-12 or mean == 0:
        assert gini(values) == pytest.approx(expected, abs=1e-9)
