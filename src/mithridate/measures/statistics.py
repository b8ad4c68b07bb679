"""Intervals, equivalence and survival, as `metrics.md` section 7 asks for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from mithridate.measures.trajectory import wilson

DRAWS = 10_000
LEVEL = 0.95

Answer = Literal["holds", "fails", "inconclusive", "not run"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its two-sided bounds.

    Attributes
    ----------
    n
        Number of distinct items behind it.
    seeds
        Number of seeds behind it.
    """

    estimate: float
    low: float
    high: float
    n: int
    seeds: int


def share_interval(
    shares: Sequence[float],
    n: int,
    *,
    raw: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Interval:
    """Return the interval of a share's mean over seeds.

    It is the hull of two intervals. The two-level bootstrap (seeds, then items within a seed)
    knows how much seeds differ but has no width where no seed shows an event. Wilson's interval
    of the mean over ``n`` items has; it takes no credit for seeds, which all saw the same items.
    Both bounds rise with every one of the shares.

    Parameters
    ----------
    shares
        One per seed, 0 to 1: of ``n`` items each. A chance-corrected share is treated as a share.
    raw
        The same without the correction for chance. A corrected share that was cut off at 0 hides
        its noise: where the raw one is noisier, its half-widths count.
    """
    low, high = item_bounds(shares, n, raw=raw, level=level)
    if len(shares) > 1:
        bottom, top = _two_level(tuple(sorted(map(float, shares))), n, level)
        low, high = min(low, bottom), max(high, top)
    return Interval(
        estimate=math.fsum(shares) / len(shares), low=low, high=high, n=n, seeds=len(shares)
    )


def item_bounds(
    shares: Sequence[float],
    n: int,
    *,
    raw: Sequence[float] | None = None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the part of `share_interval` that knows items only: it is never wider."""
    if not shares:
        raise ValueError("an interval needs at least one seed")
    mean = math.fsum(shares) / len(shares)
    z = float(special.ndtri((1 + level) / 2))
    low, high = wilson(min(max(mean, 0.0), 1.0) * n, n, z=z)
    if raw is not None:
        plain = math.fsum(raw) / len(raw)
        below, above = wilson(plain * n, n, z=z)
        low, high = min(low, mean - (plain - below)), max(high, mean + (above - plain))
    return max(low, 0.0), min(high, 1.0)


@functools.lru_cache(maxsize=65536)
def _two_level(shares: tuple[float, ...], n: int, level: float) -> tuple[float, float]:
    """Return the percentile interval of the mean under resampled seeds and items.

    The random numbers depend on the number of seeds alone and pass through each seed's binomial
    quantiles, so that a larger share never lowers a bound.
    """
    chosen, uniform = _resampling(len(shares))
    counts = np.empty_like(uniform)
    for seed, share in enumerate(shares):
        own = chosen == seed
        cumulative = stats.binom.cdf(np.arange(n), n, share)
        counts[own] = np.searchsorted(cumulative, uniform[own])
    tail = (1 - level) / 2
    low, high = np.quantile(counts.mean(axis=1) / n, [tail, 1 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=16)
def _resampling(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seeds)
    return generator.integers(seeds, size=(DRAWS, seeds)), generator.random((DRAWS, seeds))


def difference(a: float, n_a: int, b: float, n_b: int, *, level: float) -> tuple[float, float]:
    """Return the interval of ``a - b`` for shares of independent items.

    Newcombe (1998), hybrid score interval without continuity correction (his method 10).
    """
    z = float(special.ndtri((1 + level) / 2))
    low_a, high_a = wilson(a * n_a, n_a, z=z)
    low_b, high_b = wilson(b * n_b, n_b, z=z)
    return (
        a - b - math.hypot(a - low_a, high_b - b),
        a - b + math.hypot(high_a - a, b - low_b),
    )


def paired_difference(
    a: Sequence[int], b: Sequence[int], *, level: float
) -> tuple[float, float, float]:
    """Return the difference of two shares of the same items, and its interval.

    Agresti and Min (2005): Wald's interval after 1/2 is added to each cell of the 2x2 table, so
    that perfect agreement still has a width.

    Parameters
    ----------
    a, b
        1 where the item was answered right, 0 elsewhere, in the same order of items.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} items are no pairs")
    n = len(a)
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    centre = (only_a - only_b) / (n + 2)
    discordant = (only_a + only_b + 1) / (n + 2)
    spread = math.sqrt((discordant - centre * centre) / (n + 2))
    z = float(special.ndtri((1 + level) / 2))
    return (only_a - only_b) / n, centre - z * spread, centre + z * spread


def over_seeds(values: Sequence[float], *, level: float = LEVEL) -> tuple[float, float]:
    """Return Student's interval of a mean over seeds, tasks or bipartitions; at least two.

    Values that do not vary give an interval without width: hold it against an interval over items.
    """
    if len(values) < 2:
        raise ValueError("a spread needs at least two values")
    if max(values) - min(values) < 1e-12:
        return float(values[0]), float(values[0])
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return float(interval.low), float(interval.high)


def equivalence(low: float, high: float, margin: float) -> Answer:
    """Return the answer of two one-sided tests (TOST) at 5 % each.

    Parameters
    ----------
    low, high
        The 90 % interval of the difference: inside the margin both tests reject.
    """
    if -margin < low and high < margin:
        return "holds"
    return "fails" if low > margin or high < -margin else "inconclusive"


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Steps, or operations, that attacks need to break a model, most of them perhaps unbroken.

    Attributes
    ----------
    broken, attacks
        How many of the attacks broke the model by their end.
    median
        Kaplan and Meier's median; None where fewer than half broke it: it is not known.
    restricted_mean
        Mean within the horizon, the area under the survival curve.
    horizon
        Longest budget at which an attack was watched.
    """

    broken: int
    attacks: int
    median: float | None
    restricted_mean: float
    horizon: float


def survival(breaks: Sequence[float | None], ends: Sequence[float]) -> Survival:
    """Return the Kaplan-Meier estimate of right-censored budgets.

    Parameters
    ----------
    breaks
        Budget at which each attack broke the model; None where it did not by its end.
    ends
        Budget at which each attack ended.
    """
    events = [value for value in breaks if value is not None]
    censored = [end for value, end in zip(breaks, ends, strict=True) if value is None]
    curve = stats.ecdf(stats.CensoredData(uncensored=events, right=censored)).sf
    horizon = float(max(ends))
    times = [0.0, *(float(time) for time in curve.quantiles if time < horizon), horizon]
    alive = [1.0, *(float(share) for share in curve.evaluate(times[1:-1]))]
    halved = [
        float(time)
        for time, share in zip(curve.quantiles, curve.probabilities, strict=True)
        if share <= 0.5
    ]
    return Survival(
        broken=len(events),
        attacks=len(breaks),
        median=min(halved, default=None),
        restricted_mean=math.fsum(
            share * (after - before)
            for share, before, after in zip(alive, times[:-1], times[1:], strict=True)
        ),
        horizon=horizon,
    )


def interquartile_mean(values: Sequence[float]) -> float:
    """Return the mean without the lowest and the highest quarter."""
    return float(stats.trim_mean(values, 0.25))


def gini(values: Sequence[float]) -> float:
    """Return Gini's coefficient of non-negative values: 0 even, towards 1 all in one."""
    total = math.fsum(values)
    if not values or total == 0.0:
        return 0.0
    n = len(values)
    weighted = math.fsum(rank * value for rank, value in enumerate(sorted(values), start=1))
    return 2 * weighted / (n * total) - (n + 1) / n
