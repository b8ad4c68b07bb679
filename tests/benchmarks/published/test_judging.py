"""Every claim's rule, with numbers made by hand, in both directions."""

from __future__ import annotations

import math

import pytest

from mithridate.errors import InputError
from published.judging import Measurement, counted, from_record, judge, over_repeats
from published.statements import TAGS, read_claims

CLAIMS = {claim.id: claim for claim in read_claims()}

# For each rule of a claim: an interval that reproduces it, one that refutes it, one that does
# neither. None where no number could.
INTERVALS = {
    "A1": [((0, 0), (1, 1), None)],
    "A2": [((3, 3), (4, 4), None)],
    "A3": [((4, 4), (5, 5), None)],
    "A4": [((0.9, 1.2), (1.3, 1.6), (1.1, 1.4))],
    "A5": [((3.2, 3.8), (1.05, 1.15), (1.0, 9.0))],
    "A6": [((2.7, 2.9), (2.9, 3.0), (1.0, 5.0))],
    "A7": [((2.8, 3.2), (5.1, 6.0), (3.5, 4.5))],
    "A12": [((-0.1, 0.04), (0.01, 0.2), (-0.1, 0.2))],
    "A13": [((0.1, 0.5), (-0.5, -0.1), (-0.1, 0.1))],
    "A14": [(None, (0.0, 0.04), (0.3, 0.6))],
    "A15": [((0.0, 0.04), (0.05, 0.2), (0.0, 0.2)), ((-0.9, -0.2), (0.1, 0.9), (-0.2, 0.4))],
    "A16": [((0.1, 0.5), (-0.1, 0.04), (-0.1, 0.2))],
    "A17": [((0.0, 0.5), (1.0, 3.0), (0.5, 2.0))],
    "A18": [(None, (0.9, 0.9), (0.1, 0.1))],
    "A19": [((0.2, 2.0), (-1.0, 0.0), (-0.5, 0.5))],
    "A20": [((-0.1, 0.04), (0.1, 0.9), (-0.4, 0.4))],
    "A21": [((0.0, 0.049), (0.05, 0.2), (0.0, 0.07))],
    "A22": [((0.2, 1.0), (-0.1, 0.1), (-0.2, 0.5))],
    "F4": [((0.0, 0.1), (4.0, 9.0), (0.1, 0.5))],
    "F5": [((0.95, 1.0), (0.009, 0.011), (0.3, 0.4))],
    "F11": [((0.5, 1.5), (-1.2, -0.8), (-0.1, 0.1))],
}


def measured(claim, quantity, interval, *, n=5, subject="it", void=""):
    low, high = interval or (None, None)
    middle = 0.5 if interval is None else (low + high) / 2
    return Measurement(
        claim=claim, quantity=quantity, subject=subject, estimate=middle, low=low, high=high, n=n,
        void=void,
    )  # fmt: skip


def with_rules():
    return [(name, number) for name, rows in INTERVALS.items() for number in range(len(rows))]


def test_every_claim_with_a_rule_is_tested_here_and_no_value_has_one():
    assert {name for name, claim in CLAIMS.items() if claim.rules} == set(INTERVALS)
    assert all(len(CLAIMS[name].rules) == len(rows) for name, rows in INTERVALS.items())
    assert {name for name, claim in CLAIMS.items() if claim.kind == "V"} == {
        "A8", "A9", "A10", "A11", "A23",
    }  # fmt: skip
    assert {f"A{number}" for number in range(1, 24)} <= set(CLAIMS)


@pytest.mark.parametrize(("name", "number"), with_rules())
def test_each_rule_reproduces_refutes_and_stays_open(name, number):
    claim, rows = CLAIMS[name], INTERVALS[name]
    for column, verdict in enumerate(("reproduced", "refuted", "inconclusive")):
        interval = rows[number][column]
        if interval is None:
            continue
        # The claim's other rules are given what reproduces them.
        others = [
            measured(name, rule.of, rows[index][0])
            for index, rule in enumerate(claim.rules)
            if index != number
        ]
        own = measured(name, claim.rules[number].of, interval)
        found = judge(claim, [own, *others])
        assert found.verdict == verdict, (interval, found.reason)
        assert claim.rules[number].of in found.reason
        assert not found.preliminary


@pytest.mark.parametrize("name", INTERVALS)
def test_without_an_interval_nothing_follows(name):
    claim = CLAIMS[name]
    found = judge(claim, [measured(name, rule.of, None, n=1) for rule in claim.rules])
    assert (found.verdict, found.preliminary) == ("inconclusive", True)
    assert "without an interval" in found.reason


