"""The drift tests: exact against plain computations, calibrated under the null, and powerful."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from mithridate.audit import drift
from mithridate.audit.sets import audit_set
from mithridate.examples import Example

DRAWS = 200


def sample(rng, count, shift=0.0, dimensions=6):
    points = rng.normal(size=(count, dimensions)) + np.eye(dimensions)[0] * shift
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_mmd_equals_the_double_sums() -> None:
    rng = np.random.default_rng(0)
    one, other = sample(rng, 7), sample(rng, 5, shift=0.5)
    points = np.concatenate([one, other])
    squared = [
        float(((points[i] - points[j]) ** 2).sum())
        for i, j in itertools.combinations(range(len(points)), 2)
    ]
    typical = np.median(squared)

    def kernel(x, y):
        gap = float(((x - y) ** 2).sum())
        return np.mean([np.exp(-gap / (2 * c * c * typical)) for c in drift.BANDWIDTHS])

    def mean(pairs):
        return np.mean([kernel(x, y) for x, y in pairs])

    expected = (
        mean(itertools.permutations(one, 2))
        + mean(itertools.permutations(other, 2))
        - 2 * mean(itertools.product(one, other))
    )
    assert drift.mmd(one, other, permutations=99, seed=0).value == pytest.approx(expected)


def test_classifier_equals_ridge_regression_trained_on_the_other_folds() -> None:
    rng = np.random.default_rng(1)
    points = sample(rng, 40)
    labels = rng.integers(0, 2, 40).astype(float)
    fold = np.arange(0, 40, 5)
    rest, weights = drift._ridge_predictor(points, fold)
    model = Ridge(alpha=drift.RIDGE).fit(points[rest], labels[rest])
    scores = weights @ labels[rest]
    expected = model.predict(points[fold])
    np.testing.assert_allclose(scores - scores[0], expected - expected[0], atol=1e-12)


def test_auc_is_the_share_of_pairs_within_folds_that_are_ordered_right() -> None:
    rng = np.random.default_rng(2)
    one, other = sample(rng, 30), sample(rng, 20, shift=1.0)
    points, new = np.concatenate([one, other]), np.arange(50) >= 30
    order = np.random.default_rng([3, 1]).permutation(50)
    right = pairs = 0.0
    for part in np.array_split(order, drift.FOLDS):
        rest = np.setdiff1d(np.arange(50), part)
        scores = Ridge(alpha=drift.RIDGE).fit(points[rest], new[rest]).predict(points[part])
        count = new[part].sum() * (~new[part]).sum()
        right += roc_auc_score(new[part], scores) * count
        pairs += count
    found = drift.classifier_test(one, other, permutations=99, seed=3)
    assert found.value == pytest.approx(right / pairs)


@pytest.mark.parametrize("test", [drift.mmd, drift.classifier_test])
def test_p_is_uniform_under_the_null(test) -> None:
    rng = np.random.default_rng(4)
    values = np.array(
        [
            test(sample(rng, 22), sample(rng, 18), permutations=99, seed=draw).p
            for draw in range(DRAWS)
        ]
    )
    for alpha in (0.05, 0.1, 0.5):
        low, high = stats.binom(DRAWS, alpha).ppf([0.001, 0.999])
        assert low <= (values <= alpha).sum() <= high, alpha
    tenths = np.histogram(values, bins=np.linspace(0.005, 1.005, 11))[0]
    assert stats.chisquare(tenths).pvalue > 0.001


@pytest.mark.parametrize("test", [drift.mmd, drift.classifier_test])
def test_a_shift_is_found(test) -> None:
    rng = np.random.default_rng(5)
    found = [
        test(sample(rng, 40), sample(rng, 40, shift=1.5), permutations=199, seed=draw).p < 0.05
        for draw in range(40)
    ]
    assert np.mean(found) >= 0.9


def test_equal_points_on_both_sides_are_no_drift() -> None:
    points = np.tile([[1.0, 0.0]], (12, 1))
    assert drift.mmd(points, points, permutations=99, seed=0).p == 1.0
    found = drift.classifier_test(points, points, permutations=99, seed=0)
    assert (found.value, found.p) == (0.5, 1.0)


def test_wordings_of_one_fact_are_one_draw() -> None:
    """Rows of a fact lie together; counted as separate draws, no drift would look like some."""
    rng = np.random.default_rng(6)

    def cluster(name):
        centres = sample(rng, 15)
        rows = [
            Example(prompt=f"{name} {fact} {wording}", fact_id=f"{name} {fact}")
            for fact in range(15)
            for wording in range(6)
        ]
        part = audit_set(name, rows)
        near = [centres[int(row.fact_id.split()[1])] for row in part.examples]
        return part, np.array(near) + rng.normal(scale=0.01, size=(90, 6))

    rejected = naive = 0
    for draw in range(30):
        (held, one), (seen, other) = cluster("held"), cluster("seen")
        one /= np.linalg.norm(one, axis=1, keepdims=True)
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        found = drift.compare(
            held, seen, {"held": one, "seen": other}, permutations=99, seed=draw, most=100
        )
        assert found is not None
        assert (found["held"], found["seen"]) == (15, 15)
        rejected += found["mmd2_p"] <= 0.05
        naive += drift.mmd(one, other, permutations=99, seed=draw).p <= 0.05
    assert rejected <= stats.binom(30, 0.05).ppf(0.999)
    assert naive >= 15


def test_category_shares_are_compared() -> None:
    same = drift.category_test(["a", "b"] * 20, ["a", "b"] * 20, permutations=199, seed=0)
    moved = drift.category_test(["a", "b"] * 20, ["a"] * 5 + ["c"] * 35, permutations=199, seed=0)
    assert same.value == 0
    assert same.p == 1
    assert moved.p < 0.02
    assert drift.category_test(["a"], ["a"], permutations=199, seed=0) is None


@pytest.mark.parametrize(
    ("aucs", "ps", "drifted", "ticket"),
    [
        ([0.9, 0.9], [0.001, 0.001], [True, True], True),
        ([0.9, 0.5, 0.9], [0.001, 0.5, 0.001], [True, False, True], False),
        ([0.6, 0.6], [0.001, 0.001], [False, False], False),
        # Two windows double a p-value of .008, which then is no evidence at .01.
        ([0.9, 0.5], [0.008, 0.9], [False, False], False),
    ],
)
def test_a_ticket_takes_two_windows_running(aucs, ps, drifted, ticket) -> None:
    windows = [{"auc": auc, "auc_p": p} for auc, p in zip(aucs, ps, strict=True)]
    assert drift.judge_windows(windows, auc=0.65, p=0.01) is ticket
    assert [window["drifted"] for window in windows] == drifted
