"""Losses are sums over label positions, whatever the padding, and equal their definitions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mithridate.chat import IGNORE
from mithridate.errors import InputError
from mithridate.weights import losses
from mithridate.weights.lens import check_lens
from mithridate.weights.maps import blocks_of
from tests.compat.zoo import FAMILIES, zoo_model
from tests.tiny import (
    LORA,
    VOCABULARY,
    MemoryWatch,
    mean_loss,
    tiny_batch,
    tiny_llama,
    tiny_model,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=3)


def test_answer_cross_entropy_is_the_library_s_sum(model):
    batch = tiny_batch(5)
    found = losses.answer_cross_entropy(model, batch).item()
    assert found == pytest.approx(mean_loss(model, batch).item() * batch.label_count)


def test_only_positions_from_the_first_label_on_are_projected(model):
    batch = tiny_batch(3)
    logits, targets = losses.answer_logits(model, batch)
    assert logits.shape == (batch.label_count, VOCABULARY)
    assert torch.equal(targets, batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE])


def test_padding_changes_nothing(model):
    batch = tiny_batch(3)
    wide = replace(
        batch,
        input_ids=nn.functional.pad(batch.input_ids, (0, 4), value=3),
        attention_mask=nn.functional.pad(batch.attention_mask, (0, 4)),
        labels=nn.functional.pad(batch.labels, (0, 4), value=IGNORE),
    )
    for loss in (losses.answer_cross_entropy, losses.uniform_collapse, losses.token_collapse(7)):
        assert float(loss(model, wide)) == pytest.approx(float(loss(model, batch)), rel=1e-12)


def test_token_collapse_is_minus_log_p_of_the_token(model):
    batch = tiny_batch(3)
    logits, _ = losses.answer_logits(model, batch)
    expected = -logits.log_softmax(-1)[:, 9].sum()
    assert float(losses.token_collapse(9)(model, batch)) == pytest.approx(float(expected))
    probability = float(losses.token_probability(9)(model, batch))
    assert probability == pytest.approx(float(logits.softmax(-1)[:, 9].sum()))


def test_uniform_divergence_is_zero_at_equal_logits_with_the_gradient_p_minus_uniform():
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.uniform_divergence(logits).sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1) - 1 / 11)
    assert float(losses.uniform_divergence(torch.full((1, 11), 3.0))) == pytest.approx(0, abs=1e-6)
    log_p = logits.log_softmax(-1)
    kl = (-math.log(11) - log_p).mean(-1)
    torch.testing.assert_close(losses.uniform_divergence(logits), kl)


def test_logits_are_widened_but_never_narrowed():
    assert losses.widen(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert losses.widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("space", ["full", LORA])
def test_layerwise_cross_entropy_reads_the_layers_through_norm_and_head(space):
    model = tiny_model(space, layers=3)
    batch = tiny_batch(3)
    inner = model.get_base_model() if space == LORA else model
    output, lens = losses.layerwise_cross_entropy(model, batch, [1, 2])
    states = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states
    expected = sum(
        nn.functional.cross_entropy(
            inner.lm_head(inner.model.norm(states[layer]))[:, :-1].flatten(0, 1),
            batch.labels[:, 1:].flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        for layer in (1, 2)
    )
    assert float(lens) == pytest.approx(float(expected), rel=1e-10)
    assert float(output) == pytest.approx(float(losses.answer_cross_entropy(model, batch)))
    weights = [w for w in model.parameters() if w.requires_grad]
    found = torch.autograd.grad(lens, weights, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, weights, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_layers_is_the_output_alone(model):
    batch = tiny_batch(2)
    output, lens = losses.layerwise_cross_entropy(model, batch, [])
    assert float(lens) == 0.0
    assert float(output) > 0


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3n_text"}))
def test_behind_identities_the_lens_is_the_output(family):
    """Whatever a model does behind its layers: norms, projections, soft caps, logit scales."""
    model, batch = zoo_model(family), tiny_batch(4)
    blocks = blocks_of(model)
    forms = []
    hook = blocks[-1].register_forward_hook(lambda _, __, output: forms.append(output))
    before, inner = losses.layerwise_cross_entropy(model, batch, [len(blocks) - 1])
    hook.remove()
    assert abs(float(before) - float(inner)) > 1e-6

    def same(*given, **named):
        (form, *_), (state, *_) = forms, (*given, *named.values())
        return state if isinstance(form, torch.Tensor) else (state, *form[1:])

    blocks[-1].forward = same
    output, lens = losses.layerwise_cross_entropy(model, batch, [len(blocks) - 1])
    assert float(lens) == pytest.approx(float(output), rel=1e-5)
    weights = [weight for name, weight in model.named_parameters() if "bias" not in name]
    slopes = [
        torch.autograd.grad(
            one, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one in (output, lens)
    ]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_state_that_the_model_has_not_one_of_is_not_read():
    with pytest.raises(InputError, match="cannot be read as its last one"):
        check_lens(zoo_model("gemma3n_text"))
    check_lens(zoo_model("opt"))
    # Behind its last layer OPT narrows the state: it cannot be normed and read once more.
    with pytest.raises(InputError, match="cannot be read as its last one"):
        check_lens(zoo_model("opt"), final=True)


def test_logits_that_are_more_than_the_last_state_are_not_read():
    class Biased(type(zoo_model("llama"))):
        def forward(self, input_ids, **given):
            output = super().forward(input_ids, **given)
            output.logits = output.logits + input_ids[..., None]
            return output

    model = zoo_model("llama")
    model.__class__ = Biased
    with pytest.raises(InputError, match="cannot be read as its last one"):
        check_lens(model)


def test_a_reading_leaves_the_layers_and_their_hooks_alone(model):
    seen = []
    blocks = list(blocks_of(model))
    hooks = [block.register_forward_hook(lambda *_: seen.append(1)) for block in blocks]
    losses.layerwise_cross_entropy(model, tiny_batch(3), [0, 1, 2])
    for hook in hooks:
        hook.remove()
    assert list(blocks_of(model)) == blocks
    assert len(seen) == len(blocks)


def plain_statistics(model, batch):
    """log p and entropy at the answers from whole logits, written a second time."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    wanted = batch.labels[:, 1:] != IGNORE
    p = logits[wanted].exp() / logits[wanted].exp().sum(-1, keepdim=True)
    token = p[torch.arange(len(p)), batch.labels[:, 1:][wanted]].log()
    return token, -(p * p.log()).sum(-1)


