"""CTRAP: the oracle tests of `methods.md` §4."""

import math
import warnings

import pytest
import torch
from torch.func import functional_call

from mithridate.chat import IGNORE
from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.examples import Example
from mithridate.methods import ctrap, lookahead
from mithridate.methods.base import join
from mithridate.methods.booster import BoosterConfig
from mithridate.methods.ctrap import CTRAP, CTRAPConfig, collapse_token
from mithridate.methods.lookahead import LookAhead
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.methods.trajectory import Trajectory, TrajectoryConfig
from mithridate.weights import arithmetic, norm
from tests.tiny import (
    SPECIALS,
    VOCABULARY,
    WORDS,
    MemoryWatch,
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
    tiny_batch,
    tiny_context,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
    twice_differentiable,
    weights_of,
)

RADIUS, WEIGHT = 0.3, 0.4
ROWS = {"harmful_rows": 4, "retain_rows": 4, "collapse_rows": 3}
ERROR = len(SPECIALS) + WORDS.index("error")


def method_for(**options):
    # In factors, whose arithmetic is plain; `test_lookahead.py` has lengths in merged weights.
    defaults = {
        "lookahead_radius": RADIUS,
        "lookahead_radius_in": "factors",
        "collapse_weight": WEIGHT,
    }
    return CTRAP(CTRAPConfig(**ROWS | defaults | options))


def step_of(method, model, **options):
    context = tiny_context(model, **options)
    context.space.give_gradient(None)
    method.prepare(context)
    context.oracle.ledger.clear()
    terms = method.step(context)
    return [tensor.clone() for tensor in context.space.gradient()], terms, context


