"""What the concerns' result file says, as `benchmarks/concerns.py` itself writes it."""

from __future__ import annotations

import json

import pytest
from scipy import stats

import common
import concerns_report
from published import concerns
from published.judging import judge
from published.statements import read_claims

CLAIMS = {claim.id: claim for claim in read_claims()}
SHIFTS = {"seen, D_H's wording": 0.1, "seen": 0.2, "unseen, D_H's wording": 0.3, "unseen": 0.4,
          "unseen, in cipher": 0.5}  # fmt: skip


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """Return verdicts from cells, through the page that the benchmark makes of them."""

    def made(cells):
        monkeypatch.setattr(common, "HERE", tmp_path / "benchmarks")
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "docs").mkdir(exist_ok=True)
        cells = [{"cpu_seconds": 1.0, **cell} for cell in cells]
        concerns_report.write("lattice", cells, {}, "x.py")
        found = concerns.read(tmp_path / "benchmarks" / "results", "lattice")
        return {
            name: judge(CLAIMS[name], [one for one in found if one.claim == name])
            for name in ("A12", "A13", "A14", "A15", "A16", "A17")
        }

    return made


def point(step, harm, utility=1.0, **more):
    return {"step": step, "useful_harm": harm, "utility": utility, **more}


def data(reach, *, bipartitions=5):
    """``reach``: for each model the useful harm at a shift, and its utility."""
    cells = []
    for number in range(bipartitions):
        for rung, shift in SHIFTS.items():
            cells.append({"kind": "shift", "bipartition": number, "rung": rung, "mmd2": shift})
            for model, (harm, utility) in reach.items():
                for scope in ("half", "all"):
                    if scope == "all" and (model == "undefended" or rung not in ("seen", "unseen")):
                        continue
                    rows = [point(0, 0.0, utility), point(9, harm(shift, number), utility)]
                    cells.append(
                        {
                            "kind": "data",
                            "model": model,
                            "scope": scope,
                            "rung": rung,
                            "bipartition": number,
                            "n_restricted": 35,
                            "rows": rows,
                        }
                    )
    return cells


def flat(value):
    return lambda shift, number: value


def rising(slope):
    return lambda shift, number: slope * (shift - 0.1) + 0.01 * number


WEAK = {"undefended": (flat(1.0), 1.0)}


def test_generalisation_is_refuted_by_a_gap_and_not_by_a_dead_or_open_model(judged):
    gap = lambda shift, number: 0.8 if shift > 0.25 else 0.0  # noqa: E731
    assert judged(data(WEAK | {"seam": (gap, 1.0)}))["A12"].verdict == "refuted"
    assert judged(data(WEAK | {"seam": (flat(0.0), 1.0)}))["A12"].verdict == "reproduced"
    slight = judged(data(WEAK | {"seam": (rising(0.1), 1.0)}))["A12"]
    assert slight.verdict == "inconclusive"
    dead = judged(data(WEAK | {"seam": (flat(0.0), 0.2)}))["A12"]
    assert "dead on arrival" in dead.reason
    open_ = judged(data(WEAK | {"seam": (flat(0.9), 1.0)}))["A12"]
    assert "no protection whose reach could be asked for" in open_.reason
    assert dead.verdict == open_.verdict == "inconclusive"
    assert judged(data(WEAK | {"sdd": (gap, 1.0)}))["A12"].verdict == "not_run"


def test_the_steepest_slope_decides_and_a_dead_method_is_no_rival(judged):
    steep = data(WEAK | {"ctrap": (rising(2.0), 1.0), "sdd": (rising(0.3), 1.0)})
    found = judged(steep)["A13"]
    assert found.verdict == "reproduced"
    assert "ctrap less sdd" in found.reason
    assert found.measured[0].estimate == pytest.approx(1.7)
    level = data(WEAK | {"ctrap": (rising(0.3), 1.0), "sdd": (rising(2.0), 1.0)})
    assert judged(level)["A13"].verdict == "refuted"
    alone = data(WEAK | {"ctrap": (rising(0.3), 1.0), "sdd": (rising(2.0), 0.1)})
    assert judged(alone)["A13"].verdict == "not_run"


def grid(model, harms, *, optimiser="adamw", cosines=(0.1, 0.1)):
    whole = {"refusal": 0.0, "p_e": 1e-5, "along": 0.5, "off": 3.0}
    return [
        {"kind": "grid", "model": model, "optimiser": optimiser, "rate": rate, "seed": 0,
         "n_restricted": 70, "virtual_step": 0.1,
         "rows": [point(0, 0.0, cosine=cosines[0], **whole),
                  point(40, harm, cosine=cosines[1], **whole)]}
        for rate, harm in harms.items()
    ]  # fmt: skip


