"""One process at a time in a folder, and nothing outside it is touched."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mithridate.errors import InputError
from mithridate.folders import cache_entry, discard_conclusions, run_folder
from tests.two_processes import start, wait_for

HOLD = """
import sys, time
from pathlib import Path
from mithridate.folders import {what}
place = Path(sys.argv[1])
with {what}(place):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def held(what: str, place: Path, sign: Path):
    process = start(HOLD.format(what=what), place, sign)
    wait_for(sign, process)
    return process


def test_a_second_process_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path):
    process = held("run_folder", tmp_path / "run", tmp_path / "sign")
    try:
        named = rf"(?s)run: another run writes .* process {process.pid} on .*another output folder"
        with pytest.raises(InputError, match=named), run_folder(tmp_path / "run"):
            pytest.fail("two processes in one folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with run_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.run.lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists() or not (tmp_path / "run/.run.lock.json").exists()


def test_a_cache_entry_is_waited_for_and_its_neighbour_is_not(tmp_path):
    process = held("cache_entry", tmp_path / "models" / "one", tmp_path / "sign")
    with cache_entry(tmp_path / "models" / "other"):
        pass
    script = (
        "import sys; from pathlib import Path; from mithridate.folders import cache_entry\n"
        "with cache_entry(Path(sys.argv[1])): Path(sys.argv[2]).touch()"
    )
    second = start(script, tmp_path / "models" / "one", tmp_path / "second")
    with pytest.raises(Exception, match="timed out"):
        second.wait(2)
    assert not (tmp_path / "second").exists()
    process.kill()
    assert f"process {process.pid}" in second.communicate(timeout=60)[1]
    assert second.returncode == 0
    assert (tmp_path / "second").exists()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_nothing_was_written_into_goes_again(tmp_path):
    with pytest.raises(InputError), run_folder(tmp_path / "run"):
        raise InputError("no", mend="yes")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with run_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling", "pipe"])
def test_what_leads_out_of_a_run_folder_is_refused(tmp_path, kind):
    inside = tmp_path / "run" / "checkpoints" / "planted"
    inside.parent.mkdir(parents=True)
    target = tmp_path / "elsewhere"
    if kind == "pipe":
        os.mkfifo(inside)
    else:
        inside.symlink_to(target)
        if kind == "folder":
            target.mkdir()
        if kind == "file":
            target.write_text("mine")
    with pytest.raises(InputError, match="checkpoints/planted: "), run_folder(tmp_path / "run"):
        pytest.fail("it was followed")


def test_a_run_folder_may_itself_be_a_link_and_hold_links_into_itself(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "weights").write_text("w")
    (tmp_path / "disk" / "same").symlink_to(tmp_path / "disk" / "weights")
    with run_folder(tmp_path / "run"):
        pass


def test_a_planted_lock_is_not_written_through(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError), run_folder(tmp_path / "run"):
        pytest.fail("it was followed")
    assert not (tmp_path / "victim").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"(?s)file.*cannot be written.*another output folder"), \
            run_folder(tmp_path / "file" / "run"):  # fmt: skip
        pytest.fail("a folder below a file")


def test_conclusions_go_and_rows_stay(tmp_path):
    for name in ("summary.json", "verdict.json", "report.html", "trajectory.jsonl", "utility.json"):
        (tmp_path / name).write_text("{}")
    discard_conclusions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trajectory.jsonl", "utility.json"]