@pytest.mark.parametrize("name", ["A8", "A9", "A10", "A11", "A23"])
@pytest.mark.parametrize("interval", [(-9.0, -8.0), (8.0, 9.0)])
def test_a_value_is_never_refuted_nor_reproduced_by_a_small_model(name, interval):
    assert judge(CLAIMS[name], [measured(name, "x", interval)]).verdict == "not_comparable"


@pytest.mark.parametrize("name", CLAIMS)
def test_what_was_not_measured_is_not_run_and_says_what_is_missing(name):
    found = judge(CLAIMS[name], [], missing="needs `x`")
    assert (found.verdict, found.reason) == ("not_run", "needs `x`")


def test_one_subject_refutes_all_reproduce_and_void_ones_do_not_count():
    claim, of = CLAIMS["A21"], CLAIMS["A21"].rules[0].of

    def verdict(*intervals):
        rows = [measured("A21", of, each, subject=f"m{n}") for n, each in enumerate(intervals)]
        return judge(claim, rows).verdict

    assert verdict((0, 0.04), (0, 0.03)) == "reproduced"
    assert verdict((0, 0.04), (0.5, 0.9)) == "refuted"
    assert verdict((0, 0.04), (0, 0.5)) == "inconclusive"
    dead = measured("A21", of, (0, 0.04), subject="seam", void="dead on arrival")
    broken = measured("A21", of, (0.5, 0.9), subject="ctrap", n=3)
    alone = judge(claim, [dead])
    assert (alone.verdict, alone.reason) == ("inconclusive", "seam: dead on arrival")
    both = judge(claim, [dead, broken])
    assert both.verdict == "refuted"
    assert both.preliminary
    assert "not counted: seam: dead on arrival" in both.reason


def test_quantities_that_no_rule_names_decide_nothing():
    of = CLAIMS["A1"].rules[0].of
    beside = measured("A1", "clock ratio", (9.0, 9.5), n=1)
    assert judge(CLAIMS["A1"], [beside]).verdict == "not_run"
    found = judge(CLAIMS["A1"], [beside, measured("A1", of, (0, 0), n=None)])
    assert (found.verdict, found.preliminary) == ("reproduced", False)
    half = judge(CLAIMS["A15"], [measured("A15", CLAIMS["A15"].rules[0].of, (0.0, 0.04))])
    assert half.verdict == "inconclusive"
    assert "not measured: mean cosine" in half.reason


def test_figures_from_memory_or_of_unknown_origin_cannot_be_quoted():
    entry = "X: {{kind: V, statement: s, refuted_if: r, published: [{{figure: '1', tag: '{}'}}]}}"
    for tag in TAGS:
        assert read_claims(entry.format(tag))[0].published[0].tag == tag
    for tag in ("M", "?", "D", ""):
        with pytest.raises(InputError, match="no source that may be quoted"):
            read_claims(entry.format(tag))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("X: {kind: S, statement: s, refuted_if: r}", "lacks rules"),
        ("X: {kind: V, statement: s, refuted_if: r, rules: [{of: x, refuted: {above: 1}}]}",
         "has rules"),
        ("X: {kind: S, statement: s, refuted_if: r, rules: [{of: x, refuted: {over: 1}}]}",
         "is not one condition"),
        ("X: {kind: S, statement: s, refuted_if: r, rules: [{of: x, refuted: {inside: 1}}]}",
         "take \\[low, high\\]"),
        ("X: {kind: S, statement: s, refuted_if: r, rule: []}", "unknown key"),
        ("X: {kind: T, statement: s, refuted_if: r}", "kind"),
    ],
)  # fmt: skip
def test_a_faulty_claim_is_named(text, fault):
    with pytest.raises(InputError, match=fault):
        read_claims(text)


def test_a_record_keeps_the_measurement_open_ends_included():
    for low, high in ((None, None), (0.1, 0.4), (-math.inf, 0.2), (0.1, math.inf)):
        one = Measurement(claim="A1", quantity="q", subject="s", estimate=0.15, low=low, high=high,
                          n=3, void="v")  # fmt: skip
        assert from_record(one.record()) == one
    with pytest.raises(AssertionError, match="another claim"):
        judge(CLAIMS["A2"], [measured("A1", "q", (0, 1))])


def test_repeats_have_students_interval_and_one_has_none():
    from scipy import stats

    values = [1.0, 1.5, 2.5, 4.0]
    low, high = stats.t.interval(0.95, 3, loc=2.25, scale=stats.sem(values))
    assert over_repeats(values) == pytest.approx(
        {"estimate": 2.25, "low": low, "high": high, "n": 4}
    )
    assert over_repeats([2.0]) == {"estimate": 2.0, "low": None, "high": None, "n": 1}
    assert counted(3) == {"estimate": 3, "low": 3, "high": 3, "n": None}
