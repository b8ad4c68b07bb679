"""A run killed at any moment and started again ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import safetensors.torch
import torch

from mithridate.errors import InputError
from mithridate.training import newest_complete
from mithridate.training.checkpoints import seal
from mithridate.training.runs import RunFolder
from tests.training.processes import STEPS, run, run_beside, run_two

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


def test_a_second_run_in_the_same_folder_is_refused_and_spoils_nothing(straight, tmp_path):
    assert run_beside(tmp_path / "run", "sft") == (0, 2)
    assert "another run writes into this folder: process" in (tmp_path / "said.txt").read_text()
    assert_same_run(straight["sft"], tmp_path / "run")


def test_a_checkpoint_of_another_step_than_its_name_is_not_gone_on_from(tmp_path):
    assert run(tmp_path, "sft", "step", 7) == KILLED
    state = tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 5'))
    seal(state.parent)
    assert run(tmp_path, "sft") == 3
    assert "of step 6, and the run would go on from step 5" in (tmp_path / "said.txt").read_text()


def test_a_damaged_checkpoint_is_said_and_the_older_one_taken(tmp_path):
    for step in (3, 6):
        (tmp_path / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/checkpoint-{step}/weights").write_text("w")
        seal(tmp_path / f"checkpoints/checkpoint-{step}")
    (tmp_path / "checkpoints/checkpoint-6/weights").write_text("v")
    with pytest.warns(UserWarning, match=r"checkpoint-6 is .* damaged: going on from step 3"):
        assert RunFolder(tmp_path).newest().name == "checkpoint-3"


@pytest.mark.parametrize("name", ["history.jsonl", "model/model.safetensors"])
def test_a_finished_run_that_was_damaged_is_made_again(name, straight, tmp_path):
    shutil.copytree(straight["sft"], tmp_path / "run")
    data = bytearray((tmp_path / "run" / name).read_bytes())
    data[-5] ^= 1
    (tmp_path / "run" / name).write_bytes(data)
    assert run(tmp_path / "run", "sft") == 0
    assert_same_run(straight["sft"], tmp_path / "run")


@pytest.mark.parametrize(
    "changed",
    [
        "", "[]", "{", "null", {"identity": 5}, {"status": "done"}, {"hashes": [1]},
        {"ledger": {"x": {"forwards": "many"}}}, {"ledger": {"x": {"odd": 1}}}, {"seconds": "long"},
        {"seconds": float("inf")}, {"history": 3}, "folder",
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_refused_by_name(changed, straight, tmp_path):
    folder = RunFolder(tmp_path)
    path = tmp_path / "manifest.json"
    if changed == "folder":
        path.mkdir()
    elif isinstance(changed, dict):
        kept = json.loads((straight["sft"] / "manifest.json").read_text())
        path.write_text(json.dumps(kept | changed))
    else:
        path.write_text(changed)
    with pytest.raises(InputError, match=r"manifest\.json that no immunisation has written"):
        folder.read_manifest()


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