@pytest.mark.parametrize("space", ["full", LORA])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_chunked_log_probability_and_entropy_are_the_plain_formula(space, rows, monkeypatch):
    model, batch = tiny_model(space), tiny_batch(5)
    monkeypatch.setattr(losses, "CHUNK", rows * VOCABULARY)
    found = losses.answer_log_probability_and_entropy(model, batch)
    expected = plain_statistics(model, batch)
    weights = [w for w in model.parameters() if w.requires_grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        scales = torch.linspace(-1, 2, len(one), dtype=one.dtype)
        gradients = (torch.autograd.grad((scales * x).sum(), weights, retain_graph=True)
                     for x in (one, other))  # fmt: skip
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_chunked_entropy_needs_memory_for_a_chunk_only(monkeypatch):
    model = tiny_llama(dtype=torch.float32, hidden=2, layers=1)
    model.resize_token_embeddings(4000, mean_resizing=False)
    batch = tiny_batch(4, length=60)
    batch = replace(batch, labels=batch.input_ids)
    whole = batch.label_count * 4000 * 4
    peaks = []
    for chunk in (1 << 24, 4 * 4000):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        with MemoryWatch() as watch:
            _, spread = losses.answer_log_probability_and_entropy(model, batch)
            spread.sum().backward()
        peaks.append(watch.peak)
    assert peaks[0] > 2 * whole
    assert peaks[1] < 0.5 * whole


def test_entropy_is_log_v_at_uniform_and_zero_at_one_hot_odds():
    uniform = torch.zeros(2, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(losses.entropy(uniform), torch.full((2,), math.log(9)).double())
    certain = torch.tensor([[800.0, 0.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    assert float(losses.entropy(certain)) == 0


def test_a_head_that_is_more_than_a_projection_is_refused():
    model, batch = tiny_llama(), tiny_batch(2)
    losses.check_head(model, batch)
    plain = model.forward

    def scaled(**inputs):
        output = plain(**inputs)
        output.logits = 3 * output.logits
        return output

    model.forward = scaled
    with pytest.raises(InputError, match="LlamaForCausalLM are not its output head's alone"):
        losses.check_head(model, batch)


def test_the_final_soft_cap_is_known():
    model, batch = tiny_llama(), tiny_batch(2)
    model.config.final_logit_softcapping = 0.5
    states, _ = losses.answer_states(model, batch)
    logits, _ = losses.answer_logits(model, batch)
    capped = losses.output_head(model)(states)
    torch.testing.assert_close(capped, 0.5 * torch.tanh(logits / 0.5))
