"""SEAM coupled where a simulated attack ends, exact products under autocast, shares of terms."""

import pytest
import torch

from mithridate.configs import from_mapping
from mithridate.errors import InputError
from mithridate.methods.coupling import Coupling
from mithridate.methods.seam import SEAM, SEAMConfig
from mithridate.weights import arithmetic, dot, norm
from mithridate.weights.losses import answer_cross_entropy
from tests.methods.test_seam import A, B, R, cosine, step_of, true_coupling, unlearning_loss
from tests.methods.test_trajectory import Spy
from tests.tiny import (
    MemoryWatch,
    flat,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_context,
    tiny_llama,
    tiny_model,
    weights_of,
)

WALK = {"attack_steps": (2, 2), "attack_learning_rate": (1e-2, 1e-2), "attack_rows": 5}


def method_for(**options):
    defaults = {"batch_size": 4, "coupling_weight": 0.7, "hvp": "exact"}
    return SEAM(SEAMConfig(**defaults | WALK | {"coupling_at": "trajectory"} | options))


def put(model, weights):
    with torch.no_grad():
        for weight, value in zip(weights_of(model), weights, strict=True):
            weight.copy_(value)


# The coupling at the end of an attack ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"unlearning": "log"}, {"unlearning": "none"}])
def test_the_step_couples_at_the_attack_s_end_and_unlearns_at_the_weights(space, options):
    model = tiny_model(space, layers=3)
    context = tiny_context(model)
    method = method_for(refusal_weight=1.3, **options)
    method.prepare(context)
    spy = Spy(context)
    terms = method.step(context)
    found = [tensor.clone() for tensor in context.space.gradient()]
    theta = [weight.detach().clone() for weight in weights_of(model)]
    attack, theta_h = spy.of("attack"), spy.of("harmful ahead")[0][1]
    assert len(attack) == 2
    expected = [1.3 * tensor for tensor in gradient_of(model, mean_loss(model, R))]
    loss = unlearning_loss(model, options)
    if isinstance(loss, torch.Tensor):
        expected = [e + p for e, p in zip(expected, gradient_of(model, loss), strict=True)]
    # The simulated attack is AdamW on the batches it drew, with gradients bounded by 1.
    optimiser = torch.optim.AdamW(weights_of(model), lr=1e-2, weight_decay=0.0)
    for batch, _ in attack:
        for weight, g in zip(
            weights_of(model), gradient_of(model, mean_loss(model, batch)), strict=True
        ):
            weight.grad = g
        arithmetic.bound_([weight.grad for weight in weights_of(model)])
        optimiser.step()
    assert relative_error(theta_h, weights_of(model)) < 1e-9
    assert terms["attack_travel"] == pytest.approx(float((flat(theta_h) - flat(theta)).norm()))
    assert terms["cosine"] == pytest.approx(float(cosine(model).detach()))
    coupling = true_coupling(model)
    assert relative_error(found, [e + 0.7 * c for e, c in zip(expected, coupling, strict=True)]) < (
        1e-7
    )
    put(model, theta)
    # At the weights themselves it is another gradient.
    assert relative_error(true_coupling(model), coupling) > 0.1


@pytest.mark.parametrize("how", ["finite", "exact"])
def test_weights_are_the_same_bits_after_preparation_and_step(space, how):
    model = tiny_model(space, dtype=torch.float32)
    before = [w.detach().clone() for w in weights_of(model)]
    step_of(method_for(hvp=how), model)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("how", ["finite", "exact"])
