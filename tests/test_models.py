"""Bad model folders and too little room are named before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mithridate import models
from mithridate.errors import InputError
from mithridate.model_folders import adapter_parameters, check_model_folder, count_parameters
from mithridate.training.lora import attach_lora
from tests.training.tiny_world import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    return tmp_path


def test_whole_folder_passes_and_is_counted(folder: Path) -> None:
    assert check_model_folder(folder).parameters == 17
    assert count_parameters(folder) == 17


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_missing_part_is_named(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=message):
        models.load(str(folder))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json; no tokenizer .*; no weights"):
        check_model_folder(tmp_path)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only as pickle") as caught:
        check_model_folder(folder)
    assert "safetensors" in caught.value.mend


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "c": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-2\.safetensors, which is not there"):
        check_model_folder(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}'])
def test_torn_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json: (not an index|cannot be read as JSON)"):
        check_model_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{"])
def test_torn_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        count_parameters(folder)


def test_path_that_is_not_there_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(InputError, match="no such model folder"):
        models.load("./no/such/model")


def test_folder_that_transformers_cannot_load_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(folder))


def test_an_adapter_needs_its_own_disk_and_one_merged_model() -> None:
    whole = models.requirements(10**9, copies=4, checkpoints=2)
    light = models.requirements(10**9, copies=1, checkpoints=2, adapter=10**6)
    assert whole.disk == 4 * 10**9 * (1 + 3 * 2)
    assert light.disk == 4 * 10**9 + 4 * 10**6 * (1 + 3 * 2)
    assert light.memory < 0.3 * whole.memory


def test_an_adapter_is_counted_on_every_matrix() -> None:
    model = attach_lora(tiny_model(), rank=3, seed=0)
    held = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    blocks = [tuple(p.shape) for p in tiny_model().model.layers.parameters()]
    assert adapter_parameters(blocks, 3) == held
    assert adapter_parameters([(5, 4, 6)], 2) == 5 * 2 * (4 + 6)


def test_where_there_is_an_accelerator_its_memory_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = models.requirements(10**9, copies=5, checkpoints=0)
    monkeypatch.setattr(models, "free_space", lambda path: 2**60)
    monkeypatch.setattr(models, "available_memory", lambda: 6 * 2**30)
    with pytest.raises(InputError, match="too little memory: "):
        models.check_room(needed, tmp_path)
    monkeypatch.setattr(models, "accelerator_memory", lambda: 80 * 2**30)
    models.check_room(needed, tmp_path)
    monkeypatch.setattr(models, "accelerator_memory", lambda: 8 * 2**30)
    with pytest.raises(InputError, match="too little memory on the accelerator"):
        models.check_room(needed, tmp_path)
    monkeypatch.setattr(models, "accelerator_memory", lambda: 80 * 2**30)
    monkeypatch.setattr(models, "available_memory", lambda: 2 * 2**30)
    with pytest.raises(InputError, match="too little memory: "):
        models.check_room(needed, tmp_path)


def test_room_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = models.requirements(135_000_000, copies=5, checkpoints=1)
    assert 3.5 < needed.memory / 2**30 < 5
    assert 2 < needed.disk / 1e9 < 2.5
    monkeypatch.setattr(models, "available_memory", lambda: 2**30)
    with pytest.raises(InputError, match="too little memory"):
        models.check_room(needed, tmp_path)
    monkeypatch.setattr(models, "available_memory", lambda: 2**40)
    monkeypatch.setattr(models, "free_space", lambda path: 2**20)
    with pytest.raises(InputError, match="too little disk"):
        models.check_room(needed, tmp_path / "not" / "yet")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        models.check_room(models.Requirements(memory=0, disk=0, host=0), tmp_path / "file" / "run")


def test_free_space_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert models.free_space(tmp_path / "a" / "b") > 0
