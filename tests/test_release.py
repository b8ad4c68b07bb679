from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mithridate.files import sha256_file
from mithridate.release import save_release, weights_hash
from mithridate.training.lora import attach_lora
from tests.training.tiny_world import tiny_model, tiny_tokenizer


def adapted(seed=0):
    model = attach_lora(tiny_model(), rank=2, seed=seed)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model


def test_release_loads_and_its_hashes_hold(tmp_path):
    release = save_release(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(release.folder)
    assert weights_hash(loaded) == weights_hash(tiny_model())
    assert "model.safetensors" in release.hashes
    assert all(
        sha256_file(release.folder / name) == digest for name, digest in release.hashes.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_release_replaces_the_older_one_whole(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "training_args.bin").write_bytes(b"old")
    save_release(tiny_model(), tiny_tokenizer(), folder)
    assert not (folder / "training_args.bin").exists()


def test_a_failed_release_leaves_the_older_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    before = save_release(tiny_model(), tiny_tokenizer(), folder).hashes
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_release(tiny_model(seed=1), tiny_tokenizer(), folder)
    assert all(sha256_file(folder / name) == digest for name, digest in before.items())


def test_an_adapter_is_merged_in_float32(tmp_path):
    ids = torch.arange(10)[None]
    model = adapted().eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    release = save_release(model, tiny_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(release.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert 0 <= release.merge_difference < 1e-4


def test_an_adapter_on_a_half_precision_base_is_merged_in_float32(tmp_path):
    model = attach_lora(tiny_model().to(torch.bfloat16), rank=2, seed=0)
    release = save_release(model, tiny_tokenizer(), tmp_path / "model")
    assert {p.dtype for p in release.model.parameters()} == {torch.float32}


def test_adapters_are_equal_for_equal_seeds_and_leave_the_random_state():
    assert weights_hash(adapted(0)) == weights_hash(adapted(0)) != weights_hash(adapted(1))
    model = tiny_model()
    before = torch.random.get_rng_state()
    attach_lora(model, rank=2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_hash_sees_values_names_and_types():
    model = tiny_model()
    start = weights_hash(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    assert weights_hash(model) != start
    assert weights_hash(tiny_model().double()) != start
    assert weights_hash(tiny_model()) == start
