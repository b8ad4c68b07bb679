from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mithridate.errors import InputError, RunStoppedError
from mithridate.files import sha256_file
from mithridate.release import round_weights, sampled, save_release, weights_hash
from mithridate.training.lora import attach_lora
from tests.training.tiny_world import tiny_model, tiny_tokenizer

IDS = torch.arange(10)[None]


def adapted(seed=0, *, model=None, targets=()):
    model = attach_lora(model or tiny_model(), rank=2, targets=targets, seed=seed)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=44, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize(
    "targets",
    [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]],
    ids=" and ".join,
)
def test_an_adapter_on_a_tied_weight_is_released_untied(tmp_path, targets):
    model = adapted(targets=targets)
    trained = logits(model)
    release = save_release(model, tiny_tokenizer(), tmp_path / "model")
    assert release.merge_difference < 1e-4 * float(trained.abs().max())
    loaded = AutoModelForCausalLM.from_pretrained(release.folder)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)
    assert not json.loads((release.folder / "config.json").read_text())["tie_word_embeddings"]


def test_an_adapter_elsewhere_leaves_embedding_and_head_tied(tmp_path):
    release = save_release(adapted(targets=["q_proj"]), tiny_tokenizer(), tmp_path / "model")
    assert json.loads((release.folder / "config.json").read_text())["tie_word_embeddings"]


def test_an_adapter_on_other_names_of_tied_weights(tmp_path):
    model = adapted(model=gpt2(), targets=["lm_head", "wte"])
    trained = logits(model)
    release = save_release(model, tiny_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(release.folder)
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)


def test_a_layer_used_twice_takes_no_adapter():
    model = tiny_model()
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    model._tied_weights_keys = {
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"
    }
    model.get_expanded_tied_weights_keys = lambda **_: dict(model._tied_weights_keys)
    with pytest.raises(InputError, match=r"up_proj, whose weight .* in several places"):
        attach_lora(model, rank=2, seed=0)


def test_a_merge_that_moves_the_logits_releases_nothing(tmp_path):
    model = adapted(targets=["up_proj"])
    layers = model.base_model.model.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.up_proj.base_layer.weight
    with pytest.raises(RunStoppedError, match="is not the one that was trained"):
        save_release(model, tiny_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_that_is_not_a_number_releases_nothing(tmp_path):
    model = adapted()
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(torch.nan)
    with pytest.raises(RunStoppedError):
        save_release(model, tiny_tokenizer(), tmp_path / "model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_release_in_a_narrow_type_is_what_is_handed_back(tmp_path, dtype):
    release = save_release(tiny_model(), tiny_tokenizer(), tmp_path / "model", dtype=dtype)
    stored = AutoModelForCausalLM.from_pretrained(release.folder, dtype="auto")
    assert {str(p.dtype) for p in stored.parameters()} == {f"torch.{dtype}"}
    loaded = AutoModelForCausalLM.from_pretrained(release.folder, dtype=torch.float32)
    assert {p.dtype for p in release.model.parameters()} == {torch.float32}
    assert weights_hash(loaded) == weights_hash(release.model) != weights_hash(tiny_model())
    assert torch.equal(logits(loaded), logits(release.model))
    assert release.dtype == dtype
    assert 0 < release.rounding_difference < 0.1
    other = tiny_model()
    round_weights(other, dtype)
    assert weights_hash(other) == weights_hash(release.model)


@pytest.mark.parametrize(("step", "away"), [(1e-6, 1.0), (1e-2, 0.0)])
def test_what_rounding_takes_back_is_counted(tmp_path, step, away):
    model = tiny_model()
    round_weights(model, "bfloat16")
    start = sampled(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + step)
    release = save_release(
        model, tiny_tokenizer(), tmp_path / "model", dtype="bfloat16", start=start
    )
    assert release.rounded_away == pytest.approx(away, abs=0.05)


def test_a_weight_too_large_for_the_type_is_named(tmp_path):
    model = tiny_model()
    model.model.norm.weight.data[0] = 1e5
    with pytest.raises(RunStoppedError, match=r"model\.norm\.weight .* float16 cannot"):
        save_release(model, tiny_tokenizer(), tmp_path / "model", dtype="float16")


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


@pytest.mark.parametrize("name", [".model.partial", ".model.old"])
def test_a_link_in_the_way_is_removed_and_not_followed(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    save_release(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    release = save_release(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(release.folder)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["kept"]


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
