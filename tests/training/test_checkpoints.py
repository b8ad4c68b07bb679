from __future__ import annotations

import pytest

from mithridate.training.checkpoints import (
    COMPLETE,
    checkpoints,
    discard_all_but,
    is_complete,
    newest_complete,
    seal,
)


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 100):
        made = tmp_path / f"checkpoint-{step}"
        (made / "sub").mkdir(parents=True)
        (made / "weights").write_bytes(b"w" * 1000)
        (made / "sub" / "state").write_bytes(b"s" * step)
        seal(made)
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_newest_is_by_number(folder):
    assert [path.name for path in checkpoints(folder)] == [
        "checkpoint-100",
        "checkpoint-10",
        "checkpoint-5",
    ]
    assert newest_complete(folder).name == "checkpoint-100"


def unmarked(path):
    (path / COMPLETE).unlink()


def half_marked(path):
    mark = path / COMPLETE
    mark.write_text(mark.read_text()[:20])


def short(path):
    (path / "weights").write_bytes(b"w" * 999)


def flipped(path):
    (path / "weights").write_bytes(b"w" * 999 + b"v")


def missing(path):
    (path / "sub" / "state").unlink()


@pytest.mark.parametrize("ruin", [unmarked, half_marked, short, flipped, missing])
def test_a_ruin_is_ignored(folder, ruin):
    ruin(folder / "checkpoint-100")
    assert not is_complete(folder / "checkpoint-100")
    assert newest_complete(folder).name == "checkpoint-10"


def test_nothing_complete(tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "absent") is None


def test_discard_keeps_one(folder):
    discard_all_but(folder, folder / "checkpoint-10")
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-10"]
    assert is_complete(folder / "checkpoint-10")
