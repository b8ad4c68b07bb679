"""What single commands show, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mithridate.cli.demo import show_summary
from mithridate.cli.progress import listening
from mithridate.events import Event
from tests.reports.make_run import make_run


@pytest.mark.parametrize("holds", [True, False])
def test_demo_table_has_both_rows_and_every_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    folder = make_run(tmp_path / "run", holds=holds)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    show_summary(summary, folder)
    text = capsys.readouterr().out
    assert ("The trap holds" if holds else "The trap does not hold") in text
    lines = [line for line in text.splitlines() if "→" in line]
    rows = [line for line in lines if line.split()[0] in ("undefended", "defended")]
    assert len(rows) == 2
    for rate in ("2e-5", "1e-4", "5e-4"):
        assert f"at {rate}" in text
    assert "5.3" in rows[1]


def test_progress_elsewhere_than_on_a_terminal_is_a_line_a_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with listening() as listener:
        for step in range(101):
            metrics = {"useful_harm": 0.5} if step else {}
            listener(Event(stage="attack \x1b[2J", step=step, total=100, metrics=metrics))
        listener(Event(stage="report"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert "100/100" in lines[1]
    assert "useful_harm 0.5" in lines[1]


def test_time_left_is_that_of_what_is_done_now_not_of_what_was_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1000.0, 1060.0])
    stopped = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("mithridate.cli.progress.time", stopped)
    with listening() as listener:
        listener(Event(stage="attacking", step=40, total=100))
        listener(Event(stage="attacking", step=50, total=100))
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert "about 300 s left" in second, "ten in a minute, fifty to go"


def test_progress_on_a_terminal_draws_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with listening() as listener:
        listener(Event(stage="aligning"))
        listener(Event(stage="planting", step=1, total=2, metrics={"collapse": 3.0}))
        listener(Event(stage="planting", step=2, total=2))
    err = capsys.readouterr().err
    assert "planting" in err
    assert "2/2" in err