def test_eight_rows_equal_eight_micro_batches(space, how):
    model = tiny_model(space, layers=3)
    options = {"hvp": how, "epsilon": 1e-3, "batch_size": 8}
    whole, terms, _ = step_of(method_for(**options), model)
    split, again, _ = step_of(method_for(**options), model, micro_batch_size=1)
    # AdamW's first step divides a gradient by its own size, and magnifies its rounding.
    assert relative_error(split, whole) < 1e-5
    assert again == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "passes", "buffers"),
    [
        ({"hvp": "finite"}, 8, 3),
        ({"hvp": "exact"}, 9, 4),
        ({"hvp": "finite", "unlearning": "none"}, 7, 3),
        ({"hvp": "finite", "refusal_weight": 0.0}, 7, 3),
    ],
)
def test_passes_and_buffers(monkeypatch, options, passes, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = method_for(**options | {"batch_size": 1})
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    method.prepare(context)
    context.space.give_gradient(None)
    context.oracle.ledger.clear()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == passes
    assert method.parameter_buffers == buffers
    assert buffers - 0.5 < watch.peak / context.space.bytes - 1 < buffers + 0.6


def test_twenty_steps_lower_the_cosine_along_the_attack():
    """Against the same steps without the term."""

    def last(weight):
        model = tiny_llama(dtype=torch.float32)
        method = method_for(coupling_weight=1.0, unlearning="none", refusal_weight=0.0)
        context = tiny_context(model)
        method.prepare(context)
        optimiser = torch.optim.SGD(weights_of(model), lr=0.05 * weight)
        found = []
        for step in range(20):
            context.step = step
            found.append(method.step(context)["cosine"])
            optimiser.step()
        return sum(found[-5:]) / 5

    assert last(1.0) < last(0.0) - 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack_steps": [0, 3]}, "attack_steps"),
        ({"attack_learning_rate": [1e-3, 1e-4]}, "attack_learning_rate"),
        ({"attack_learning_rate": [0.0, 1e-4]}, "attack_learning_rate"),
        ({"attack_rows": 0}, "attack_rows"),
        ({"coupling_at": "everywhere"}, "coupling_at"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(SEAMConfig, options, where="run.yaml: method")


# Exact products under autocast -------------------------------------------------------------------


def test_exact_products_are_true_under_autocast_where_differences_are_void(space):
    """`methods.md` P3: a difference of bfloat16 gradients is noise, the double backward is not."""
    # Wider, its random logits are so large that bfloat16 itself is rough.
    model = tiny_model(space, dtype=torch.float32, hidden=16)
    truth = true_coupling(model)

    def coupled(how):
        context = tiny_context(model, autocast=True)
        # What the project never does: differences of rounded gradients.
        context.oracle.full_precision = lambda: torch.autocast("cpu", torch.bfloat16)
        part = Coupling(1.0, hvp=how, epsilon=1e-3)
        with part.precision(context):
            g_a, _ = context.oracle.gradient(answer_cross_entropy, A, purpose="a")
            g_b, _ = context.oracle.gradient(answer_cross_entropy, B, purpose="b")
        context.space.give_gradient(None)
        part.add(context, A, g_a, B, g_b, {})
        found = context.space.gradient()
        return dot(found, truth) / norm(found) / norm(truth), norm(found) / norm(truth)

    cosine_exact, ratio_exact = coupled("exact")
    assert cosine_exact > 0.99
    assert 0.9 < ratio_exact < 1.1
    cosine_finite, ratio_finite = coupled("finite")
    assert cosine_finite < 0.9 or ratio_finite > 1.25


@pytest.mark.parametrize("at", ["point", "trajectory"])
def test_a_whole_step_under_autocast_is_near_that_in_float32(at):
    model = tiny_llama(dtype=torch.float32, hidden=64, layers=3)
    options = {"hvp": "auto", "coupling_at": at, "attack_learning_rate": (1e-3, 1e-3)}
    plain, _, _ = step_of(method_for(**options | {"hvp": "exact"}), model)
    found, _, context = step_of(method_for(**options), model, autocast=True)
    assert context.oracle.ledger["coupling"].backwards == 3
    assert dot(found, plain) / norm(found) / norm(plain) > 0.98
    assert norm(found) / norm(plain) == pytest.approx(1, abs=0.1)


# Shares of the terms -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["point", "trajectory"])
@pytest.mark.parametrize("size", [None, 1])
def test_the_shares_are_the_terms_gradients_and_change_nothing(space, at, size):
    model = tiny_model(space, layers=3)
    plain, _, _ = step_of(method_for(coupling_at=at), model, micro_batch_size=size)
    context = tiny_context(model, micro_batch_size=size)
    method = method_for(coupling_at=at)
    method.prepare(context)
    context.shares = {}
    method.step(context)
    assert all(torch.equal(a, b) for a, b in zip(context.space.gradient(), plain, strict=True))
    parts = context.shares
    assert set(parts) == {"coupling", "unlearning", "refusal"}
    refusal = gradient_of(model, mean_loss(model, R))
    assert relative_error(parts["refusal"], refusal) < 1e-9
    pull = gradient_of(model, unlearning_loss(model, {}))
    assert relative_error(parts["unlearning"], pull) < 1e-9
    if at == "point":
        expected = [0.7 * tensor for tensor in true_coupling(model)]
        assert relative_error(parts["coupling"], expected) < 1e-8
    whole = [sum(tensors) for tensors in zip(*parts.values(), strict=True)]
    assert relative_error(whole, plain) < 1e-12
    found = context.take_shares()
    assert found["norm_refusal"] == pytest.approx(norm(refusal))
    assert found["cos_refusal"] == pytest.approx(dot(refusal, plain) / norm(refusal) / norm(plain))
    assert context.shares is None
