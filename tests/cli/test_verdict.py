"""`mithridate verdict`: the table, the document and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mithridate.cli.app import main
from tests.verdicts.make_battery import TRUTHS, rows, write


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_the_table_names_attacks_bounds_and_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    hostile = rows("\x1b[2Jown\u202eed", "undefended", (0.9, 0.85))
    folder = write(tmp_path / "run", [*TRUTHS["broken"](), *hostile], listed=("P3", "X4"))
    assert call("verdict", str(folder)) == 0
    text = capsys.readouterr().out
    assert "\x1b[2J" not in text
    assert "Attacks not run" in text
    first, *_ = [line for line in text.splitlines() if line]
    assert first.startswith("broken; P3: useful harm 0.600 [0.5")
    line = next(line for line in text.splitlines() if line.startswith("P3"))
    assert "0.60 [0.5" in line
    for word in ("resistance", "trainability", "reliability", "transfer"):
        assert word in text
    stored = json.loads((folder / "verdict.json").read_text())
    assert stored["verdict"] == "broken"


def test_failed_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"attack": "P5", "target": "defended", "configuration": "lora", "learning_rate": 0.1,
            "seed": 3, "error": "\x1b[2Jbroken"}  # fmt: skip
    folder = write(tmp_path / "run", TRUTHS["held"](), summary={"failed": [lost]})
    assert call("verdict", str(folder)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "failed: P5 lora on the defended model, seed 3:" in text
    assert "\x1b[2J" not in text
    assert text.startswith("inconclusive")


def test_the_document_is_the_stored_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", TRUTHS["collapsed"]())
    assert call("verdict", str(folder), "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document == json.loads((folder / "verdict.json").read_text())
    assert document["verdict"] == "collapsed"


def test_gates_end_with_their_own_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run", TRUTHS["not valid"](), control="P3")
    assert call("verdict", str(folder), "--json") == 3
    assert "G1" in json.loads(capfd.readouterr().out)["error"]["what"]
    assert not (folder / "verdict.json").exists()
    assert call("verdict", str(tmp_path / "nowhere")) == 2
