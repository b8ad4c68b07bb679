"""Gradient checkpointing: every method's step is the same, in less memory, or it is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MixtralConfig, OPTConfig

from mithridate.errors import InputError
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.training import TrainingConfig, immunise, recompute
from mithridate.training.recompute import recomputed
from tests.methods.every import EVERY
from tests.tiny import (
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_examples,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:the look-ahead left")


def saved_bytes(model, batch):
    """Bytes that autograd keeps between a forward and a backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean_loss(model, batch)
    return sum(kept.values())


def calls_of(model, batch):
    counts = [0] * len(model.model.layers)

    def counting(index):
        def count(*_):
            counts[index] += 1

        return count

    mlps = [layer.mlp for layer in model.model.layers]
    handles = [mlp.register_forward_pre_hook(counting(i)) for i, mlp in enumerate(mlps)]
    gradient_of(model, mean_loss(model, batch))
    for handle in handles:
        handle.remove()
    return counts


def test_layers_run_twice_and_keep_less():
    model, batch = tiny_llama(layers=4), tiny_batch(8)
    plain, expected = saved_bytes(model, batch), gradient_of(model, mean_loss(model, batch))
    assert calls_of(model, batch) == [1] * 4
    with recomputed(model):
        assert calls_of(model, batch) == [2] * 4
        assert saved_bytes(model, batch) < plain / 3
        assert relative_error(gradient_of(model, mean_loss(model, batch)), expected) < 1e-12
    assert calls_of(model, batch) == [1] * 4
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", EVERY)
def test_every_method_takes_the_same_step(name):
    found = []
    for checkpointed in (False, True):
        model = tiny_model("full", layers=3)
        method, context = EVERY[name](), tiny_context(model)
        if checkpointed:
            with recomputed(model):
                method.prepare(context)
                terms = method.step(context)
        else:
            method.prepare(context)
            terms = method.step(context)
        gradient = [w.grad.clone() for w in context.space.tensors if w.grad is not None]
        found.append((gradient, terms))
    assert relative_error(found[1][0], found[0][0]) < 1e-9
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-8, abs=1e-10)


SIZES = {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 3}
NOISY = {
    "gpt2": lambda: GPT2Config(
        **SIZES, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "opt": lambda: OPTConfig(
        **SIZES, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5,
    ),
    "bloom": lambda: BloomConfig(
        **SIZES, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.5, attention_dropout=0.5
    ),
    "mixtral": lambda: MixtralConfig(
        **SIZES, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5, attention_dropout=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_chances_are_zero_meanwhile_and_come_back(name):
    torch.manual_seed(0)
    config = NOISY[name]()
    model = AutoModelForCausalLM.from_config(config).eval()
    told = config.to_dict()
    expected = gradient_of(model, mean_loss(model, tiny_batch(4)))
    state = [dict(vars(module)) for module in model.modules()]
    with recomputed(model):
        for _ in range(2):
            found = gradient_of(model, mean_loss(model, tiny_batch(4)))
            assert relative_error(found, expected) < 1e-5
    assert config.to_dict() == told
    for module, before in zip(model.modules(), state, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[key] is value for key, value in before.items())


def test_a_model_that_is_another_network_in_training_is_refused():
    model = tiny_llama()
    layer = model.model.layers[0]
    layer.register_forward_hook(
        lambda module, _inputs, output: output * 1.1 if module.training else output
    )
    with pytest.raises(InputError, match="computes something else while it trains"), (
        recomputed(model)
    ):  # fmt: skip
        pass
    assert not any(module.training for module in model.modules())


def test_a_model_that_recomputes_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(recompute, "checkpoint", lambda function, *args, **_: function(*args))
    model = tiny_llama()
    with pytest.raises(InputError, match="does not run its layers again"), recomputed(model):
        pass


@pytest.mark.parametrize("space", ["full", "lora"])
def test_a_run_ends_with_the_same_weights(tmp_path, space):
    found = []
    for checkpointed in (False, True):
        model, calls = tiny_llama(dtype=torch.float32), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        config = TrainingConfig(
            steps=3,
            save_every=0,
            learning_rate=1e-3,
            gradient_checkpointing=checkpointed,
            lora_rank=None if space == "full" else 2,
        )
        examples = tiny_examples()
        result = immunise(
            model, tiny_tokenizer(), examples, SFT(SFTConfig()), config,
            tmp_path / f"{checkpointed}",
        )  # fmt: skip
        found.append(([*result.model.parameters()], len(calls)))
    assert relative_error(found[1][0], found[0][0]) < 1e-6
    assert found[1][1] >= found[0][1] + 3
