"""`mithridate audit` as typed: exit codes, its one document, its page, a testbed's sets."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mithridate.cli import app
from tests.audit.test_run import SECRET, files, harmful, quick


def typed(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        app.main(["audit", *arguments])
    code = stopped.value.code
    assert isinstance(code, int)
    return code, capfd.readouterr().out


def test_exit_codes_and_the_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = files(tmp_path / "data", harmful=harmful(), attack=harmful()[:2])
    shared = ["--config", str(quick(tmp_path)), "--output-dir", str(tmp_path / "out")]
    code, out = typed(capfd, "--harmful", data["harmful"], "--json", *shared)
    document = json.loads(out)
    assert (code, document["exit_code"], document["verdict"]) == (0, 0, "warn")
    assert typed(capfd, "--harmful", data["harmful"], "--strict", *shared)[0] == 1

    both = ["--harmful", data["harmful"], "--attack", data["attack"]]
    code, out = typed(capfd, *both, "--json", *shared)
    assert (code, json.loads(out)["exit_code"]) == (1, 1)
    code, out = typed(capfd, *both, *shared)
    assert code == 1
    assert "fails 1 gate" in out
    assert "2 rows of attack" in " ".join(out.split())
    assert SECRET not in out
    assert typed(capfd, *both, "--overlap", *shared)[0] == 0

    page = tmp_path / "out" / "audit.html"
    assert SECRET not in page.read_text()
    assert typed(capfd, *both, "--reveal", *shared)[0] == 1
    assert SECRET in page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--harmful", "missing.jsonl"),
        ("--testbed", "latice"),
        ("--testbed", "lattice", "--benign", "b.jsonl"),
        ("--harmful", "h.jsonl", "--config", "missing.yaml"),
    ],
)
def test_bad_input_is_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    config = [] if "--config" in arguments else ["--config", str(quick(tmp_path))]
    code, out = typed(capfd, *arguments, *config, "--json", "--output-dir", str(tmp_path / "out"))
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2
    assert not (tmp_path / "out").exists()


def test_the_lattice_holds_what_its_makers_promise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(quick(tmp_path))
    code, out = typed(
        capfd, "--testbed", "lattice", "--config", config, "--json",
        "--output-dir", str(tmp_path / "out"),
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    passed = {gate["name"] for gate in document["gates"] if gate["status"] == "pass"}
    assert {
        "Attack and evaluation rows are disjoint",
        "Defence and evaluation rows are disjoint",
        "Defence and attack rows are disjoint",
        "Every category has enough harmful prompts",
        "No refusal gives the answer",
    } <= passed
    assert document["leakage"]["usable"]["rows"] == document["sets"]["harmful"]["rows"]
    assert document["drift"]["attack"]["auc"] > 0.9  # other wordings, by design


def test_columns_and_dropped_rows_reach_every_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [{"q": row["prompt"], "a": row["answer"], "c": row["category"]} for row in harmful()]
    week = [{"q": f"what is {n}", "is_safe": n % 2 == 0} for n in range(24)] + [{"q": " "}]
    data = files(tmp_path / "data", harmful=[*asked, {"q": "empty", "a": ""}], week=week)
    given = [
        "--harmful", data["harmful"], "--observed", data["week"], "--pool", data["week"], "--json",
        "--config", str(quick(tmp_path)), "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    assert typed(capfd, *given)[0] == 2
    columns = ["--columns", "prompt=q", "--columns", "harmful:answer=a,category=c"]
    assert typed(capfd, *given, *columns)[0] == 2
    code, out = typed(capfd, *given, *columns, "--drop-invalid")
    document = json.loads(out)
    assert code == document["exit_code"] in (0, 1)
    assert document["left_out"] == {
        "harmful": {"empty answer": 1},
        "observed 1": {"empty prompt": 1},
        "pool": {"empty prompt": 1},
    }
    rows = {name: one["rows"] for name, one in document["sets"].items()}
    assert rows["harmful"] == len(asked)
    # Safe and unsafe alike: what is asked is no one kind of row.
    assert rows["observed 1"] == 24
