"""One boundary: whoever wrote a text, a terminal shows it and never obeys it."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mithridate.cli import app, console
from mithridate.cli.console import err, out, show_error, show_warning

HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\u202ec\u200bd\x9b31me\ud800f"
OBEYED = ("\x1b", "\x07", "\u202e", "\u200b", "\x9b", "\ud800")


def shown(make, thing) -> str:
    made = make()
    made.file = io.StringIO()
    made.print(thing)
    return made.file.getvalue()


def things():
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="bold"))
    return [HOSTILE, Text(HOSTILE), table, Panel(HOSTILE, title=HOSTILE, subtitle=HOSTILE)]


@pytest.mark.parametrize("make", [out, err])
@pytest.mark.parametrize("thing", things(), ids=lambda one: type(one).__name__)
def test_no_renderable_carries_what_a_terminal_would_obey(make, thing):
    text = shown(make, thing)
    assert "\\x1b" in text.replace("\n", "") or "\\u202e" in text
    assert not [one for one in OBEYED if one in text]


def test_markup_and_emoji_in_a_name_are_text():
    assert "[red]x[/red] :bomb:" in shown(out, "[red]x[/red] :bomb:")


def test_plain_text_lines_and_letters_of_every_script_are_left_alone():
    for text in ("one\ntwo", "é ß 漢字 עברית 🎉"):
        assert text in shown(out, text)


def test_a_warning_and_an_error_are_inert(capsys):
    show_warning(HOSTILE)
    show_error(HOSTILE, HOSTILE, where=HOSTILE, mend=HOSTILE)
    said = capsys.readouterr().err
    assert "owned" in said
    assert not [one for one in OBEYED if one in said]


def test_colours_of_our_own_reach_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    made = console.out()
    made.file = io.StringIO()
    made.print(Text("held", style="green"))
    assert "\x1b[" in made.file.getvalue()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_one_message_and_one_document(monkeypatch, capfd, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number), "/disk/run/model.safetensors")

    monkeypatch.setattr(app, "app", full)
    with pytest.raises(SystemExit) as stopped:
        app.main(["demo", "--json"])
    assert stopped.value.code == 3
    told = capfd.readouterr()
    error = json.loads(told.out)["error"]
    assert error["kind"] == "system"
    assert error["where"] == "/disk/run/model.safetensors"
    assert error["what"].endswith(os.strerror(number))
    assert "model.safetensors" in told.err


def test_an_error_of_the_program_itself_is_not_taken_for_the_disk(monkeypatch):
    def lost(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr(app, "app", lost)
    with pytest.raises(FileNotFoundError):
        app.main(["demo"])


WRITERS = """
import resource, sys, torch, safetensors.torch
from mithridate.cli import app
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
weights = {"w": torch.zeros(100_000)}
writers = {
    "safetensors": lambda: safetensors.torch.save_file(weights, "w.safetensors"),
    "torch": lambda: torch.save(weights, "w.pt"),
}
app.app = lambda *_, **__: writers[sys.argv[1]]()
app.main(["demo", "--json"])
"""


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path, writer):
    found = subprocess.run(
        [sys.executable, "-c", WRITERS, writer], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 3, found.stderr
    assert json.loads(found.stdout)["error"]["kind"] == "system"
    assert "Traceback" not in found.stderr
