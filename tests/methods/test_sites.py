"""Sites are found by structure, in any architecture."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mithridate.errors import InactiveTermError, InputError
from mithridate.methods.sites import outputs_changed, sites_of
from mithridate.methods.vaccine import Vaccine, VaccineConfig
from mithridate.weights.maps import blocks_of
from tests.methods.by_hand import step_of
from tests.tiny import VOCABULARY, tiny_llama

# Attention in tuples, blocks in tensors or tuples, MLPs as two layers of the block, experts.
ARCHITECTURES = ["gpt2", "opt", "gpt_neox", "falcon", "gemma2", "mixtral"]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "n_embd": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "num_local_experts": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def tiny(kind):
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    if kind == "gemma2":
        sizes["head_dim"] = 8
    config = AutoConfig.for_model(kind, **sizes)
    # Grouped matrix products of experts know no float64.
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_rises_by_rho_times_the_norm_in_any_architecture(kind):
    model = tiny(kind)
    assert len(sites_of(model, "mlp")) == len(blocks_of(model)) == 2
    for site in ("attention", "block"):
        method = Vaccine(VaccineConfig(batch_size=4, radius=1e-4, site=site))
        _, terms, _ = step_of(method, model)
        rise = terms["drifted"] - terms["retain"]
        assert rise / (1e-4 * terms["site_norm"]) == pytest.approx(1, abs=2e-2)


def test_tuples_keep_their_other_elements():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "kept"

    module = Pair()
    with outputs_changed([module], lambda index, x: x + 1 + index):
        assert module(1) == (2, "kept")
    assert module(1) == (1, "kept")


def test_what_has_no_sites_is_said():
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="no list of 5 layers"):
        blocks_of(model)
    model.config.num_hidden_layers = 2
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(InputError, match=r"layer 1 .* has no attention"):
        sites_of(model, "attention")


def test_a_site_without_a_part_in_the_loss_stops_the_run(monkeypatch):
    model = tiny_llama()
    unused = nn.Linear(1, 1)
    monkeypatch.setattr(
        "mithridate.methods.vaccine.sites_of", lambda *_: [*sites_of(model, "block"), unused]
    )
    with pytest.raises(InactiveTermError, match="no part"):
        step_of(Vaccine(VaccineConfig()), model)
