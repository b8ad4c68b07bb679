"""Coverage against plain computations, and the promises of the greedy choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.audit import coverage
from mithridate.audit.sets import audit_set, embed
from mithridate.embeddings import tfidf
from mithridate.examples import Example


def points(count, seed, dimensions=4):
    found = np.random.default_rng(seed).normal(size=(count, dimensions))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def gap(x, y):
    return float(np.linalg.norm(x - y))


def test_k_nearest_coverage_equals_the_definitions() -> None:
    asked, held, k = points(15, 0), points(12, 1), 3

    def ball(own, index):
        return sorted(gap(own[index], other) for n, other in enumerate(own) if n != index)[k - 1]

    recall = np.mean([any(gap(a, h) <= ball(held, j) for j, h in enumerate(held)) for a in asked])
    covered = np.mean([any(gap(a, h) <= ball(asked, i) for h in held) for i, a in enumerate(asked)])
    found = coverage.k_nearest_coverage(asked, held, k)
    assert found == {"recall": pytest.approx(recall), "coverage": pytest.approx(covered)}


def test_radius_is_the_quantile_of_leave_one_out_distances() -> None:
    held = points(30, 2)
    nearest = [min(gap(x, y) for j, y in enumerate(held) if i != j) for i, x in enumerate(held)]
    assert coverage.own_radius(held) == pytest.approx(np.quantile(nearest, 0.95))


@given(st.integers(0, 1000), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_k_center_never_rises_and_is_within_twice_the_best(seed: int, size: int) -> None:
    held, pool = points(2, seed), points(size, seed + 1)
    chosen, radii = coverage.k_center(held, pool, limit=size, until=0.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(radii))
    assert len(set(chosen)) == len(chosen)
    assert radii[-1] == 0

    def radius(added):
        centres = np.concatenate([held, pool[list(added)]])
        return max(min(gap(p, c) for c in centres) for p in pool)

    for count, value in enumerate(radii):
        assert value == pytest.approx(radius(chosen[:count]), abs=1e-7)
    best = min(radius(added) for added in itertools.combinations(range(size), 1))
    assert radii[1] <= 2 * best + 1e-7


def test_k_center_stops_at_the_radius() -> None:
    chosen, radii = coverage.k_center(points(3, 0), points(40, 1), limit=40, until=0.6)
    assert radii[-1] <= 0.6 < radii[-2]
    assert len(chosen) == len(radii) - 1 < 40


def rows(*prompts: str, category: str = "") -> list[Example]:
    return [Example(prompt=prompt, answer="x", category=category) for prompt in prompts]


def test_a_subset_is_covered_whole_and_a_stranger_is_named() -> None:
    held = rows(*(f"how is copper item {n} made by hand" for n in range(12)), category="making")
    inside = rows(*(row.prompt for row in held[:5]), category="making")
    outside = rows("where do glaciers calve in spring", category="ice")
    parts = [audit_set(name, part) for name, part in
             (("harmful", held), ("attack", inside), ("eval", inside + outside))]  # fmt: skip
    found = coverage.by_embedding(parts[0], parts[1:], embed(parts, tfidf), neighbours=3)
    assert found["sets"]["attack"]["coverage_at_r"] == 1
    entry = found["sets"]["eval"]
    assert entry["coverage_at_r"] == pytest.approx(5 / 6)
    assert [row["row"] for row in entry["uncovered"]] == [6]
    assert entry["categories"]["ice"]["coverage_at_r"] == 0
    added = coverage.what_to_add(
        parts[0], [parts[2]], embed(parts, tfidf), radius=found["radius"], limit=5
    )
    assert [row["row"] for row in added["add"]] == [6]
    assert added["enough"]


def test_a_missing_category_is_named() -> None:
    held = audit_set("harmful", rows("a b", "c d", category="one"))
    asked = audit_set("attack", [*rows("e f", category="one"), *rows("g", category="two")])
    found = coverage.by_category(held, [asked])["held_out"]["attack"]
    assert found == {"missing": ["two"], "in_name": 1, "in_fact": 1}


def test_a_row_of_two_categories_makes_neither_held_out() -> None:
    held = audit_set("harmful", rows("a b", category="one"))
    asked = audit_set("eval", [*rows("c", category="two,one"), *rows("d", category="three")])
    found = coverage.by_category(held, [asked])["held_out"]["eval"]
    assert (found["in_name"], found["in_fact"]) == (2, 1)


def test_categories_that_share_a_row_or_a_prompt_are_one_group() -> None:
    held = audit_set(
        "harmful",
        [
            *rows("a b", category="one,two"),
            *rows("c d", category="three"),
            *rows("c  D", category="four"),
            *rows("e", category="five"),
        ],
    )
    groups = coverage.by_category(held, [])["groups"]
    assert groups == [["five"], ["four", "three"], ["one", "two"]]


def test_counts_are_of_distinct_prompts() -> None:
    held = audit_set("harmful", rows("a b", "A  b", "c", category="one") + rows("d"))
    found = coverage.by_category(held, [])
    assert found["counts"] == {"one": {"prompts": 2, "share": 1.0}}
    assert found["without_category"] == 1
