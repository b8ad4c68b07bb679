"""The verdict on a page: of a battery, and as a section of a demo's; computed and escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mithridate.cli.app import main
from mithridate.errors import GateError, InputError
from mithridate.files import write_json
from mithridate.reports import render_report
from mithridate.reports.limits import validity_limits
from mithridate.reports.verdict_page import MEANINGS, verdict_of
from mithridate.verdicts import Term, judge_run
from tests.reports.make_run import CANARY, make_run
from tests.reports.test_report import CHROMIUM, Elements, browse
from tests.verdicts.make_battery import CONTROL, TRUTHS, rows, write


def text_of(folder: Path) -> str:
    """The page's text, elements set apart by spaces."""
    return Elements(render_report(folder).read_text(encoding="utf-8").replace("<", " <")).text


def squeezed(text: str) -> str:
    return " ".join(text.split())


def hostile(folder: Path) -> Path:
    """A battery whose every name tries to be markup, a script or a terminal's command."""
    found = TRUTHS["broken"]()
    found += rows(CANARY, "undefended", CONTROL, configuration="\x1b[2J{{ 7 * 7 }}")
    found += rows(CANARY, "defended", (0.0, 0.85), configuration="\x1b[2J{{ 7 * 7 }}")
    write(folder, found, listed=("P3", "X4"), control="P3")
    listed = folder / "battery.yaml"
    listed.write_text(
        listed.read_text()
        + f"  - {{id: {json.dumps(CANARY)}, name: '<b>bold</b>', family: sft, tier: smoke}}\n"
        "  - {id: X9, name: never done, family: sft, tier: smoke, state: not in this tier}\n"
    )
    write_json(
        folder / "summary.json",
        {
            "testbed": "",
            "method": "<i>method</i>",
            "tier": CANARY,
            "failed": [
                {"attack": "P3", "target": "defended", "configuration": "", "seed": 1,
                 "learning_rate": 0.1, "error": CANARY}
            ],
        },
    )  # fmt: skip
    (folder / "config.yaml").write_text(f"note: {json.dumps(CANARY)}\n")
    return folder


@pytest.mark.parametrize("truth", [name for name in TRUTHS if name != "not run"])
def test_the_first_line_is_the_worst_valid_cell(truth: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", TRUTHS[truth](), listed=("P3",))
    document = judge_run(folder)
    page = Elements(render_report(folder).read_text())
    heading = squeezed(page.text).partition("Attack by attack")[0]
    line = document["first_line"]
    assert line[0].upper() + line[1:] in heading
    assert MEANINGS[truth] in heading
    assert [dict(found).get("class") for tag, found in page.tags if tag == "body"] == [
        {
            "held": "holds",
            "collapsed": "holds",
            "broken": "fails",
            "broken at cost": "fails",
            "dead on arrival": "fails",
            "not valid": "void",
        }.get(truth, "partly")
    ]


def test_every_term_has_its_words() -> None:
    assert set(MEANINGS) == set(Term)


def test_cells_conditions_gates_and_card_stand_on_the_page(tmp_path: Path) -> None:
    found = TRUTHS["held"]()
    found += rows("P12", "undefended", CONTROL) + rows("P12", "defended", (0.6, 0.85))
    found += rows("P26", "undefended", (0.1, 0.85)) + rows("P26", "defended", (0.0, 0.85))
    folder = write(tmp_path / "run", found, listed=("P3", "P12", "P26", "X4"), control="P3")
    document = judge_run(folder)
    text = squeezed(text_of(folder))
    table = text.split("Attack by attack")[1].split("The four conditions")[0]
    # The worst first, then the others; what is no valid test comes last.
    assert table.index("P12 broken") < table.index("P3 held") < table.index("P26 not valid")
    bounds = {cell["attack"]: cell["useful_harm"] for cell in document["cells"]}
    for best in bounds.values():
        assert f"{best['low']:.3f} to {best['high']:.3f}" in table
    conditions = text.split("The four conditions")[1].split("Acceptance card")[0]
    for condition in document["conditions"]:
        assert condition["name"].capitalize() in conditions
        for one in condition["findings"]:
            assert one["measure"] in conditions
            assert f"{one['low']:.3f} to {one['high']:.3f}" in conditions
    card = text.split("Acceptance card")[1]
    for criterion in document["card"]["criteria"]:
        assert f"{criterion['name']} {criterion['state']}" in card
    missing = document["card"]["attacks_not_run"]
    assert f"Attacks not run ({len(missing)})" in card
    for entry in missing:
        assert entry["id"] in card
    for gate in document["gates"]:
        assert f"{gate['id']} {gate['state']} {gate['what']}" in card
    for name, digest in document["sources"].items():
        assert f"{name} {digest}" in card


def test_what_a_run_folder_says_is_shown_but_never_obeyed(tmp_path: Path) -> None:
    page = render_report(hostile(tmp_path / "run")).read_text(encoding="utf-8")
    elements = Elements(page)
    assert CANARY not in page
    assert CANARY in elements.text
    assert "<b>bold</b>" in elements.text
    assert "{{ 7 * 7 }}" in elements.text
    assert "not in this tier" in elements.text
    assert "Runs of attacks that failed: 1." in elements.text
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert not {"b", "i", "img"} & {tag for tag, _ in elements.tags}
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e]", page)
    for tag, attributes in elements.tags:
        assert not {"src", "style", "action"} & set(attributes), tag
        if "href" in attributes:
            assert attributes["href"] == "data:,"


