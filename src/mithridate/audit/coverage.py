"""How much of what attackers ask the harmful set covers: by category and by embedding.

Distances are Euclidean between unit vectors. The unit of every threshold is the set's own
nearest-neighbour distance, so that it carries from one encoder to another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mithridate.audit.sets import AuditSet, Vectors, listed
from mithridate.categories import categories_of, category_groups

_CHUNK = 512
_NAMED = 20


def distances(points: Vectors, to: Vectors) -> Vectors:
    """Return the distances between unit vectors, shape (points, to)."""
    return np.sqrt(np.maximum(2 - 2 * points @ to.T, 0.0))


def nearest(points: Vectors, to: Vectors) -> Vectors:
    """Return each point's distance to the nearest of ``to``, shape (points,)."""
    return np.concatenate(
        [
            distances(points[start : start + _CHUNK], to).min(axis=1)
            for start in range(0, len(points), _CHUNK)
        ]
    )


def neighbour_distances(points: Vectors, k: int) -> Vectors:
    """Return each point's distance to its k-th nearest other point, shape (points,)."""
    found = []
    for start in range(0, len(points), _CHUNK):
        block = distances(points[start : start + _CHUNK], points)
        block[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        found.append(np.partition(block, k - 1, axis=1)[:, k - 1])
    return np.concatenate(found)


def own_radius(points: Vectors) -> float:
    """Return r: the 95th percentile of the leave-one-out nearest-neighbour distances."""
    return float(np.quantile(neighbour_distances(points, 1), 0.95))


def k_nearest_coverage(asked: Vectors, held: Vectors, k: int) -> dict[str, float]:
    """Return improved recall and coverage of ``asked`` by ``held``.

    Recall (Kynkäänniemi et al. 2019): share of ``asked`` inside some held point's ball, whose
    radius is the distance to its k-th neighbour among the held. Coverage (Naeem et al. 2020):
    share of ``asked`` whose own ball, among the asked, holds a held point.
    """
    held_balls, asked_balls = neighbour_distances(held, k), neighbour_distances(asked, k)
    inside, covers = [], []
    for start in range(0, len(asked), _CHUNK):
        block = distances(asked[start : start + _CHUNK], held)
        inside.append((block <= held_balls[None, :]).any(axis=1))
        covers.append(block.min(axis=1) <= asked_balls[start : start + _CHUNK])
    return {
        "recall": float(np.concatenate(inside).mean()),
        "coverage": float(np.concatenate(covers).mean()),
    }


def k_center(
    centres: Vectors, pool: Vectors, *, limit: int, until: float
) -> tuple[list[int], list[float]]:
    """Return what to add next: greedily the pool's point farthest from all centres.

    The greedy choice is within a factor 2 of the smallest radius (Gonzalez 1985).

    Parameters
    ----------
    limit, until
        Ends after this many additions, or when the radius falls to ``until``.

    Returns
    -------
    chosen, radii
        Rows of the pool in their order, and the pool's covering radius before the first and
        after each addition: ``len(chosen) + 1`` values that never rise.
    """
    gaps = nearest(pool, centres)
    chosen: list[int] = []
    radii = [float(gaps.max())]
    while len(chosen) < limit and radii[-1] > until:
        farthest = int(gaps.argmax())
        chosen.append(farthest)
        gaps = np.minimum(gaps, distances(pool, pool[farthest : farthest + 1])[:, 0])
        # A point is no distance from itself, whatever rounding says.
        gaps[farthest] = 0.0
        radii.append(float(gaps.max()))
    return chosen, radii


def by_category(harmful: AuditSet, asked: Sequence[AuditSet]) -> dict[str, Any]:
    """Return counts of prompts per category of the harmful set, and what it lacks.

    ``held_out`` tells, for each asked set, how many of its categories the harmful set lacks in
    name, and how many it lacks in fact: neither held nor joined to one by a prompt or a fact.
    """
    rows = [categories_of(harmful.examples[index]) for index in harmful.distinct()]
    counts = Counter(name for labels in rows for name in labels)
    total = sum(counts.values())
    shares = {name: count / total for name, count in counts.items()}
    spread = -sum(share * math.log(share) for share in shares.values())
    held_out = {}
    for part in asked:
        named = {name for example in part.examples for name in categories_of(example)}
        missing = named - set(counts)
        joined = {
            name
            for group in category_groups([*harmful.examples, *part.examples])
            if set(group) & set(counts)
            for name in group
        }
        held_out[part.name] = {
            "missing": listed(missing),
            "in_name": len(missing),
            "in_fact": len(missing - joined),
        }
    return {
        "counts": {
            name: {"prompts": counts[raw], "share": shares[raw]}
            for name, raw in zip(listed(counts), sorted(counts), strict=True)
        },
        "without_category": sum(not labels for labels in rows),
        "several_categories": sum(len(labels) > 1 for labels in rows),
        "entropy": spread / math.log(len(counts)) if len(counts) > 1 else None,
        "smallest_share": min(shares.values(), default=None),
        "groups": [listed(group) for group in category_groups(harmful.examples)],
        "held_out": held_out,
    }


def by_embedding(
    harmful: AuditSet,
    asked: Sequence[AuditSet],
    vectors: dict[str, Vectors],
    *,
    neighbours: int,
) -> dict[str, Any]:
    """Return r and, for each asked set, how far its prompts lie from the harmful set.

    ``coverage_at_r`` is the share of distinct prompts within r of a harmful one; ``uncovered``
    names the farthest outside.
    """
    held = vectors[harmful.name][harmful.distinct()]
    radius = own_radius(held)
    found: dict[str, Any] = {"radius": radius, "sets": {}}
    for part in asked:
        rows = part.distinct()
        points = vectors[part.name][rows]
        gaps = nearest(points, held)
        outside = [index for index in np.argsort(-gaps, kind="stable") if gaps[index] > radius]
        categories: dict[str, list[float]] = {}
        for row, gap in zip(rows, gaps, strict=True):
            for name in categories_of(part.examples[row]):
                categories.setdefault(name, []).append(float(gap))
        entry: dict[str, Any] = {
            "prompts": len(rows),
            "median": float(np.median(gaps)),
            "q95": float(np.quantile(gaps, 0.95)),
            "farthest": float(gaps.max()),
            "coverage_at_r": float((gaps <= radius).mean()),
            "categories": {
                name: {
                    "prompts": len(categories[raw]),
                    "median": float(np.median(categories[raw])),
                    "coverage_at_r": float(np.mean(np.asarray(categories[raw]) <= radius)),
                }
                for name, raw in zip(listed(categories), sorted(categories), strict=True)
            },
            "uncovered": [
                {**part.reference(rows[index]), "distance": float(gaps[index])}
                for index in outside[:_NAMED]
            ],
            "uncovered_count": len(outside),
        }
        if min(len(rows), len(held)) > neighbours:
            entry["k_nearest"] = k_nearest_coverage(points, held, neighbours)
        found["sets"][part.name] = entry
    return found


def what_to_add(
    harmful: AuditSet,
    pool: Sequence[AuditSet],
    vectors: dict[str, Vectors],
    *,
    radius: float,
    limit: int,
) -> dict[str, Any]:
    """Return the pool's prompts to cover next, with the covering radius after each."""
    rows = [(part, index) for part in pool for index in part.distinct()]
    chosen, radii = k_center(
        vectors[harmful.name][harmful.distinct()],
        np.stack([vectors[part.name][index] for part, index in rows]),
        limit=limit,
        until=radius,
    )
    return {
        "pool": [part.name for part in pool],
        "radii": radii,
        "enough": radii[-1] <= radius,
        "add": [
            {**rows[index][0].reference(rows[index][1]), "radius_after": after}
            for index, after in zip(chosen, radii[1:], strict=True)
        ],
    }
