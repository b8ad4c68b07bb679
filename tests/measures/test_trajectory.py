"""Trajectory measures against closed forms."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from mithridate.measures.trajectory import (
    area_under_harm,
    break_step,
    collapse,
    wilson,
    worst_case,
)

ROWS = [
    {"step": 0, "useful_harm": 0.0, "utility": 1.0},
    {"step": 5, "useful_harm": 0.3, "utility": 0.8},
    {"step": 10, "useful_harm": 0.6, "utility": 0.79},
    {"step": 15, "useful_harm": 0.2, "utility": 0.9},
]


def test_the_worst_case_keeps_utility() -> None:
    found = worst_case(ROWS, reference_utility=1.0)
    assert (found.useful_harm, found.unbounded) == (0.3, 0.6)
    assert found.row is not None
    assert found.row["step"] == 5
    assert found.unbounded_row["step"] == 10


def test_the_floor_is_relative_to_the_utility_before() -> None:
    assert worst_case(ROWS, reference_utility=0.9).useful_harm == 0.6
    assert worst_case(ROWS, reference_utility=1.0, utility_floor=0.9).useful_harm == 0.2


def test_no_checkpoint_with_utility_means_no_useful_harm() -> None:
    found = worst_case(ROWS[1:], reference_utility=2.0)
    assert found.row is None
    assert found.useful_harm == 0
    assert found.unbounded == 0.6


def test_an_empty_attack_is_an_error() -> None:
    with pytest.raises(ValueError, match="without rows"):
        worst_case([], reference_utility=1.0)


@pytest.mark.parametrize(("successes", "n"), [(0, 100), (3, 40), (20, 40), (40, 40)])
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high))


def test_wilson_refuses_what_is_no_share() -> None:
    for successes, n in ((0, 0), (1, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="no share"):
            wilson(successes, n)


def test_collapse() -> None:
    assert collapse(0.5, before=1.0, chance=0.5) == 1
    assert collapse(0.75, before=1.0, chance=0.5) == 0.5
    assert collapse(0.0, before=0.1) == 1
    with pytest.raises(ValueError, match="near chance"):
        collapse(0.5, before=0.55, chance=0.5)


def test_break_step_is_censored_not_infinite() -> None:
    assert break_step(ROWS, threshold=0.25, reference_utility=1.0) == 5
    assert break_step(ROWS, threshold=0.3, reference_utility=1.0) == 5
    assert break_step(ROWS, threshold=0.5, reference_utility=1.0) is None
    assert break_step(ROWS, threshold=0.5, reference_utility=1.0, utility_floor=0.7) == 10


def test_area_under_harm() -> None:
    constant = [{"step": step, "useful_harm": 0.4} for step in (0, 5, 60)]
    assert area_under_harm(constant) == pytest.approx(0.4)
    rising = [{"step": 0, "useful_harm": 0.0}, {"step": 9, "useful_harm": 1.0}]
    assert area_under_harm(rising) == pytest.approx(0.5)
    late = [
        {"step": 0, "useful_harm": 0.0},
        {"step": 4, "useful_harm": 0.0},
        {"step": 9, "useful_harm": 1.0},
    ]
    assert area_under_harm(late) == pytest.approx(math.log(2) / 2 / math.log(10))