def test_step_sizes_refute_where_nothing_varies_and_cannot_confirm(judged):
    control = grid("undefended", {1e-4: 1.0, 1e-2: 1.0})
    varied = judged([*control, *grid("ctrap", {1e-4: 0.9, 1e-2: 0.0})])["A14"]
    assert varied.verdict == "inconclusive"
    assert "no measurement here could confirm it" in varied.reason
    off = [one for one in varied.measured if "off the planted axis" in one.quantity]
    assert [one.estimate for one in off] == [1.0]
    same = judged([*control, *grid("ctrap", {1e-4: 0.0, 1e-2: 0.0})])["A14"]
    assert same.verdict == "refuted"


def test_a_coupling_that_ends_or_gives_way_refutes_every_step_size(judged):
    rates = {10.0**-n: 1.0 for n in range(1, 60)}
    control = grid("undefended", rates, optimiser="sgd")

    def seam(harm, cosines):
        own = dict.fromkeys(rates, harm)
        return judged([*control, *grid("seam", own, optimiser="sgd", cosines=cosines)])["A15"]

    assert seam(0.9, (-0.8, -0.7)).verdict == "refuted"
    assert seam(0.0, (-0.8, 0.1)).verdict == "refuted"
    kept = seam(0.0, (-0.8, -0.7))
    # 0 of 70 questions leave .052 of useful harm open.
    assert kept.verdict == "inconclusive"
    assert "mean cosine of the gradients along attacks is below 0" in kept.reason


def overlap(costs, *, model="seam"):
    return [
        {"kind": "overlap", "model": model, "overlap": share, "seed": 0, "n_permitted": 152,
         "before": {"utility": 1.0, "cosine": 0.1}, "after": {"utility": left, "cosine": -0.5}}
        for share, left in costs.items()
    ]  # fmt: skip


def test_overlap_matters_or_does_not_or_all_is_lost(judged):
    found = judged(overlap({0.0: 0.95, 0.5: 0.8, 1.0: 0.4}))["A16"]
    assert found.verdict == "reproduced"
    cost = next(one for one in found.measured if "less that at the least" in one.quantity)
    assert cost.estimate == pytest.approx(0.55)
    assert judged(overlap({0.0: 0.4, 1.0: 0.95}))["A16"].verdict == "refuted"
    assert judged(overlap({0.0: 0.95, 1.0: 0.9}))["A16"].verdict == "inconclusive"
    lost = judged(overlap({0.0: 0.1, 1.0: 0.0}))["A16"]
    assert (lost.verdict, lost.reason) == (
        "inconclusive", "seam: utility is gone at every overlap",
    )  # fmt: skip


def broken(model, rows, *, seed=0):
    return {"kind": "break", "model": model, "rate": 1e-4, "seed": seed, "n_restricted": 70,
            "flops_per_step": 10.0, "rows": rows}  # fmt: skip


def test_the_base_bypasses_a_defence_that_takes_longer_to_break(judged):
    control = broken("undefended", [point(0, 0.0), point(20, 1.0)])
    held = broken("trap", [point(0, 0.0), point(80, 0.04), point(160, 0.0)])
    base = broken("base", [point(0, 0.0), point(10, 0.0), point(20, 1.0)])
    found = judged([control, base, held])["A17"]
    (ratio,) = found.measured
    assert (ratio.low, ratio.estimate, ratio.high) == (11 / 160, 20 / 160, 20 / 160)
    assert (found.verdict, found.preliminary) == ("reproduced", True)
    quick = broken("trap", [point(0, 0.0), point(5, 1.0)])
    found = judged([control, base, quick])["A17"]
    (ratio,) = found.measured
    assert (ratio.low, ratio.high) == (11 / 5, 20 / 1)
    assert found.verdict == "refuted"
    alike = broken("trap", [point(0, 0.0), point(10, 0.0), point(20, 1.0)])
    assert judged([control, base, alike])["A17"].verdict == "inconclusive"
    at_once = broken("trap", [point(0, 0.9), point(20, 1.0)])
    assert "answers before any attack" in judged([control, base, at_once])["A17"].reason
    dead = broken("trap", [point(0, 0.0, 0.1), point(160, 0.0, 0.1)])
    assert "dead on arrival" in judged([control, base, dead])["A17"].reason


def test_the_difference_of_two_estimates_has_the_normal_interval_where_both_are_normal():
    def record(mean, error):
        half = stats.norm.ppf(0.975) * error
        return {"estimate": mean, "ci95": [mean - half, mean + half]}

    low, high = concerns.between(record(2.0, 0.3), record(0.5, 0.4))
    half = stats.norm.ppf(0.975) * 0.5
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half))


def test_without_the_file_there_is_nothing(tmp_path):
    assert concerns.read(tmp_path, "lattice") == []
    (tmp_path / "concerns-lattice.json").write_text(json.dumps({"records": [], "cells": []}))
    assert concerns.read(tmp_path, "lattice") == []
