"""Vaccine: the oracle tests of `methods.md` §7."""

import math

import pytest
import torch

from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods import sites
from mithridate.methods.base import join
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.methods.sites import sites_of
from mithridate.methods.vaccine import Vaccine, VaccineConfig, worst_drift
from mithridate.weights import GradientOracle, arithmetic
from tests.methods import by_hand
from tests.methods.by_hand import SPACES, step_of
from tests.tiny import (
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_llama,
    tiny_model,
)

SCOPES = {"batch": 0, "sequence": 1, "token": 2}


def method_for(**options):
    return Vaccine(VaccineConfig(**{"batch_size": 4, "radius": 0.5} | options))


def alignment(rows=4):
    return join([tiny_batch(rows // 2, seed=seed) for seed in (2, 3)])


def drift_by_hand(model, batch, radius, *, site="attention", scope="batch"):
    still = by_hand.still(model, batch)
    g = torch.stack(torch.autograd.grad(by_hand.loss(model, batch, **{site: still}), still))
    if scope == "batch":
        size = g.norm()
    elif scope == "sequence":
        size = g.square().sum(dim=(0, 2, 3), keepdim=True).sqrt()
    else:
        size = g.square().sum(dim=(0, 3), keepdim=True).sqrt()
    return torch.where(size > 0, radius * g / size, torch.zeros_like(g))


@pytest.mark.parametrize("site", ["attention", "block"])
@pytest.mark.parametrize("scope", SCOPES)
def test_update_is_that_of_a_forward_pass_with_a_constant_drift(space, site, scope):
    model, batch = tiny_model(space), alignment()
    found, terms, _ = step_of(method_for(site=site, radius_scope=scope), model)
    drift = drift_by_hand(model, batch, 0.5, site=site, scope=scope)
    loss = by_hand.loss(model, batch, **{site: drift})
    assert relative_error(found, gradient_of(model, loss)) < 1e-8
    assert terms["drifted"] == pytest.approx(float(loss.detach()))
    assert terms["retain"] == pytest.approx(float(mean_loss(model, batch).detach()))
    assert terms["drifted"] > terms["retain"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_drift_has_length_rho_in_its_scope(space, scope, micro_batch_size):
    model, batch = tiny_model(space, dtype=torch.float32), alignment(8)
    oracle = GradientOracle(model, micro_batch_size=micro_batch_size)
    config = VaccineConfig(radius=0.7, radius_scope=scope)
    drifts, _ = worst_drift(oracle, sites_of(model, "attention"), batch, config)
    own = SCOPES[scope]
    lengths = [sum(e.flatten(own).square().sum(-1) for e in piece.values()) for piece in drifts]
    if scope == "batch":
        assert math.sqrt(sum(lengths)) == pytest.approx(0.7, rel=1e-5)
        return
    lengths = torch.cat([length.flatten() for length in lengths]).sqrt()
    drifting = lengths[lengths > 0]
    torch.testing.assert_close(drifting, torch.full_like(drifting, 0.7), rtol=1e-5, atol=0)
    # Nothing is predicted from the last token of a row, or from its padding.
    assert len(drifting) == (len(batch) if scope == "sequence" else predicting(batch))


def predicting(batch):
    places = (batch.labels[:, 1:] != -100).long()
    return int((places.shape[1] - places.flip(1).argmax(dim=1)).sum())


def test_the_loss_rises_by_rho_times_the_norm(space):
    model = tiny_model(space)
    _, terms, _ = step_of(method_for(radius=1e-3), model)
    rise = terms["drifted"] - terms["retain"]
    assert rise / (1e-3 * terms["site_norm"]) == pytest.approx(1, abs=1e-2)


def test_without_a_radius_it_is_plain_sft(space):
    model = tiny_model(space)
    method = method_for(radius=0.0)
    found, terms, context = step_of(method, model)
    expected, _, _ = step_of(SFT(SFTConfig(batch_size=4, retain=("refusal", "benign"))), model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert set(terms) == set(context.oracle.ledger) == {"retain"}
    assert context.oracle.backwards == method.passes_per_step == 1


def test_hooks_do_not_pile_up(monkeypatch, space):
    model = tiny_model(space, dtype=torch.float32)
    before = by_hand.hooks(model)
    for step in range(10):
        step_of(method_for(), model, step=step)
    assert by_hand.hooks(model) == before
    monkeypatch.setattr(sites, "answer_cross_entropy", lambda model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_of(method_for(), model)
    assert by_hand.hooks(model) == before


@pytest.mark.parametrize("scope", SCOPES)
def test_eight_rows_equal_eight_micro_batches(space, scope):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = tiny_model(space, dtype=dtype)
        method = method_for(batch_size=8, radius_scope=scope)
        whole, terms, _ = step_of(method, model)
        split, again, _ = step_of(method, model, micro_batch_size=1)
        assert relative_error(split, whole) < tolerance
        assert again == pytest.approx(terms, rel=10 * tolerance)


@pytest.mark.parametrize("site", ["attention", "block"])
def test_checkpointed_activations_change_nothing(space, site):
    model = tiny_model(space)
    expected, _, _ = step_of(method_for(site=site), model, micro_batch_size=2)
    model.gradient_checkpointing_enable()
    model.train()
    found, _, _ = step_of(method_for(site=site), model, micro_batch_size=2)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_two_passes_and_no_buffer(monkeypatch, space):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = method_for(batch_size=1, retain=("refusal",))
    assert -0.2 < by_hand.buffers_of(method, space) < 0.2
    assert method.parameter_buffers == 0
    _, _, context = step_of(method, tiny_model(space))
    ledger = context.oracle.ledger
    assert context.oracle.backwards == method.passes_per_step == 2
    assert {name: count.forwards for name, count in ledger.items()} == {
        "perturbation": 1,
        "update": 1,
    }


def test_the_first_pass_leaves_the_weights_without_a_gradient(space):
    model = tiny_model(space)
    oracle, config = GradientOracle(model), VaccineConfig()
    worst_drift(oracle, sites_of(model, "attention"), alignment(), config)
    assert all(w.grad is None for w in oracle.space.tensors)


def test_a_loss_that_no_site_moves_stops_the_run(monkeypatch):
    monkeypatch.setattr(
        sites, "answer_cross_entropy", lambda model, batch: 0 * mean_loss(model, batch)
    )
    with pytest.raises(InactiveTermError, match="no site has a gradient"):
        step_of(method_for(), tiny_llama())


def test_autocast_still_drifts_by_rho():
    model = tiny_llama(dtype=torch.float32)
    oracle = GradientOracle(model, autocast=True)
    drifts, _ = worst_drift(oracle, sites_of(model, "attention"), alignment(), VaccineConfig())
    assert all(e.dtype == torch.float32 for e in drifts[0].values())
    size = math.sqrt(sum(float(e.square().sum()) for e in drifts[0].values()))
    assert size == pytest.approx(2.0, rel=1e-5)
    rough, terms, _ = step_of(method_for(), model, autocast=True)
    true, _, _ = step_of(method_for(), model)
    assert terms["drifted"] > terms["retain"]
    assert relative_error(rough, true) < 0.1


def test_training_lowers_the_loss_under_drift():
    model = tiny_llama(dtype=torch.float32)
    context, method = tiny_context(model), method_for()
    optimiser = torch.optim.AdamW(context.space.tensors, lr=3e-3)
    history = []
    for _ in range(15):
        context.space.give_gradient(None)
        history.append(method.step(context)["drifted"])
        optimiser.step()
    assert history[-1] < 0.5 * history[0]


def test_a_missing_stream_is_refused_before_work(tmp_path):
    with pytest.raises(InputError, match="'benign', which has no examples"):
        by_hand.run(method_for(), tmp_path, without=("benign",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "no row"),
        ({"retain": []}, "no row"),
        ({"radius": -1.0}, "radius: -1.0"),
        ({"radius": float("inf")}, "radius: inf"),
        ({"radius_scope": "layer"}, "radius_scope"),
        ({"site": "mlp"}, "site"),
        ({"rho": 2.0}, "unknown key 'rho'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(VaccineConfig, options, where="run.yaml: method")
