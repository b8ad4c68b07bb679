"""The whole table: files, probes, page and command."""

from __future__ import annotations

import json
import math
import sys

import pytest

import claims as command
from mithridate.errors import InputError, RunInterruptedError, RunStoppedError
from published import accounts
from published import run as module
from published.judging import VERDICTS, Measurement, judge
from published.page import TITLES, claims_page
from published.run import ClaimsPlan, Probe, run_claims
from published.statements import read_claims
from tests.benchmarks.published.test_benchmarks_source import results, run
from tests.benchmarks.published.tiny_bed import tiny_bed

CLAIMS = {claim.id: claim for claim in read_claims()}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Run the command's function on a tiny testbed with probes of our own."""
    called = []

    class Beds:
        @staticmethod
        def load(name):
            return lambda: tiny_bed(tmp_path, name)

    def probe(name, claim, quantity, interval, error=None):
        def measure(bed, on_event):
            called.append(name)
            if error is not None:
                raise error
            return [
                Measurement(
                    claim=claim,
                    quantity=quantity,
                    subject="it",
                    n=5,
                    estimate=sum(interval) / 2,
                    low=interval[0],
                    high=interval[1],
                )
            ]

        return Probe(name=name, claims=(claim,), module=accounts, measure=measure)

    def made(*probes, testbed="tiny"):
        called.clear()
        monkeypatch.setattr(module, "TESTBEDS", Beds)
        monkeypatch.setattr(module, "PROBES", tuple(probe(*each) for each in probes))
        document = run_claims(ClaimsPlan(testbed=testbed, results=tmp_path / "results"))
        return document, {one["claim"]: one for one in document["claims"]}, list(called)

    return made


CLOCK = ("clock", "A6", "clock ratio", (2.7, 2.9))


def test_every_claim_has_its_verdict_and_what_is_missing_names_a_command(table):
    document, claims, _ = table(CLOCK)
    assert list(claims) == list(CLAIMS)
    assert claims["A6"]["verdict"] == "reproduced"
    assert document["counts"] == {**dict.fromkeys(VERDICTS, 0), "reproduced": 1, "not_run": 25}
    for one in claims.values():
        assert one["verdict"] in VERDICTS
        if one["verdict"] == "not_run" and one["measured_by"]:
            assert one["measured_by"] in one["reason"]
            assert "tiny" in one["reason"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_probe_is_made_once_and_a_failing_one_takes_nothing_with_it(table, tmp_path):
    broken = ("passes", "A1", "extra passes", (0, 0), RunStoppedError("no encoder\nsecond line"))
    document, claims, called = table(broken, CLOCK)
    assert called == ["passes", "clock"]
    assert claims["A6"]["verdict"] == "reproduced"
    assert claims["A1"]["reason"] == document["failed"]["passes"] == "passes: no encoder"
    _, claims, called = table(broken, CLOCK)
    assert called == ["passes"], "what was measured is kept"
    assert claims["A6"]["verdict"] == "reproduced"
    path = tmp_path / "results" / "claims-tiny.json"
    kept = json.loads(path.read_text())
    kept["probes"]["clock"]["key"] = "of another model or code"
    path.write_text(json.dumps(kept))
    assert table(CLOCK)[2] == ["clock"]
    with pytest.raises(RunInterruptedError):
        table(CLOCK, ("slow", "A1", "extra passes", (0, 0), RunInterruptedError("stopped")))
    assert json.loads(path.read_text())["probes"]["clock"]["measured"]


def test_result_files_are_judged_and_their_origin_is_kept(table, tmp_path):
    rows = {"ctrap-released": run(harm=0.97), "sdd": run(utility=0.5)}
    results(tmp_path / "results", "spine", rows, seeds=3, testbed="tiny")
    document, claims, _ = table(CLOCK)
    assert claims["A21"]["verdict"] == "refuted"
    assert claims["A21"]["preliminary"]
    assert claims["A8"]["verdict"] == "not_comparable"
    assert claims["A11"]["verdict"] == "not_run"
    assert [source["file"] for source in document["sources"]] == [
        "spine-tiny.json", "claims-tiny.json",
    ]  # fmt: skip
    assert document["sources"][0]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize(
    "text", ['{"rows": {"undefended": 3}}', "[]", "{", '{"rows": {"undefended": {"runs": []}}}']
)
def test_a_file_that_is_no_result_is_named_before_anything_is_measured(table, tmp_path, text):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "spine-tiny.json").write_text(text)
    with pytest.raises(InputError, match="spine") as caught:
        table(CLOCK)
    assert caught.value.mend


def economics(index, *, dead=False, testbed="lattice"):
    return {
        "runs": [{"testbed": testbed, "method": "trap", "dead_on_arrival": dead}] * 5,
        "asymmetry": {"none": {"index_at_least": index}},
    }


