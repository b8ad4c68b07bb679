"""Real model folders with one fault each: a clear error, and no code or pickle of theirs is run."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from mithridate import models
from mithridate.errors import InputError
from tests.training.tiny_world import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_are_loaded_in_float32(folder):
    model, tokenizer = models.load(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(folder))


def test_weights_that_would_be_random(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights .* \(first: model.layers.1.mlp.up_proj"):
        models.load(str(folder))


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(folder))


def test_code_in_the_folder_is_not_run(folder):
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(folder))
    assert not mark.exists()


def test_pickle_beside_a_missing_safetensors_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match="only as pickle"):
        models.load(str(folder))


def test_tokenizer_of_another_model(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="46 tokens, the model only 44"):
        models.load(str(folder))


def test_adapter_without_its_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match=r"adapter without its model.*\n.*merge"):
        models.load(str(folder))