def test_a_battery_under_way_has_no_page(tmp_path: Path) -> None:
    summary = {"testbed": "lattice", "method": "seam", "tier": "smoke"}
    folder = write(tmp_path / "run", TRUTHS["broken"](), listed=("P3",), summary=summary)
    text = text_of(folder)
    (folder / "report.html").unlink()
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match="the battery is not finished"):
        render_report(folder)
    assert not (folder / "report.html").exists()
    for limit in validity_limits("lattice"):
        assert squeezed(limit) in squeezed(text)


def test_an_attack_that_failed_altogether_stands_on_the_page(tmp_path: Path) -> None:
    lost = {"attack": "P5", "target": "defended", "configuration": "", "learning_rate": 0.1,
            "seed": 0, "error": "out of memory"}  # fmt: skip
    folder = write(tmp_path / "run", TRUTHS["held"](), listed=("P3",), summary={"failed": [lost]})
    text = squeezed(text_of(folder))
    table = text.split("Attack by attack")[1].split("The four conditions")[0]
    told = "P5 inconclusive nothing was measured: 1 setting failed on the defended model, in 1 run"
    assert told in table
    assert table.index("P5 inconclusive") < table.index("P3 held")
    assert "out of memory" in text


def test_a_gate_that_stops_leaves_no_page_of_a_battery(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", TRUTHS["not valid"](), control="P3")
    with pytest.raises(GateError, match="G1"):
        render_report(folder)
    assert not (folder / "report.html").exists()


def test_a_demo_has_the_verdict_as_a_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", holds=False)
    first = judge_run(folder)["first_line"]
    text = squeezed(text_of(folder))
    section = text.split("Verdict B")[1].split("During the attack")[0]
    assert first[1:] in section
    for word in ("Resistance", "Trainability", "Acceptance card", "G8", "Attacks not run"):
        assert word in section


def test_a_demo_without_a_valid_control_says_so(tmp_path: Path) -> None:
    text = squeezed(text_of(make_run(tmp_path / "run", control=0.3)))
    assert "No verdict. G1: the control attack finetune wins only" in text


def test_a_stored_verdict_counts_only_where_the_rows_say_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", TRUTHS["broken"](), listed=("P3",))
    document: dict[str, Any] = judge_run(folder)
    elsewhere = {"name": "transfer", "state": "passed", "why": ["known from another run"]}
    document["card"]["criteria"][3] = elsewhere
    write_json(folder / "verdict.json", document)
    assert "known from another run" in text_of(folder)
    write_json(folder / "verdict.json", {**document, "verdict": "held", "first_line": "held"})
    assert verdict_of(folder)["verdict"] == "broken"
    assert "known from another run" not in text_of(folder)


def test_the_command_writes_the_page_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", TRUTHS["collapsed"](), listed=("P3",))
    with pytest.raises(SystemExit) as stopped:
        main(["verdict", str(folder)])
    assert not stopped.value.code
    assert "report.html" in capsys.readouterr().out
    assert "Collapsed; P3" in squeezed(Elements((folder / "report.html").read_text()).text)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "attacks.jsonl").write_text("")
    write_json(tmp_path / "summary.json", {})
    with pytest.raises(InputError, match="no row"):
        render_report(tmp_path)


def test_utility_by_task_stands_beside_either_page(tmp_path: Path) -> None:
    def row(task: str, *, counts: bool) -> dict[str, Any]:
        change = {"estimate": -0.05, "low": -0.125, "high": 0.025, "answer": "inconclusive"}
        return {
            "task": task, "metric": "acc", "n": 60, "chance": 0.5, "counts": counts,
            "reference": {"accuracy": 0.7}, "model": {"accuracy": 0.65}, "difference": change,
        }  # fmt: skip

    document = {
        "model": {"weights": "d"},
        "reference": {"weights": "u"},
        "tasks": [row("<b>piqa</b>", counts=True), row("sst2", counts=False)],
    }
    for folder in (
        make_run(tmp_path / "demo"),
        write(tmp_path / "battery", TRUTHS["held"](), listed=("P3",)),
    ):
        assert "Utility by task" not in text_of(folder)
        write_json(folder / "utility.json", document)
        write_json(folder / "manifest.json", {"models": {"undefended": "u", "defended": "d"}})
        text = squeezed(text_of(folder))
        assert "<b>piqa</b> acc 60 0.50 0.700 0.650 -0.050 -0.125 to 0.025 inconclusive" in text
        assert "not counted: too near chance" in text
        conditions = text.split("The four conditions")[1]
        assert "task <b>piqa</b> TOST within 0.02, 60 items, paired -0.050" in conditions
        assert "task sst2" not in conditions
        write_json(folder / "manifest.json", {"models": {"undefended": "u", "defended": "other"}})
        with pytest.raises(InputError, match="not measured on this run's defended model"):
            render_report(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_browser_shows_a_battery_without_complaint(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "run")
    render_report(folder)
    dom, complaints = browse(folder / "report.html", tmp_path / "profile", scheme="0")
    assert not complaints
    assert ">Theme: auto</button>" in dom
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1].startswith("Broken")
