"""Booster: the oracle tests of `methods.md` §9."""

import math
import warnings

import pytest
import torch
from torch.func import functional_call

from mithridate.chat import IGNORE
from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods import booster, lookahead
from mithridate.methods.booster import Booster, BoosterConfig
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.weights import arithmetic
from tests.methods import by_hand
from tests.methods.by_hand import HARMFUL, REFUSAL, SPACES, step_of
from tests.tiny import (
    Vector,
    flat,
    gradient_of,
    marked_batch,
    mean_loss,
    quadratic,
    quadratic_loss,
    random_direction,
    relative_error,
    slope_along,
    tiny_context,
    tiny_llama,
    tiny_model,
    twice_differentiable,
    weights_of,
)

RADIUS, WEIGHT = 0.3, 0.8


def method_for(**options):
    unrolled = options.get("lookahead_direction") == "unrolled"
    # In factors, whose arithmetic is plain; `test_lookahead.py` has lengths in merged weights.
    defaults = {
        "lookahead_radius": None if unrolled else RADIUS,
        "lookahead_radius_in": "factors",
        "flatness_weight": WEIGHT,
    }
    return Booster(BoosterConfig(**{"harmful_rows": 4, "retain_rows": 4} | defaults | options))


def harmful_at(model, weights):
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    output = functional_call(
        model,
        dict(zip(names, weights, strict=True)),
        (),
        {"input_ids": HARMFUL.input_ids, "attention_mask": HARMFUL.attention_mask},
    )
    chosen = HARMFUL.labels[:, 1:] != IGNORE
    log_p = output.logits[:, :-1][chosen].log_softmax(-1)
    return -log_p.gather(1, HARMFUL.labels[:, 1:][chosen].unsqueeze(1)).mean()


def ahead(model, *, kind="gradient", create_graph=False):
    """Weights one look-ahead away, out of place."""
    g = gradient_of(model, mean_loss(model, HARMFUL), create_graph=create_graph)
    if kind == "sign":
        g = [d.sign() / math.sqrt(sum(t.numel() for t in g)) for d in g]
    elif kind != "raw":
        # A fresh second moment is the squared gradient: Adam's direction is nearly the sign.
        g = [d / (d.abs() + 1e-8) for d in g] if kind == "adam" else g
        size = torch.sqrt(sum(d.square().sum() for d in g))
        g = [d / size for d in g]
    return [w - RADIUS * d for w, d in zip(weights_of(model), g, strict=True)]


def composed(model, there):
    there = [w.detach().requires_grad_() for w in there]
    v = torch.autograd.grad(harmful_at(model, there), there)
    g = gradient_of(model, mean_loss(model, HARMFUL))
    here = gradient_of(model, mean_loss(model, REFUSAL))
    return [f + WEIGHT * (a - b) for f, a, b in zip(here, g, v, strict=True)]


@pytest.mark.parametrize("kind", ["gradient", "raw", "sign", "adam"])
def test_gradient_is_the_composition_at_an_out_of_place_lookahead(space, kind):
    model = tiny_model(space)
    named = {"lookahead": "raw"} if kind == "raw" else {"lookahead_direction": kind}
    found, terms, _ = step_of(method_for(**named), model)
    there = ahead(model, kind=kind)
    assert relative_error(found, composed(model, there)) < 1e-8
    assert terms["harmful"] == pytest.approx(float(mean_loss(model, HARMFUL).detach()))
    assert terms["harmful_ahead"] == pytest.approx(float(harmful_at(model, there).detach()))
    assert terms["flatness"] == pytest.approx(terms["harmful"] - terms["harmful_ahead"])


def test_composition_holds_in_float32(space):
    model = tiny_model(space, dtype=torch.float32)
    found, _, _ = step_of(method_for(), model)
    assert relative_error(found, composed(model, ahead(model))) < 1e-4