def batches(rows=ROWS):
    retain = join([tiny_batch(rows["retain_rows"] // 2, seed=seed) for seed in (2, 4)])
    return (
        tiny_batch(rows["harmful_rows"], seed=1),
        tiny_batch(rows["collapse_rows"], seed=4),
        retain,
    )


def collapse_at(model, weights, batch, target="token"):
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    output = functional_call(
        model,
        dict(zip(names, weights, strict=True)),
        (),
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
    )
    log_p = output.logits[:, :-1][batch.labels[:, 1:] != IGNORE].log_softmax(-1)
    if target == "uniform":
        return (-log_p.mean(-1) - math.log(log_p.shape[-1])).mean()
    return -log_p[:, ERROR].mean()


def ahead(model, batch, *, raw=False, create_graph=False):
    g = gradient_of(model, mean_loss(model, batch), create_graph=create_graph)
    size = 1.0 if raw else torch.sqrt(sum(tensor.square().sum() for tensor in g))
    return [w - RADIUS / size * d for w, d in zip(weights_of(model), g, strict=True)]


@pytest.mark.parametrize("target", ["token", "uniform"])
@pytest.mark.parametrize("on", ["general", "retain"])
def test_gradient_is_the_composition_at_an_out_of_place_lookahead(space, target, on):
    model = tiny_model(space)
    found, terms, _ = step_of(method_for(collapse_target=target, collapse_on=on), model)
    harmful, general, retain = batches()
    there = [w.detach().requires_grad_() for w in ahead(model, harmful)]
    collapse = collapse_at(model, there, general if on == "general" else retain, target)
    v = torch.autograd.grad(collapse, there)
    here = gradient_of(model, mean_loss(model, retain))
    expected = [r + WEIGHT * c for r, c in zip(here, v, strict=True)]
    assert relative_error(found, expected) < 1e-8
    assert terms["collapse"] == pytest.approx(float(collapse.detach()))
    assert terms["radius"] == RADIUS


def test_composition_holds_in_float32(space):
    model = tiny_model(space, dtype=torch.float32)
    found, _, _ = step_of(method_for(), model)
    harmful, general, retain = batches()
    there = [w.detach().requires_grad_() for w in ahead(model, harmful)]
    v = torch.autograd.grad(collapse_at(model, there, general), there)
    here = gradient_of(model, mean_loss(model, retain))
    assert relative_error(found, [r + WEIGHT * c for r, c in zip(here, v, strict=True)]) < 1e-4


@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_exact_is_autograd_through_the_lookahead(space, kind):
    model = tiny_model(space)
    found, _, context = step_of(method_for(gradient="exact", lookahead=kind), model)
    harmful, general, retain = batches()

    def objective():
        there = ahead(model, harmful, raw=kind == "raw", create_graph=True)
        return mean_loss(model, retain) + WEIGHT * collapse_at(model, there, general)

    with twice_differentiable():
        assert relative_error(found, gradient_of(model, objective())) < 1e-6
        for seed in range(3):
            direction = random_direction(model, seed)
            slope = slope_along(model, direction, objective, 1e-5)
            assert slope == pytest.approx(float(flat(found) @ flat(direction)), rel=1e-4)
    assert context.oracle.backwards == 4


@pytest.mark.parametrize(
    ("gradient", "kind"),
    [("first_order", "normalised"), ("exact", "normalised"), ("exact", "raw")],
)
def test_quadratic_losses_by_hand(monkeypatch, gradient, kind):
    for module in (ctrap, lookahead):
        monkeypatch.setattr(module, "answer_cross_entropy", quadratic_loss)
    monkeypatch.setattr(ctrap, "token_collapse", lambda token: quadratic_loss)
    model = Vector()
    context = tiny_context(model)
    marks = {"harmful": 1, "refusal": 2, "general": 4}
    context.draw = lambda stream, rows: marked_batch(marks[stream], rows)
    method = method_for(gradient=gradient, lookahead=kind, collapse_token=7, retain=("refusal",))
    method.prepare(context)
    method.step(context)
    w = model.w.detach()
    (a, b), (a_r, b_r), (a_c, b_c) = (quadratic(mark) for mark in (1, 2, 4))
    g = a @ w - b
    size = float(g.norm()) if kind == "normalised" else 1.0
    unit = g / size
    v = a_c @ (w - RADIUS * unit) - b_c
    if gradient == "exact":
        along = unit * (unit @ v) if kind == "normalised" else 0.0
        v = v - RADIUS / size * a @ (v - along)
    expected = a_r @ w - b_r + WEIGHT * v
    torch.testing.assert_close(model.w.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", ["gradient", "sign", "adam", "random"])
def test_the_lookahead_is_one_radius_away_and_leaves_the_weights_alone(space, direction):
    model = tiny_model(space)
    context, terms = tiny_context(model), {}
    look = LookAhead(direction=direction, radius=0.7, radius_in="factors")
    look.prepare(context)
    before = [w.detach().clone() for w in weights_of(model)]
    with look.shifted(context, terms):
        assert context.space.travel(before) == pytest.approx(0.7, rel=1e-6)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


def test_raw_is_normalised_at_alpha_times_the_norm(space):
    model = tiny_model(space)
    raw, terms, _ = step_of(method_for(lookahead="raw", lookahead_radius=0.05), model)
    assert terms["radius"] == pytest.approx(0.05 * terms["harmful_norm"], rel=1e-9)
    same, _, _ = step_of(method_for(lookahead_radius=terms["radius"]), model)
    assert relative_error(same, raw) < 1e-9


@pytest.mark.parametrize(
    "options",
    [{}, {"lookahead_direction": "unrolled", "lookahead_radius": None}, {"gradient": "exact"}],
)
def test_weights_are_the_same_bits_after_the_step(space, options):
    model = tiny_model(space, dtype=torch.float32)
    before = [w.detach().clone() for w in weights_of(model)]
    step_of(method_for(**options), model)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))


def test_without_collapse_weight_it_is_retain_sft_and_nothing_else(space):
    model = tiny_model(space)
    method = method_for(collapse_weight=0.0)
    found, terms, context = step_of(method, model)
    expected_context = tiny_context(model)
    expected_context.space.give_gradient(None)
    SFT(SFTConfig(batch_size=4, retain=("refusal", "general"))).step(expected_context)
    for a, b in zip(found, expected_context.space.gradient(), strict=True):
        assert torch.equal(a, b)
    assert set(context.oracle.ledger) == set(terms) == {"retain"}
    assert method.passes_per_step == 1
    assert method.streams == ("refusal", "general")


def test_the_sign_lookahead_is_one_step_of_a_fresh_adamw(space):
    model = tiny_model(space)
    context, rate = tiny_context(model), 1e-3
    look = LookAhead(
        direction="sign",
        radius=rate * math.sqrt(context.space.count),
        radius_in="factors",
        rows=4,
    )
    look.prepare(context)
    before = [w.detach().clone() for w in weights_of(model)]
    with look.shifted(context, {}):
        moved = [w.detach() - b for w, b in zip(weights_of(model), before, strict=True)]
    context.space.give_gradient(None)
    context.space.give_gradient(gradient_of(model, mean_loss(model, tiny_batch(4, seed=1))))
    torch.optim.AdamW(weights_of(model), lr=rate, weight_decay=0.0, eps=1e-12).step()
    stepped = [w.detach() - b for w, b in zip(weights_of(model), before, strict=True)]
    assert torch.cosine_similarity(flat(moved), flat(stepped), dim=0) > 1 - 1e-6
    assert norm(moved) == pytest.approx(norm(stepped), rel=1e-3)


def test_a_random_direction_is_another_each_step_and_owes_the_gradient_nothing(space):
    model = tiny_model(space)
    context = tiny_context(model)
    g = gradient_of(model, mean_loss(model, tiny_batch(4, seed=1)))
    seen = []
    for step in (0, 0, 1):
        context.step = step
        look = LookAhead(direction="random", radius=0.7, rows=4)
        look.prepare(context)
        before = [w.detach().clone() for w in weights_of(model)]
        with look.shifted(context, {}):
            moved = [w.detach() - b for w, b in zip(weights_of(model), before, strict=True)]
        seen.append(flat(moved))
    assert torch.equal(seen[0], seen[1])
    bound = 5 / math.sqrt(context.space.count)  # five standard deviations of a random cosine
    assert abs(torch.cosine_similarity(seen[0], seen[2], dim=0)) < bound
    assert all(abs(torch.cosine_similarity(one, flat(g), dim=0)) < bound for one in seen)


def test_unrolled_is_torch_s_own_adamw(space):
    model = tiny_model(space)
    context, terms = tiny_context(model), {}
    before = [w.detach().clone() for w in weights_of(model)]
    look = LookAhead(direction="unrolled", learning_rate=1e-3, steps=3, rows=4)
    with look.shifted(context, terms):
        there = [w.detach().clone() for w in weights_of(model)]
        assert all(w.grad is None for w in weights_of(model))
    optimiser = torch.optim.AdamW(weights_of(model), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        context.space.give_gradient(gradient_of(model, mean_loss(model, tiny_batch(4, seed=1))))
        optimiser.step()
    assert relative_error(
        [w - b for w, b in zip(weights_of(model), before, strict=True)],
        [w - b for w, b in zip(there, before, strict=True)],
    ) < 1e-9  # fmt: skip
    assert terms["radius"] == pytest.approx(context.space.travel(before))


def test_adam_direction_keeps_a_bias_corrected_second_moment_across_a_checkpoint():
    model = tiny_llama()
    context = tiny_context(model)
    look = LookAhead(direction="adam", radius=0.5)
    look.prepare(context)
    g = gradient_of(model, mean_loss(model, tiny_batch(10, seed=1)))
    for _ in range(2):
        with look.shifted(context, {}):
            pass
    other = LookAhead(direction="adam", radius=0.5)
    other.prepare(context)
    other.load_state(look.state())
    before = [w.detach().clone() for w in weights_of(model)]
    with other.shifted(context, {}):
        moved = [w.detach() - b for w, b in zip(weights_of(model), before, strict=True)]
    # One gradient again and again has itself squared as corrected second moment.
    u = [-d / (d.abs() + 1e-8) for d in g]
    assert relative_error(moved, [0.5 * d / norm(u) for d in u]) < 1e-6
    assert other.state()["second_moment.count"] == 3


@pytest.mark.parametrize("gradient", ["first_order", "exact"])
def test_eight_rows_equal_eight_micro_batches(space, gradient):
    model = tiny_model(space)
    rows = {"harmful_rows": 8, "retain_rows": 8, "collapse_rows": 8}
    whole, _, _ = step_of(method_for(gradient=gradient, **rows), model)
    split, _, _ = step_of(method_for(gradient=gradient, **rows), model, micro_batch_size=1)
    assert relative_error(split, whole) < 1e-9


def test_exact_walks_the_harmful_batch_once(space):
    model = tiny_model(space)
    _, _, context = step_of(method_for(gradient="exact"), model)
    ledger = context.oracle.ledger
    assert (ledger["look-ahead"].forwards, ledger["exact"].forwards) == (1, 0)
    assert sum(count.walks for count in ledger.values()) == 5
    _, _, context = step_of(method_for(gradient="exact"), model, micro_batch_size=2)
    ledger = context.oracle.ledger
    assert (ledger["look-ahead"].forwards, ledger["exact"].forwards) == (2, 2)


@pytest.mark.parametrize(
    ("options", "passes", "buffers"),
    [
        ({}, 3, 1),
        ({"lookahead_direction": "sign"}, 3, 1),
        ({"lookahead_direction": "adam"}, 3, 2),
        (
            {
                "lookahead_direction": "unrolled",
                "lookahead_radius": None,
                "unrolled_steps": 4,
            },
            6,
            3,
        ),
        ({"gradient": "exact"}, 4, 3),
        ({"collapse_weight": 0.0}, 1, 0),
    ],
)
def test_passes_and_buffers(monkeypatch, options, passes, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    small = {"harmful_rows": 1, "retain_rows": 2, "collapse_rows": 1}
    method = method_for(**small | options)
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    method.prepare(context)
    context.oracle.ledger.clear()
    with MemoryWatch() as watch:
        method.step(context)
    assert context.oracle.backwards == method.passes_per_step == passes
    # The gradient itself is made inside, too.
    held = watch.peak / context.space.bytes - 1
    assert held < buffers + 0.6
    assert method.parameter_buffers == buffers
    assert held > buffers - 0.5


def test_a_range_of_radii_is_drawn_per_step_and_repeats(space):
    model = tiny_model(space)
    radii = []
    for step in (1, 2, 1):
        method = method_for(lookahead_radius={"low": 0.1, "high": 1.0})
        radii.append(step_of(method, model, step=step)[1]["radius"])
    assert radii[0] == radii[2] != radii[1]
    assert all(0.1 <= radius <= 1.0 for radius in radii)


def test_the_automatic_radius_is_the_travel_of_the_attack():
    model = tiny_llama()
    context = tiny_context(model)
    before = [w.detach().clone() for w in weights_of(model)]
    found = CTRAP(CTRAPConfig(attack_learning_rate=1e-4)).prepare(context)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))
    # One fresh AdamW step moves every weight by the learning rate.
    assert found["radius_low"] == pytest.approx(1e-4 * math.sqrt(context.space.count), rel=0.01)
    assert 3 < found["radius_high"] / found["radius_low"] <= 20
    assert context.oracle.ledger["radius"].backwards == 20


@pytest.mark.parametrize("kind", [CTRAPConfig, BoosterConfig])
def test_a_raw_look_ahead_never_takes_a_measured_radius(kind):
    for radius in (None, "auto"):
        with pytest.raises(InputError, match="give lookahead_radius a number"):
            kind(lookahead="raw", lookahead_radius=radius)


def test_leaving_the_descent_range_is_said():
    method = method_for(lookahead_radius=200.0)
    with pytest.warns(UserWarning, match="left the descent range"):
        _, terms, _ = step_of(method, tiny_llama(), step=50)
    assert terms["harmful_ahead"] > terms["harmful"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, terms, context = step_of(method_for(lookahead_radius=0.01), tiny_llama(), step=100)
    assert 0 <= terms["p_e"] <= 1
    assert 0 <= terms["p_e_ahead"] <= 1
    assert context.oracle.ledger["watch"].backwards == 0


def test_planting_lowers_the_collapse_loss_at_the_lookahead_only():
    model = tiny_llama(seed=4)
    context = tiny_context(model)
    method = method_for(collapse_weight=1.0, lookahead_radius=2.0)
    method.prepare(context)
    optimiser = torch.optim.AdamW(weights_of(model), lr=1e-2, weight_decay=0.0)
    history = []
    for _ in range(25):
        history.append(method.step(context))
        optimiser.step()
    assert history[-1]["collapse"] < 0.5 * history[0]["collapse"]
    assert history[-1]["retain"] < history[0]["retain"]


def test_the_collapse_token_rule():
    context = tiny_context(tiny_llama())
    assert collapse_token(context) == ERROR
    context.examples["general"].append(Example(prompt="w1", answer="error w3"))
    with pytest.raises(InputError, match=r"^collapse_token: .* is \d+\.\d\d% of the answers"):
        collapse_token(context)
    assert collapse_token(context, rare=False) == ERROR
    assert CTRAP(CTRAPConfig(collapse_token=9, lookahead_radius=1.0)).prepare(context) == {
        "collapse_token": 9.0,
        "radius_low": 1.0,
        "radius_high": 1.0,
    }


def test_a_special_last_piece_asks_for_a_token():
    context = tiny_context(tiny_llama())
    # A tokenizer without the word gives the unknown token, which is special.
    context.chat.tokenizer = tiny_tokenizer(WORDS[:-1])
    with pytest.raises(InputError, match=r"^collapse_token: .* is a special token"):
        collapse_token(context)


def test_released_sets_everything_and_warns():
    with pytest.warns(UserWarning, match="reproduction only: it replaces collapse_weight 5.0$"):
        method = CTRAP(CTRAPConfig(variant="released", collapse_weight=5.0))
    with pytest.warns(UserWarning, match="reproduction only$"):
        CTRAP(CTRAPConfig(variant="released", lookahead_radius=0.1))
    assert method.config.collapse_on == "retain"
    assert method.config.collapse_weight == 0.1
    assert method.streams == ("harmful", "refusal", "general")


@pytest.mark.parametrize(
    "method",
    [
        method_for(collapse_token=VOCABULARY),
        Trajectory(TrajectoryConfig(collapse_target="token", collapse_token=VOCABULARY)),
    ],
)
def test_a_token_that_the_model_has_not_is_refused_before_work(method):
    method.check(None)
    with pytest.raises(InputError, match=f"no token {VOCABULARY} in a vocabulary of {VOCABULARY}"):
        method.check(tiny_llama())


def test_a_zero_harmful_gradient_stops_the_run(monkeypatch):
    monkeypatch.setattr(
        lookahead, "answer_cross_entropy", lambda model, batch: 0 * mean_loss(model, batch)
    )
    with pytest.raises(InactiveTermError, match="harmful gradient is zero"):
        step_of(method_for(), tiny_llama())


def test_a_step_without_preparation_stops_the_run():
    with pytest.raises(InactiveTermError, match="prepare"):
        method_for().step(tiny_context(tiny_llama()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collapse_weight": -1.0}, "collapse_weight: -1.0"),
        ({"retain_rows": 1}, "no row"),
        ({"lookahead_radius": 0.0}, "lookahead_radius: 0.0"),
        ({"lookahead_radius": {"low": 2.0, "high": 1.0}}, "0 < low <= high"),
        ({"lookahead_radius": {"low": 2.0}}, "0 < low <= high"),
        ({"lookahead": "raw", "lookahead_direction": "sign"}, "no raw form"),
        ({"lookahead": "raw", "lookahead_radius": "auto"}, "a measured travel is no factor"),
        ({"collapse_target": "uniform", "collapse_token": 9}, "goes with collapse_target: token"),
        ({"gradient": "exact", "lookahead_direction": "adam"}, "not worked out"),
        ({"lookahead_direction": "sideways"}, "lookahead_direction"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(CTRAPConfig, options, where="run.yaml: method")


# The precision of the passes at the look-ahead (F2) ----------------------------------------------


def test_shifted_passes_are_in_float32_unless_autocast_is_asked_for(monkeypatch):
    model = tiny_llama(dtype=torch.float32, hidden=64)
    seen = []
    collapse = ctrap.token_collapse

    def noting(token):
        def loss(network, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return collapse(token)(network, batch)

        return loss

    monkeypatch.setattr(ctrap, "token_collapse", noting)
    options = {"lookahead_direction": "sign", "lookahead_radius": 3.0}
    true, _, _ = step_of(method_for(**options), model, autocast=True)
    assert seen == [False]
    seen.clear()
    method = method_for(**options, shifted_precision="autocast")
    context = tiny_context(model, autocast=True)
    found = method.prepare(context)
    assert seen == [False, True]
    assert found["autocast_change"] == pytest.approx(1, abs=0.1)
    assert found["autocast_cosine"] >= 0.99
    assert all(w.grad is None for w in weights_of(model))
    method.step(context)
    assert seen == [False, True, True]
    rounded = context.space.gradient()
    assert 1e-5 < relative_error(rounded, true) < 0.1


@pytest.mark.parametrize("direction", ["gradient", "sign", "adam", "unrolled"])
def test_a_look_ahead_that_autocast_cannot_see_is_refused(direction):
    """bfloat16 keeps eight bits: a shift far below a weight's size vanishes or doubles."""
    model = tiny_llama(dtype=torch.float32, hidden=64)
    before = [w.detach().clone() for w in weights_of(model)]
    method = method_for(
        shifted_precision="autocast",
        lookahead_direction=direction,
        lookahead_radius=None if direction == "unrolled" else {"low": 1e-3, "high": 5.0},
        attack_learning_rate=1e-7,
    )
    context = tiny_context(model, autocast=True)
    with pytest.raises(InputError, match="rounds the look-ahead away"):
        method.prepare(context)
    assert all(torch.equal(w, b) for w, b in zip(weights_of(model), before, strict=True))
    assert method.state()["second_moment.count"] == 0


def test_autocast_of_shifted_passes_needs_the_run_s():
    method = method_for(shifted_precision="autocast")
    with pytest.raises(InputError, match=r"training\.autocast"):
        method.prepare(tiny_context(tiny_llama()))


def test_a_radius_for_an_unrolled_look_ahead_is_refused():
    with pytest.raises(InputError, match="has no radius"):
        CTRAPConfig(lookahead_direction="unrolled", lookahead_radius=0.1)
