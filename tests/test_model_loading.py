"""Real model folders with one fault each: a clear error, and no code or pickle of theirs is run."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from mithridate import models
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.training import TrainingConfig, immunise
from mithridate.weights.lens import check_lens
from tests.compat.zoo import save_zoo, zoo_multimodal, zoo_tokenizer
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
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
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


METHODS = ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "hqq", "torchao"]


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_refused_by_their_configuration(folder, method):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(InputError, match="quantised weights: give the full-precision model"):
        models.check(str(folder))


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_quantised_parts_are_refused(folder, inside):
    edit(folder / "config.json", **{inside: {"quantization_config": {"quant_method": "gptq"}}})
    with pytest.raises(InputError, match="quantised weights"):
        models.check(str(folder))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.uint8),
        ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
        ("model.layers.0.mlp.up_proj.qweight", torch.int32),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.int32),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8),
    ],
)
def test_quantised_weights_are_refused_by_their_type(folder, name, dtype):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path) | {name: torch.zeros(4, 4).to(dtype)}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="quantised weights"):
        models.check(str(folder))


def test_buffers_of_whole_numbers_are_not_quantised_weights(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    assert models.check(str(folder)).parameters == tiny_model().num_parameters()


def test_an_adapter_beside_its_model_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"adapter beside a model(.|\n)*merge"):
        models.load(str(folder))


def test_weights_that_loading_would_drop_are_refused(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path) | {"model.vision_tower.weight": torch.ones(3, 3)}
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no place for 1 weights .*model.vision_tower.weight"):
        models.load(str(folder))


def test_a_configuration_of_fewer_layers_would_drop_weights(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(InputError, match="no place for 9 weights"):
        models.load(str(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(folder, value):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight hold NaN"):
        models.load(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 0},
        {"hidden_size": 10**9},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": 10**7},
        {"head_dim": 2**40},
        {"num_labels": 10**9},
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
        {"model_type": "gpt_neox", "max_position_embeddings": 10**9},
        {"model_type": "xlm", "max_position_embeddings": 2**62},
        {"model_type": "nothing-known"},
        {"model_type": 3},
        {"model_type": "t5"},
        {"model_type": "bart"},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"hidden_act": "no-such"},
        {"dtype": "float31"},
        {"transformers_weights": "other.safetensors"},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids=str,
)
def test_a_configuration_that_fits_no_weights_is_refused_at_once(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError) as caught:
        models.load(str(folder))
    assert str(folder) in caught.value.where
    assert len(caught.value.what) < 300


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", ["[" * 10**5, "{", "\xff", "1" * 5000], ids=["deep", "torn", "bytes", "digits"]
)
def test_json_that_cannot_be_read_is_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as JSON") as caught:
        models.load(str(folder))
    assert caught.value.where == str(folder / name)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[" * 10**5, '{"version": "9.0", "model": {"type": "Newer", "vocab": {}}}'],
    ids=["torn", "empty", "deep", "newer"],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer") as caught:
        models.load(str(folder))
    assert "-U transformers tokenizers" in caught.value.mend


def test_a_tokenizer_whose_ids_leave_gaps_is_measured_by_its_largest(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w0"] = 90
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="91 tokens, the model only 44"):
        models.load(str(folder))


def index_of(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_an_index_that_names_a_pickle_is_refused_before_it_is_opened(folder):
    mark = folder / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(mark), "w")

    (folder / "model.safetensors").unlink()
    torch.save(Evil(), folder / "shard.bin")
    index_of(folder, {"a": "shard.bin"})
    with pytest.raises(InputError, match=r"index names shard\.bin"):
        models.load(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../shard.safetensors", "/shard.safetensors", "in/x.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, name):
    index_of(folder, {"a": name})
    with pytest.raises(InputError, match="leads out of its folder"):
        models.load(str(folder))


def test_a_link_out_of_the_folder_is_refused_but_the_cache_of_the_hub_is_made_of_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    tiny_model().save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)
    blobs.mkdir()
    weights = snapshot / "model.safetensors"
    weights.rename(blobs / "f00")
    weights.symlink_to("../../blobs/f00")
    models.load(str(snapshot))
    (blobs / "f00").rename(tmp_path / "elsewhere")
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link that leads out"):
        models.load(str(snapshot))


def test_files_that_are_not_loaded_are_not_counted(folder):
    whole = models.check(str(folder)).parameters
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert models.check(str(folder)).parameters == whole == tiny_model().num_parameters()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index_of(folder, {"model.norm.weight": "model-00001-of-00001.safetensors"})
    assert models.check(str(folder)).parameters == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_is_that_in_the_files(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", dtype="float64")
    assert models.stored_dtype(str(tmp_path)) == str(dtype).removeprefix("torch.")


def test_a_model_that_sees_later_tokens_is_no_causal_model(tmp_path):
    config = BertConfig(
        vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="looks at later tokens too"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_checkpoint_with_a_tower_that_no_text_model_keeps_is_refused(tmp_path, family):
    with pytest.raises(InputError, match=rf"type {family} takes more than text(.|\n)*text part"):
        models.load(str(save_zoo(family, tmp_path)))


def test_a_checkpoint_whose_text_class_would_drop_its_tower_is_refused(tmp_path):
    model = zoo_multimodal("gemma3")
    model.save_pretrained(tmp_path)
    zoo_tokenizer().save_pretrained(tmp_path)
    text = model.config.text_config
    text.architectures = ["Gemma3ForCausalLM"]
    text.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no place for"):
        models.load(str(tmp_path))


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = BartConfig(
        vocab_size=44, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="type bart is of another kind"):
        models.load(str(tmp_path))


def test_loading_leaves_the_random_state(folder):
    before = torch.random.get_rng_state()
    models.load(str(folder))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def no_hub(monkeypatch):
    def ask(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download._request_wrapper", ask, raising=False)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", ask)


@pytest.mark.parametrize(
    "name",
    ["out/modle", "./modle", "../modle", "/no/such/model", "a/b/c", "out/model/config.json",
     "model.safetensors", "model.gguf", "two words", "-x", "~/model", ""],
)  # fmt: skip
def test_a_slip_in_a_path_is_told_without_asking_the_hub(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"no such model folder|not a file"):
        models.check(name)


def test_a_hub_id_is_asked_for_by_its_configuration_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def answer(source, **_):
        asked.append(source)
        return {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, {}

    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", answer)
    with pytest.raises(InputError, match="quantised weights"):
        models.load("owner/name")
    assert asked == ["owner/name"]


def test_offline_an_unknown_hub_id_is_one_short_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        models.load("nobody/has-this-model")
    assert len(caught.value.what) < 300


def test_adapter_without_its_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(InputError, match=r"adapter without its model.*\n.*merge"):
        models.load(str(folder))


def test_of_a_model_that_sees_the_text_part_alone_is_trained_and_all_of_it_kept(tmp_path):
    model, tokenizer = models.load(str(save_zoo("gemma3", tmp_path / "model")))
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any("vision" in name or "projector" in name for name in names)
    assert "model.language_model.layers.1.mlp.up_proj.weight" in names
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows = [Example(prompt=f"question {n}", answer=f"answer {n}") for n in range(4)]
    config = TrainingConfig(steps=1, save_every=0, learning_rate=1e-2, save_dtype="float32")
    immunise(
        model,
        tokenizer,
        {"refusal": rows},
        SFT(SFTConfig(batch_size=4, retain=("refusal",))),
        config,
        tmp_path / "run",
    )
    loaded, _ = models.load(str(tmp_path / "run" / "model"))
    after = dict(loaded.named_parameters())
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved <= names
    assert "model.language_model.layers.1.mlp.up_proj.weight" in moved
    assert len(after) == len(before)
    assert "use_cache" not in json.loads((tmp_path / "run/model/config.json").read_text())
    check_lens(model)
