"""Decoder layers and their linear maps are found in every architecture, by structure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mithridate.errors import InputError, NotApplicableError
from mithridate.training.lora import attach_lora, describe_space
from mithridate.weights import maps
from tests.compat.zoo import FAMILIES, MULTIMODAL, zoo_model, zoo_multimodal

STACKED = [
    "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "jamba", "jetmoe",
    "llama4_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]  # fmt: skip
# In these nothing but the writers, scaled at most, is added to the residual stream.
PURE = [
    "bloom", "codegen", "cohere", "deepseek_v3", "falcon", "falcon_h1", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoehybrid", "jamba", "jetmoe",
    "llama", "llama4_text", "lfm2_moe", "mamba", "mamba2", "mixtral", "mpt", "opt", "phi",
    "qwen2_moe", "qwen3_moe", "qwen3_next", "recurrent_gemma", "starcoder2", "xglm",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_maps_are_nearly_all_of_the_layers(family):
    model = zoo_model(family)
    found = maps.linear_maps(model)
    parameters = dict(model.named_parameters())
    assert all(parameters[one.name] is one.weight for one in found)
    # In so small a state space the transition matrix and the convolution weigh much.
    least = 0.8 if "mamba" in family else 0.93
    assert least < maps.coverage(model, [one.weight for one in found]) <= 1
    assert len(maps.blocks_of(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", MULTIMODAL)
def test_layers_of_a_vision_tower_are_no_text_layers(family):
    model = zoo_multimodal(family)
    names = {one.name for one in maps.linear_maps(model)}
    assert names
    assert not any("vision" in name or "visual" in name for name in names)


@pytest.mark.parametrize("intermediate", ["24", "hidden size"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe"])
def test_experts_read_and_write_the_residual_stream_however_they_are_kept(family, intermediate):
    config = type(zoo_model(family).config)
    sizes = zoo_model(family).config.to_dict()
    size = 24 if intermediate == "24" else sizes["hidden_size"]
    for name in ("intermediate_size", "moe_intermediate_size"):
        if name in sizes:
            sizes[name] = size
    model = type(zoo_model(family))(config(**sizes))
    first, last = [one for one in maps.linear_maps(model) if one.weight.dim() == 3][:2]
    assert (first.inputs, first.outputs) == (32, 2 * size)
    assert (last.inputs, last.outputs) == (size, 32)
    assert last.oriented(last.weight).shape == (4, 32, size)


@pytest.mark.parametrize("family", PURE)
def test_what_the_writers_write_is_all_that_the_layers_add(family):
    model = zoo_model(family)
    direction = nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)),
                                        dim=0)  # fmt: skip
    added = []

    def note(_, args, given, output):
        before = args[0] if args else given["hidden_states"]
        after = output if isinstance(output, torch.Tensor) else output[0]
        added.append(float(((after - before) @ direction).abs().max()))

    def largest():
        added.clear()
        hooks = [
            block.register_forward_hook(note, with_kwargs=True) for block in maps.blocks_of(model)
        ]
        with torch.no_grad():
            model(input_ids=torch.arange(3, 15).reshape(2, 6), use_cache=False)
        for hook in hooks:
            hook.remove()
        return max(added)

    with torch.no_grad():
        for one in maps.residual_writers(model):
            for name, weight in one.owner.named_parameters(recurse=False):
                if "bias" in name:
                    weight.normal_(std=0.01)
    before = largest()
    with torch.no_grad():
        for one in maps.residual_writers(model):
            matrix = one.oriented(one.weight)
            matrix.sub_(direction[:, None] * (direction @ matrix)[..., None, :])
            for name, bias in one.owner.named_parameters(recurse=False):
                if "bias" in name and bias.shape[-1] == 32:
                    bias.sub_(direction * (bias @ direction)[..., None])
    assert largest() < 1e-5 * max(1.0, before)
    assert before > 1e-4


def test_a_map_as_wide_as_the_stream_that_others_read_is_no_writer():
    names = [one.name for one in maps.residual_writers(zoo_model("rwkv"))]
    assert names == [
        f"rwkv.blocks.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("attention.output", "feed_forward.value")
    ]


def test_layers_that_are_not_there_are_refused():
    model = zoo_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(NotApplicableError, match="no list of 5 layers"):
        maps.blocks_of(model)
    twins = zoo_model("llama")
    twins.model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    with pytest.raises(NotApplicableError, match="2 lists of 2 layers"):
        maps.blocks_of(twins)


@pytest.mark.parametrize("family", [*STACKED, "gpt2", "gpt_neox", "bloom", "phi", "opt", "falcon"])
def test_an_adapter_of_every_linear_layer_is_on_every_map(family):
    model = zoo_model(family)
    reached = maps.coverage(model, [one.weight for one in maps.linear_maps(model)])
    adapted = attach_lora(model, rank=2, seed=0)
    assert maps.adapted_coverage(adapted) == pytest.approx(reached)
    assert describe_space(adapted)["coverage"] == pytest.approx(reached)
    assert maps.adapted_coverage(adapted, trained=True) == 0.0
    parts = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in parts)
    assert not any("head" in name or "embed" in name for name in parts)


def test_what_an_adapter_cannot_reach_is_said():
    assert 0.5 < describe_space(attach_lora(zoo_model("mamba"), rank=2, seed=0))["coverage"] < 0.8


def test_named_targets_reach_experts_of_that_name_too():
    adapted = attach_lora(
        zoo_model("deepseek_v3"), rank=2, targets=["down_proj", "q_a_proj"], seed=0
    )
    space = describe_space(adapted)
    assert space["targets"] == ["down_proj", "q_a_proj"]
    held = {
        name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert {name.rpartition("layers.")[2] for name in held} == {
        "0.mlp.down_proj", "1.mlp.experts", "1.mlp.shared_experts.down_proj",
        "0.self_attn.q_a_proj", "1.self_attn.q_a_proj",
    }  # fmt: skip
    with pytest.raises(InputError, match="it has no w2"):
        attach_lora(zoo_model("deepseek_v3"), rank=2, targets=["q_a_proj", "w2"], seed=0)
