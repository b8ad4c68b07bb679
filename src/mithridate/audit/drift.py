"""Has what attackers ask moved away from the harmful set? Two-sample tests with exact p-values.

Both tests draw labels anew and repeat the whole computation, training included, so that under
the null hypothesis every ordering of the labels is equally likely and p is uniform.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

from mithridate.audit.sets import AuditSet, Vectors
from mithridate.categories import categories_of

BANDWIDTHS = (0.5, 1.0, 2.0)
"""Of the mixture, in units of the median distance."""

RIDGE = 1.0
FOLDS = 5

_BATCH = 250
_ROUNDING = 1e-12

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps labels, shape (rows, draws), to the statistic of every draw, shape (draws,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """A statistic with its permutation p-value, one-sided: large values speak against equality."""

    value: float
    p: float


def mmd(one: Vectors, other: Vectors, *, permutations: int, seed: int) -> Tested:
    """Test whether two samples come from one distribution by their maximum mean discrepancy.

    Unbiased MMD² (Gretton et al. 2012, equation 3) with the mean of three Gaussian kernels,
    whose bandwidths are `BANDWIDTHS` times the median distance of the pooled points: a choice
    that does not see the labels.

    Parameters
    ----------
    one, other
        Unit vectors, at least two each.
    permutations
        Draws of the labels; the smallest p is 1 / (permutations + 1).
    """
    kernel = _mixture_kernel(np.concatenate([one, other]))
    sums = kernel.sum(axis=1)
    whole = sums.sum()
    m, n = len(one), len(other)

    def statistic(labels: NDArray[np.float64]) -> NDArray[np.float64]:
        inner: NDArray[np.float64] = np.einsum("ij,ij->j", labels, kernel @ labels)
        across = sums @ labels - inner
        outer = whole - inner - 2 * across
        found: NDArray[np.float64] = (
            inner / (m * (m - 1)) + outer / (n * (n - 1)) - 2 * across / (m * n)
        )
        return found

    return _permuted(statistic, m, n, permutations=permutations, seed=seed)


def classifier_test(one: Vectors, other: Vectors, *, permutations: int, seed: int) -> Tested:
    """Test whether a classifier tells two samples apart (Lopez-Paz and Oquab 2017).

    The statistic is the AUC of ridge regression on the labels, cross-fitted over five folds that
    do not see the labels, over all pairs within a fold. Its predictions are linear in the labels:
    one factorisation a fold serves every permutation, each of which trains anew.

    Parameters
    ----------
    one, other
        Unit vectors, at least `FOLDS` each.
    """
    points = np.concatenate([one, other])
    order = np.random.default_rng([seed, 1]).permutation(len(points))
    folds = [np.sort(part) for part in np.array_split(order, FOLDS)]
    predictors = [(fold, *_ridge_predictor(points, fold)) for fold in folds]

    def statistic(labels: NDArray[np.float64]) -> NDArray[np.float64]:
        wins = pairs = np.zeros(labels.shape[1])
        for fold, rest, weights in predictors:
            # The second sample is what a high score stands for.
            ranks = stats.rankdata(weights @ (1 - labels[rest]), axis=0)
            positive = 1 - labels[fold]
            count = positive.sum(axis=0)
            wins = wins + (ranks * positive).sum(axis=0) - count * (count + 1) / 2
            pairs = pairs + count * (len(fold) - count)
        found: NDArray[np.float64] = np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)
        return found

    return _permuted(statistic, len(one), len(other), permutations=permutations, seed=seed)


def category_test(one: Sequence[str], other: Sequence[str], *, permutations: int, seed: int) -> Any:
    """Return the chi-squared test of equal category shares, or None with fewer than two.

    Its p-value is by permutation, since expected counts may be small.
    """
    names = sorted({*one, *other})
    if len(names) < 2 or not one or not other:
        return None
    first, second = Counter(one), Counter(other)
    table = np.array([[first[name] for name in names], [second[name] for name in names]])
    method = stats.PermutationMethod(n_resamples=permutations, rng=np.random.default_rng([seed, 2]))
    found = stats.chi2_contingency(table, correction=False, method=method)
    return Tested(value=float(found.statistic), p=float(found.pvalue))


def compare(
    held: AuditSet,
    seen: AuditSet,
    vectors: dict[str, Vectors],
    *,
    permutations: int,
    seed: int,
    most: int,
) -> dict[str, Any] | None:
    """Return both tests of a harmful set against newly seen prompts, or None with too few.

    One row of each fact or prompt enters, at most ``most`` of each set, chosen by hash.
    """
    rows, news = held.independent()[:most], seen.independent()[:most]
    if min(len(rows), len(news)) < 2 * FOLDS:
        return None
    one, other = vectors[held.name][rows], vectors[seen.name][news]
    discrepancy = mmd(one, other, permutations=permutations, seed=seed)
    told_apart = classifier_test(one, other, permutations=permutations, seed=seed)
    categories = category_test(
        [name for row in rows if (name := ",".join(categories_of(held.examples[row])))],
        [name for row in news if (name := ",".join(categories_of(seen.examples[row])))],
        permutations=permutations,
        seed=seed,
    )
    return {
        "set": seen.name,
        "held": len(rows),
        "seen": len(news),
        "mmd2": discrepancy.value,
        "mmd2_p": discrepancy.p,
        "auc": told_apart.value,
        "auc_p": told_apart.p,
        "chi2": categories.value if categories else None,
        "chi2_p": categories.p if categories else None,
    }


def judge_windows(windows: list[dict[str, Any]], *, auc: float, p: float) -> bool:
    """Mark the drifted windows; return whether two consecutive ones are.

    A window has drifted if its AUC is above ``auc`` and its p-value, adjusted over all windows
    by Benjamini and Hochberg, is below ``p``: the AUC is the size of the effect, p only says
    that it is there.
    """
    adjusted = stats.false_discovery_control([window["auc_p"] for window in windows])
    for window, value in zip(windows, adjusted.tolist(), strict=True):
        window["auc_p_adjusted"] = value
        window["drifted"] = window["auc"] > auc and value < p
    return any(one["drifted"] and other["drifted"] for one, other in pairwise(windows))


def _mixture_kernel(points: Vectors) -> Vectors:
    """Return the kernel matrix with a zero diagonal, shape (points, points)."""
    squared = np.maximum(2 - 2 * points @ points.T, 0.0)
    typical = float(np.median(squared[np.triu_indices(len(points), k=1)])) or 1.0
    kernel: Vectors = np.mean(
        [np.exp(-squared / (2 * scale**2 * typical)) for scale in BANDWIDTHS], axis=0
    )
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _ridge_predictor(points: Vectors, fold: NDArray[np.int64]) -> tuple[NDArray[np.int64], Vectors]:
    """Return the rows outside ``fold`` and the matrix from their labels to the fold's scores."""
    rest = np.setdiff1d(np.arange(len(points)), fold)
    mean = points[rest].mean(axis=0)
    train, test = points[rest] - mean, points[fold] - mean
    gram = train @ train.T + RIDGE * np.eye(len(rest))
    return rest, linalg.solve(gram, train @ test.T, assume_a="pos").T


def _permuted(statistic: Statistic, m: int, n: int, *, permutations: int, seed: int) -> Tested:
    actual = np.concatenate([np.ones(m), np.zeros(n)])
    value = float(statistic(actual[:, None])[0])
    rng = np.random.default_rng([seed, 0])
    beaten = 0
    for start in range(0, permutations, _BATCH):
        size = min(_BATCH, permutations - start)
        drawn = rng.permuted(np.tile(actual, (size, 1)), axis=1).T
        beaten += int((statistic(drawn) >= value - _ROUNDING).sum())
    return Tested(value=value, p=(1 + beaten) / (1 + permutations))