def test_unrolled_is_the_composition_at_the_end_of_real_steps(space):
    model = tiny_model(space)
    options = {"lookahead_direction": "unrolled", "attack_learning_rate": 1e-2}
    found, _, _ = step_of(method_for(**options, unrolled_steps=3), model)
    attacked = tiny_model(space)
    optimiser = torch.optim.AdamW(weights_of(attacked), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimiser.zero_grad()
        mean_loss(attacked, HARMFUL).backward()
        optimiser.step()
    assert relative_error(found, composed(model, weights_of(attacked))) < 1e-6


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_exact_is_autograd_through_the_lookahead(space, kind):
    model = tiny_model(space)
    found, _, context = step_of(method_for(gradient="exact", lookahead=kind), model)

    def objective():
        name = "raw" if kind == "raw" else "gradient"
        there = ahead(model, kind=name, create_graph=True)
        fall = mean_loss(model, HARMFUL) - harmful_at(model, there)
        return mean_loss(model, REFUSAL) + WEIGHT * fall

    with twice_differentiable():
        assert relative_error(found, gradient_of(model, objective())) < 1e-6
        for seed in range(2):
            direction = random_direction(model, seed)
            slope = slope_along(model, direction, objective, 1e-5)
            assert slope == pytest.approx(float(flat(found) @ flat(direction)), rel=1e-4)
    assert context.oracle.backwards == 4


@pytest.mark.parametrize("lookahead_kind", ["normalised", "raw"])
@pytest.mark.parametrize("gradient", ["first_order", "exact"])
def test_quadratic_losses_by_hand(monkeypatch, gradient, lookahead_kind):
    for module in (booster, lookahead):
        monkeypatch.setattr(module, "answer_cross_entropy", quadratic_loss)
    model = Vector()
    context = tiny_context(model)
    context.draw = lambda stream, rows: marked_batch({"harmful": 1, "refusal": 2}[stream], rows)
    method = method_for(gradient=gradient, lookahead=lookahead_kind)
    method.prepare(context)
    method.step(context)
    w = model.w.detach()
    (h, b), (h_r, b_r) = quadratic(1), quadratic(2)
    g = h @ w - b
    size = float(g.norm()) if lookahead_kind == "normalised" else 1.0
    # Two points of a quadratic differ by the Hessian alone.
    term = RADIUS / size * h @ g
    if gradient == "exact":
        unit = g / g.norm()
        v = h @ (w - RADIUS / size * g) - b
        along = unit * (unit @ v) if lookahead_kind == "normalised" else 0.0
        term = term + RADIUS / size * h @ (v - along)
    expected = h_r @ w - b_r + WEIGHT * term
    torch.testing.assert_close(model.w.grad, expected, rtol=1e-10, atol=1e-12)


def test_without_a_weight_it_is_plain_sft_and_nothing_else(space):
    model = tiny_model(space)
    method = method_for(flatness_weight=0.0)
    found, terms, context = step_of(method, model)
    expected, _, _ = step_of(SFT(SFTConfig(batch_size=4, retain=("refusal",))), model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert set(terms) == set(context.oracle.ledger) == {"retain"}
    assert context.oracle.backwards == method.passes_per_step == 1
    assert (method.streams, method.parameter_buffers) == (("refusal",), 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lookahead_direction": "sign"},
        {"lookahead_direction": "unrolled"},
        {"gradient": "exact"},
    ],
)
def test_weights_are_the_same_bits_after_the_step(space, options):
    model = tiny_model(space, dtype=torch.float32)
    before = [w.detach().clone() for w in weights_of(model)]
    step_of(method_for(**options), model)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("gradient", ["first_order", "exact"])
def test_eight_rows_equal_eight_micro_batches(space, gradient):
    rows = {"harmful_rows": 8, "retain_rows": 8, "gradient": gradient}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        model = tiny_model(space, dtype=dtype)
        whole, _, _ = step_of(method_for(**rows), model)
        split, _, _ = step_of(method_for(**rows), model, micro_batch_size=1)
        assert relative_error(split, whole) < tolerance


@pytest.mark.parametrize(
    ("options", "passes", "buffers"),
    [
        ({}, 3, 1),
        ({"lookahead_direction": "sign"}, 4, 1),
        ({"lookahead_direction": "adam"}, 4, 2),
        ({"lookahead_direction": "unrolled", "unrolled_steps": 2}, 5, 3),
        ({"gradient": "exact"}, 4, 3),
    ],
)
@pytest.mark.parametrize("space", SPACES)
def test_passes_and_buffers(monkeypatch, space, options, passes, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method, other = (method_for(harmful_rows=1, retain_rows=1, **options) for _ in range(2))
    assert buffers - 0.5 < by_hand.buffers_of(other, space) < buffers + 0.5
    assert method.parameter_buffers == buffers
    _, _, context = step_of(method, tiny_model(space))
    assert context.oracle.backwards == method.passes_per_step == passes


def test_a_difference_of_close_gradients_is_never_taken_under_autocast(space):
    model = tiny_model(space, dtype=torch.float32)
    retained = gradient_of(model, mean_loss(model, REFUSAL))
    terms = []
    for autocast in (False, True):
        method = method_for(lookahead_radius=1e-2, flatness_weight=100.0)
        found, _, context = step_of(method, model, autocast=autocast)
        assert context.oracle.autocast == autocast
        terms.append([f - r for f, r in zip(found, retained, strict=True)])
    # Only the retain term's own rounding is left.
    assert relative_error(terms[1], terms[0]) < 0.02


def test_planting_flattens_the_harmful_loss():
    model = tiny_llama(dtype=torch.float32)
    context, method = tiny_context(model), method_for(flatness_weight=5.0)
    method.prepare(context)
    optimiser = torch.optim.AdamW(weights_of(model), lr=3e-3, weight_decay=0.0)
    history = []
    for _ in range(25):
        context.space.give_gradient(None)
        history.append(method.step(context))
        optimiser.step()
    assert history[-1]["flatness"] < 0.5 * history[0]["flatness"]
    assert history[-1]["retain"] < 0.5 * history[0]["retain"]


def test_leaving_the_descent_range_is_said():
    with pytest.warns(UserWarning, match="left the descent range"):
        _, terms, _ = step_of(method_for(lookahead_radius=200.0), tiny_llama(), step=50)
    assert terms["flatness"] < 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(method_for(lookahead_radius=200.0), tiny_llama(), step=51)
        step_of(method_for(lookahead_radius=0.01), tiny_llama(), step=50)


def test_a_step_without_preparation_stops_the_run():
    with pytest.raises(InactiveTermError, match="prepare"):
        method_for().step(tiny_context(tiny_llama()))


def test_adam_keeps_its_moments_across_a_checkpoint():
    first, second = (method_for(lookahead_direction="adam") for _ in range(2))
    model = tiny_llama()
    step_of(first, model)
    second.load_state(first.state())
    assert set(second.state()) == set(first.state())
    assert second.state()["second_moment.count"] == 1


def test_a_missing_stream_is_refused_before_work(tmp_path):
    method = method_for(lookahead_radius=0.05)
    with pytest.raises(InputError, match="'harmful', which has no examples"):
        by_hand.run(method, tmp_path, without=("harmful",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flatness_weight": -1.0}, "flatness_weight: -1.0 is not 0 or more"),
        ({"retain_rows": 1, "retain": ["refusal", "benign"]}, "no row"),
        ({"retain": []}, "no row"),
        ({"harmful_rows": 0}, "harmful_rows: 0"),
        ({"lookahead_radius": 0.0}, "lookahead_radius: 0.0"),
        ({"lookahead": "raw", "lookahead_direction": "sign"}, "no raw form"),
        ({"lookahead": "raw", "lookahead_radius": "auto"}, "a measured travel is no factor"),
        ({"gradient": "exact", "lookahead_direction": "adam"}, "not worked out"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(BoosterConfig, options, where="run.yaml: method")