@pytest.mark.parametrize(
    ("index", "dead", "verdict"),
    [
        ({"value": 0.9, "low": 0.4, "high": 1.2}, False, "reproduced"),
        ({"value": -0.2, "low": -0.5, "high": 0.0}, False, "refuted"),
        ({"value": 0.2, "low": None, "high": 0.5}, False, "inconclusive"),
        ({"value": None, "low": None, "high": None}, False, "inconclusive"),
        ({"value": 0.9, "low": 0.4, "high": 1.2}, True, "inconclusive"),
    ],
)
def test_the_asymmetry_index_decides_who_pays(tmp_path, index, dead, verdict):
    path = tmp_path / "economics-lattice.json"
    path.write_text(json.dumps(economics(index, dead=dead)))
    found = accounts.read(tmp_path, "lattice")
    assert judge(CLAIMS["A19"], found).verdict == verdict
    json.dumps(found[0].record(), allow_nan=False)
    path.write_text(json.dumps(economics(index, testbed="atlas")))
    with pytest.raises(InputError, match="no run on lattice"):
        accounts.read(tmp_path, "lattice")


def test_the_page_groups_by_verdict_and_nothing_breaks_out_of_its_cell(table, tmp_path):
    rows = {"ctrap-released": run(harm=0.97), "sdd": run(utility=0.5)}
    folder = results(tmp_path / "results", "spine", rows, seeds=3, testbed="tiny")
    path = folder / "spine-tiny.json"
    kept = json.loads(path.read_text())
    kept["rows"]["ctrap-released"]["label"] = "a | <script>alert(1)</script> *b*\n# c"
    kept["command"] = "x <b>"
    path.write_text(json.dumps(kept))
    broken = ("passes", "A1", "extra passes", (0, 0), RunStoppedError("no <encoder>"))
    document, claims, _ = table(broken, CLOCK)
    page = claims_page(document)
    assert "<script" not in page
    assert "a \\| &lt;script>" in page
    assert "<b>" not in page
    assert "no &lt;encoder>" in page
    sections = page.split("\n## ")
    for verdict, title in TITLES.items():
        own = [name for name, one in claims.items() if one["verdict"] == verdict]
        section = next((part for part in sections if part.startswith(title)), "")
        assert [line.split("**")[1] for line in section.splitlines() if line.startswith("| **")] \
            == own  # fmt: skip
    lines = [line for line in page.splitlines() if line.startswith("| **")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {6, 7}
    assert "Preliminary, on fewer than five seeds, runs or batches: A8, A9, A20, A21." in page
    assert page.count("*Preliminary.*") == 4
    assert "2.8 [2.7, 2.9] (5 seeds)" in page
    assert "no figure" in page
    assert "nan" not in page


def test_numbers_are_shown_with_what_is_known_of_them():
    from published.page import value

    def shown(n, ci, **more):
        one = {"estimate": 0.5, "ci95": ci, "n": n, "over": "batches", "unit": ""}
        return value(one | more)

    assert shown(None, [0.5, 0.5]) == "0.5"
    assert shown(5, [0.25, 0.75]) == "0.5 [0.25, 0.75] (5 batches)"
    assert shown(1, None) == "0.5 (1 batch)"
    assert shown(3, [None, 0.75], unit="bits", over="seeds") == "0.5 [-inf, 0.75] bits (3 seeds)"
    assert shown(None, [0.25, None], estimate=None) == "-inf [0.25, inf]"
    assert math.isinf(accounts._number(None, math.inf))


def test_the_command_writes_its_page_and_one_document(tmp_path, table, capfd, monkeypatch):
    document, _, _ = table(CLOCK)
    page = tmp_path / "claims.md"
    arguments = ["claims.py", "--testbed", "tiny", "--results", str(tmp_path / "results"),
                 "--page", str(page)]  # fmt: skip
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    command.main()
    assert json.loads(capfd.readouterr().out) == document
    assert page.read_text() == claims_page(document)
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    out = capfd.readouterr().out
    assert "1 reproduced" in out
    assert "25 not run" in out


def test_an_unknown_testbed_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["claims.py", "--testbed", "latice"])
    with pytest.raises(SystemExit, match="did you mean 'lattice'"):
        command.main()


@pytest.mark.slow
def test_a_fresh_run_on_lattice_measures_what_needs_no_file(tmp_path):
    document = run_claims(ClaimsPlan(testbed="lattice", results=tmp_path))
    claims = {one["claim"]: one for one in document["claims"]}
    assert document["failed"] == {}
    verdicts = {
        name: claims[name]["verdict"] for name in ("A1", "A2", "A3", "A5", "F4", "F5", "F11")
    }
    assert verdicts == {
        "A1": "reproduced", "A2": "reproduced", "A3": "refuted", "A5": "refuted", "F4": "refuted",
        "F5": "refuted", "F11": "refuted",
    }  # fmt: skip
    measured = {probe_claim for probe in module.PROBES for probe_claim in probe.claims}
    assert all((claims[name]["verdict"] == "not_run") != (name in measured) for name in claims)
