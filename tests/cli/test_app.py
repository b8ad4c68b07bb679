"""Promises every command keeps: quick help, one document on stdout, errors on one screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mithridate.cli import app
from mithridate.errors import GateError, RunInterruptedError
from tests.reports.make_run import make_run

COMMANDS = (
    "demo",
    "immunise",
    "attack",
    "redteam",
    "audit",
    "report",
    "verdict",
    "utility",
    "economics",
    "methods",
    "cost",
    "doctor",
)


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "mithridate", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == code, result.stderr
    return result


def test_help_takes_less_than_half_a_second() -> None:
    # Processor time: a busy machine is not the program's fault.
    seconds = []
    for _ in range(5):
        before = os.times()
        run("--help")
        after = os.times()
        spent = after.children_user + after.children_system
        seconds.append(spent - before.children_user - before.children_system)
    assert min(seconds) < 0.5, seconds


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mithridate.cli import app; app._run(['--help'], None); "
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'jinja2') "
        "if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    text = run(command, "--help").stdout
    assert "--json" in text


def test_no_arguments_show_help() -> None:
    assert "Commands:" in run().stdout


def test_version_is_shown() -> None:
    assert run("--version").stdout.startswith("mithridate ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--bogus"),
        ("demo", "--steps", "many"),
        ("immunise",),
        ("report", "no/such/folder"),
        ("nonsense",),
    ],
)
def test_bad_input_is_one_screen_and_one_document(arguments: tuple[str, ...]) -> None:
    plain = run(*arguments, code=2)
    assert plain.stdout == ""
    assert "cannot start" in plain.stderr
    assert "mend" in plain.stderr
    assert "Traceback" not in plain.stderr
    assert len(plain.stderr.splitlines()) <= 24
    error = json.loads(run(*arguments, "--json", code=2).stdout)["error"]
    assert error["exit_code"] == 2
    assert error["what"]
    assert error["mend"]


def test_report_prints_its_path_and_its_document(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert "report.html" in run("report", str(folder)).stdout
    document = json.loads(run("report", str(folder), "--json").stdout)
    assert Path(document["report"]).stat().st_size == document["bytes"]


def test_what_libraries_print_stays_off_the_document() -> None:
    code = (
        "import os\n"
        "from mithridate.cli import app\n"
        "def chatty(*_, **__):\n"
        "    print('chatter from Python')\n"
        "    os.write(1, b'chatter from below')\n"
        "    import warnings\n"
        "    warnings.warn('a library will change', FutureWarning)\n"
        "    return {'answer': '<\\x1b[2J>'}\n"
        "app.app = chatty\n"
        "app.main(['demo', '--json'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == {"answer": "<\x1b[2J>"}
    assert "\x1b" not in result.stdout
    assert "chatter from Python" in result.stderr
    assert "chatter from below" in result.stderr
    assert "will change" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (GateError("the gate G1 is not met"), 3, "G1"),
        (RunInterruptedError("at step 3 of 9"), 130, "go on"),
    ],
)
def test_stopped_runs_have_their_own_codes(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    word: str,
) -> None:
    def stopping(arguments: list[str], **_: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", stopping)
    with pytest.raises(SystemExit) as exit_:
        app.main(["demo", "--json"])
    assert exit_.value.code == code
    captured = capfd.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == code
    assert word in captured.err


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, mithridate.reports as reports\n"
        # Processes of a shell's background jobs inherit an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def slow(*_, **__):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "reports.render_report = slow\n"
        "from mithridate.cli.app import main\n"
        f"main(['report', {str(tmp_path)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr


def test_error_texts_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["report", "\x1b[2J\x1b]0;owned\x07[red]folder"])
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert "\\x1b[2J" in err
    assert "[red]folder" in err.replace("\n", "").replace("│", "").replace(" ", "")
