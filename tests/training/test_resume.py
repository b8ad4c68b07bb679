"""A run killed at any moment and started again ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import signal

import pytest
import safetensors.torch
import torch

from mithridate.training import newest_complete
from tests.training.processes import STEPS, run, run_two

KILLED = -signal.SIGKILL
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch build has no gloo",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folders = {}
    for name in ("sft", "two-stream"):
        folders[name] = tmp_path_factory.mktemp(name)
        assert run(folders[name], name) == 0
    return folders


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def tokens(folder):
    ledger = json.loads((folder / "manifest.json").read_text())["ledger"]
    return sum(count["tokens"] for count in ledger.values())


def assert_same_run(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert history(first) == history(second)
    counts = [
        {
            purpose: (count["forwards"], count["backwards"], count["tokens"])
            for purpose, count in json.loads((folder / "manifest.json").read_text())[
                "ledger"
            ].items()
        }
        for folder in (first, second)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "deaths"),
    [
        ("sft", [("step", 1), ("step", 5), ("save", 9), ("release", None)]),
        ("two-stream", [("step", 4), ("save", 6), ("seal", 6), ("step", 11), ("seal", 12)]),
    ],
)
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(name, deaths, straight, tmp_path):
    for where, step in deaths:
        assert run(tmp_path, name, where, step) == KILLED
        assert not (tmp_path / "model").exists()
    assert run(tmp_path, name) == 0
    assert_same_run(straight[name], tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_kill_in_a_save_keeps_the_older_checkpoint(tmp_path):
    assert run(tmp_path, "sft", "save", 6) == KILLED
    newest = newest_complete(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-3"
    assert (tmp_path / "checkpoints" / "checkpoint-6").is_dir()


def test_killed_adapter_run_ends_bit_for_bit_too(tmp_path):
    assert run(tmp_path / "straight", "two-stream", lora_rank=2) == 0
    assert run(tmp_path / "killed", "two-stream", "step", 7, lora_rank=2) == KILLED
    assert run(tmp_path / "killed", "two-stream", lora_rank=2) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_ctrl_c_saves_says_how_to_resume_and_resumes(straight, tmp_path):
    assert run(tmp_path, "two-stream", "interrupt", 4) == 130
    said = (tmp_path / "said.txt").read_text()
    assert f"interrupted at step 5 of {STEPS}" in said
    assert "checkpoint-5" in said
    assert "same command" in said
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "stopped"
    assert run(tmp_path, "two-stream") == 0
    assert_same_run(straight["two-stream"], tmp_path)


@needs_gloo
@pytest.mark.parametrize("name", ["sft", "two-stream"])
def test_two_processes_equal_one(name, straight, tmp_path):
    assert run_two(tmp_path, name) == [0, 0]
    alone, shared = tokens(straight[name]), tokens(tmp_path)
    assert 0.3 * alone < shared < 0.7 * alone, "the work was not shared"
    one, two = weights(straight[name]), weights(tmp_path)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6)
    for a, b in zip(history(straight[name]), history(tmp_path), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@needs_gloo
def test_two_killed_processes_go_on_together(tmp_path):
    assert run_two(tmp_path / "straight", "two-stream") == [0, 0]
    assert run_two(tmp_path / "killed", "two-stream", "step", 5) == [KILLED, KILLED]
    assert run_two(tmp_path / "killed", "two-stream") == [0, 0]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
