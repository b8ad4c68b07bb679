from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from mithridate.errors import GateError, InputError
from mithridate.testbeds.base import (
    COMPLETE,
    GateResult,
    cache_dir,
    cached_model,
    code_version,
    is_complete,
    require_gates,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MITHRIDATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(text: str):
    def build(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return build


def never(_: Path) -> None:
    raise AssertionError("must not be built again")


def test_cache_dir_follows_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("MITHRIDATE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "mithridate"


def test_equal_keys_are_built_once_and_others_apart() -> None:
    first = cached_model("m", {"seed": 0}, write("a"))
    assert cached_model("m", {"seed": 0}, never) == first
    other = cached_model("m", {"seed": 1}, write("b"))
    assert other != first
    assert (first / "weights").read_text() == "a"
    assert json.loads((first / "recipe.json").read_text()) == {"seed": 0}


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise GateError("no")

    with pytest.raises(GateError):
        cached_model("m", {}, fail)
    assert list((cache / "models").iterdir()) == []
    assert cached_model("m", {}, write("whole")).is_dir()


@pytest.mark.filterwarnings("ignore:the cached model")
@pytest.mark.parametrize("harm", ["truncated", "missing file", "no list", "broken list"])
def test_a_damaged_folder_is_made_again(harm: str) -> None:
    folder = cached_model("m", {}, write("whole"))
    if harm == "truncated":
        (folder / "weights").write_text("w")
    elif harm == "missing file":
        (folder / "weights").unlink()
    elif harm == "no list":
        (folder / COMPLETE).unlink()
    else:
        (folder / COMPLETE).write_text("{")
    assert not is_complete(folder)
    assert (cached_model("m", {}, write("again")) / "weights").read_text() == "again"


@pytest.mark.filterwarnings("ignore:waiting for another run")
def test_of_two_builds_at_once_the_second_waits(cache: Path) -> None:
    started, go_on = threading.Event(), threading.Event()
    builds: list[int] = []

    def build(folder: Path) -> None:
        builds.append(1)
        started.set()
        assert go_on.wait(20)
        (folder / "weights").write_text("same")

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(cached_model("m", {}, build)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert started.wait(20)
    threads[0].join(0.1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert builds == [1]
    assert found[0] == found[1]
    assert is_complete(found[0])
    assert [path.name for path in (cache / "models").iterdir()] == [found[0].name]


def test_a_flipped_bit_in_a_cached_model_is_noticed_and_said() -> None:
    folder = cached_model("m", {}, write("whole"))
    assert cached_model("m", {}, never) == folder
    (folder / "weights").write_text("wholf")
    with pytest.warns(UserWarning, match="damaged"):
        cached_model("m", {}, write("again"))
    assert (folder / "weights").read_text() == "again"


def test_an_empty_list_of_files_completes_nothing() -> None:
    folder = cached_model("m", {}, write("whole"))
    (folder / COMPLETE).write_text("{}")
    assert not is_complete(folder)


def test_a_link_in_the_cache_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    folder = cached_model("m", {}, write("whole"))
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "weights").write_text("mine")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="damaged"):
        cached_model("m", {}, write("again"))
    assert (tmp_path / "elsewhere" / "weights").read_text() == "mine"
    assert not folder.is_symlink()
    assert (folder / "weights").read_text() == "again"


def test_a_cache_of_another_user_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "models").mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != cache / "models")
    with pytest.raises(InputError, match=r"(?s)models: cannot be written.*MITHRIDATE_CACHE"):
        cached_model("m", {}, never)


def test_code_version_follows_the_source() -> None:
    assert code_version(write) == code_version(write)
    assert code_version(write) != code_version(never)


def test_an_unmet_gate_names_every_number() -> None:
    met = GateResult(name="refusal", value=0.99, bound=0.98, at_least=True)
    unmet = GateResult(name="over-refusal", value=0.1, bound=0.02, at_least=False)
    assert require_gates("t", [met]) == [met]
    with pytest.raises(GateError, match=r"(?s)refusal: 0\.990.*over-refusal: 0\.100.*NOT MET"):
        require_gates("t", [met, unmet])
