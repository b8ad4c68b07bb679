"""T-Vaccine: the oracle tests of `methods.md` §8."""

import itertools
import random
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare

from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods import sites
from mithridate.methods.base import join
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.methods.tvaccine import TVaccine, TVaccineConfig, draw_layers
from mithridate.methods.vaccine import Vaccine, VaccineConfig
from mithridate.weights import arithmetic
from mithridate.weights.maps import blocks_of
from tests.methods import by_hand
from tests.methods.by_hand import HARMFUL, SPACES, step_of
from tests.tiny import (
    LORA,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_context,
    tiny_llama,
    tiny_model,
)


def method_for(**options):
    return TVaccine(TVaccineConfig(**{"batch_size": 4, "radius": 0.5, "layers": 2} | options))


def in_layers(model, drawn):
    """For each trainable weight, whether it belongs to a drawn layer."""
    chosen = {id(w) for index in drawn for w in blocks_of(model)[index].parameters()}
    return [id(w) in chosen for w in model.parameters() if w.requires_grad]


def drawn_in(method):
    return method.state()["drawn"].tolist()


@pytest.mark.parametrize("site", ["attention", "block"])
def test_only_drawn_layers_drift_and_train(space, site):
    model = tiny_model(space, layers=4)
    method = method_for(site=site)
    found, terms, _ = step_of(method, model)
    drawn = drawn_in(method)
    assert len(drawn) == 2
    batch = join([tiny_batch(2, seed=seed) for seed in (2, 3)])
    still = by_hand.still(model, batch)
    g = torch.autograd.grad(
        by_hand.loss(model, batch, **{site: still}), [still[index] for index in drawn]
    )
    size = torch.stack(g).norm()
    drift = [torch.zeros_like(one) for one in g for _ in range(2)]
    for index, one in zip(drawn, g, strict=True):
        drift[index] = 0.5 * one / size
    expected = gradient_of(model, by_hand.loss(model, batch, **{site: drift}))
    inside = in_layers(model, drawn)
    assert any(inside)
    assert not all(inside)
    for gradient, belongs in zip(found, inside, strict=True):
        assert (gradient is not None) == belongs
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None]
    assert relative_error(*zip(*pairs, strict=True)) < 1e-8
    assert terms["site_norm"] == pytest.approx(float(size))
    assert all(w.requires_grad for w in tiny_context(model).space.tensors)


def test_undrawn_layers_train_their_mlps_where_asked_for(space):
    model = tiny_model(space, layers=4)
    if space == LORA:
        model = tiny_llama(layers=4)
        adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapter).double().eval()
    found, _, _ = step_of(method := method_for(undrawn="mlp"), model)
    drawn = drawn_in(method)
    alone, _, _ = step_of(again := method_for(), model)
    assert drawn_in(again) == drawn
    names = [name for name, w in model.named_parameters() if w.requires_grad]
    inside = in_layers(model, drawn)
    for name, belongs, g, without in zip(names, inside, found, alone, strict=True):
        assert (g is not None) == (belongs or ".mlp." in name)
        if belongs:
            assert relative_error([g], [without]) < 1e-9
    mlps = [g for name, g in zip(names, found, strict=True) if g is not None and ".mlp." in name]
    assert all(float(g.norm()) > 0 for g in mlps)


def test_released_trains_undrawn_mlps_in_the_released_adapter():
    with pytest.warns(UserWarning, match="reproduction only: it replaces statistic_batches 2"):
        method = TVaccine(TVaccineConfig(variant="released", statistic_batches=2))
    assert (method.config.undrawn, method.config.statistic_batches) == ("mlp", 1)
    assert (method.adapter["lora_rank"], method.adapter["lora_alpha"]) == (8, 4)
    assert not TVaccine(TVaccineConfig()).adapter


def test_layers_that_are_not_drawn_keep_their_bits_under_momentum_and_decay(space):
    model = tiny_model(space, layers=4, dtype=torch.float32)
    method, context = method_for(redraw_every=2), tiny_context(model)
    optimiser = torch.optim.AdamW(context.space.tensors, lr=1e-2, weight_decay=0.1)
    draws, ever = set(), set()
    for step in range(12):
        context.step = step
        context.space.give_gradient(None)
        before = [w.detach().clone() for w in context.space.tensors]
        terms = method.step(context)
        optimiser.step()
        drawn = drawn_in(method)
        draws.add(tuple(drawn))
        ever.update(drawn)
        for w, old, belongs in zip(
            context.space.tensors, before, in_layers(model, drawn), strict=True
        ):
            assert torch.equal(w, old) != belongs
        assert terms["layers_ever"] == len(ever)
        assert terms["idle_layers"] == len(ever) - 2
    # Some layer was idle with moments, and came back or stayed away.
    assert len(draws) > 1


def test_probabilities_are_the_sizes_of_the_harmful_gradients(space):
    model = tiny_model(space, layers=4)
    method = method_for()
    _, terms, _ = step_of(method, model)
    still = by_hand.still(model, HARMFUL)
    g = torch.autograd.grad(by_hand.loss(model, HARMFUL, attention=still), still)
    sizes = torch.stack([one.norm() for one in g])
    found = method.state()["probabilities"]
    assert found.dtype == torch.float64
    assert abs(float(found.sum()) - 1) < 1e-12
    torch.testing.assert_close(found, sizes / sizes.sum(), rtol=1e-10, atol=0)
    assert terms["layer_2_probability"] == float(found[2])


def test_the_statistic_is_a_mean_over_batches_and_micro_batches_change_nothing():
    model = tiny_llama(layers=4)
    different = (tiny_batch(4, seed=seed) for seed in (1, 7, 8))
    sizes = torch.zeros(4, dtype=torch.float64)
    for batch in [tiny_batch(4, seed=seed) for seed in (1, 7, 8)]:
        still = by_hand.still(model, batch)
        g = torch.autograd.grad(by_hand.loss(model, batch, attention=still), still)
        sizes += torch.stack([one.norm() for one in g])
    method, context = method_for(statistic_batches=3), tiny_context(model, micro_batch_size=1)
    usual = context.draw
    context.draw = lambda name, rows: next(different) if name == "harmful" else usual(name, rows)
    method.step(context)
    found = method.state()["probabilities"]
    torch.testing.assert_close(found, sizes / sizes.sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_have_the_frequencies_of_sequential_sampling(count):
    p = [0.05, 0.15, 0.3, 0.5]

    def chance(order):
        left, product = 1.0, 1.0
        for index in order:
            product, left = product * p[index] / left, left - p[index]
        return product

    expected = {
        subset: sum(chance(order) for order in itertools.permutations(subset))
        for subset in itertools.combinations(range(4), count)
    }
    rng = random.Random(0)
    seen = Counter(tuple(draw_layers(p, count, rng)) for _ in range(4000))
    assert set(seen) <= set(expected)
    observed = [seen[subset] for subset in expected]
    assert chisquare(observed, [4000 * x for x in expected.values()]).pvalue > 0.001


def test_all_layers_drawn_is_vaccine_inside_the_layers(space):
    model = tiny_model(space, layers=3)
    found, terms, _ = step_of(method_for(layers=3), model)
    expected, other, _ = step_of(Vaccine(VaccineConfig(batch_size=4, radius=0.5)), model)
    inside = in_layers(model, range(3))
    assert all(inside) == (space == LORA)
    pairs = [(f, e) for f, e, i in zip(found, expected, inside, strict=True) if i]
    assert relative_error(*zip(*pairs, strict=True)) < 1e-12
    assert all(f is None for f, i in zip(found, inside, strict=True) if not i)
    assert {name: terms[name] for name in other} == pytest.approx(other, rel=1e-12)


def test_redraws_and_refreshes_keep_their_schedule(space):
    model = tiny_model(space, layers=4)
    method = method_for(redraw_every=3, refresh_every=4, statistic_batches=2)
    context = tiny_context(model)
    draws = []
    for step in range(8):
        context.step = step
        context.space.give_gradient(None)
        terms = method.step(context)
        draws.append(drawn_in(method))
        assert ("layer_0_probability" in terms) == (step % 3 == 0)
    assert draws[0] == draws[1] == draws[2]
    assert draws[3] == draws[4] == draws[5]
    assert context.oracle.ledger["statistic"].backwards == 2 * 2
    assert context.oracle.backwards == 8 * method.passes_per_step == 20
    assert sum(method.state()["steps"].tolist()) == 8 * 2


def test_draws_are_seeded_and_go_on_from_a_checkpoint(space):
    model = tiny_model(space, layers=4)
    first, second, resumed = method_for(redraw_every=2), method_for(redraw_every=2), method_for()
    draws = []
    for method in (first, second):
        context = tiny_context(model)
        for step in range(6):
            context.step = step
            context.space.give_gradient(None)
            method.step(context)
            draws.append(drawn_in(method))
    assert draws[:6] == draws[6:]
    resumed.load_state(first.state())
    context = tiny_context(model, step=5)
    resumed.step(context)
    assert drawn_in(resumed) == drawn_in(first)
    assert "statistic" not in context.oracle.ledger
    assert sum(resumed.state()["steps"].tolist()) == 7 * 2


def test_eight_rows_equal_eight_micro_batches(space):
    model = tiny_model(space, layers=4)
    whole, terms, _ = step_of(method_for(batch_size=8), model)
    split, again, _ = step_of(method_for(batch_size=8), model, micro_batch_size=1)
    assert [g is None for g in whole] == [g is None for g in split]
    pairs = [(s, w) for s, w in zip(split, whole, strict=True) if w is not None]
    assert relative_error(*zip(*pairs, strict=True)) < 1e-9
    assert again == pytest.approx(terms, rel=1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_frozen_layers_have_no_gradient_buffers(monkeypatch, space):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = method_for(batch_size=1, retain=("refusal",), layers=1, statistic_batches=1)
    # One of two layers has gradients; plain SFT has those of both.
    assert -0.6 < by_hand.buffers_of(method, space) < -0.2
    assert method.parameter_buffers == 0


def test_without_a_radius_it_is_plain_sft_of_the_drawn_layers(space):
    model = tiny_model(space, layers=4)
    method = method_for(radius=0.0)
    found, _, _ = step_of(method, model)
    expected, _, _ = step_of(SFT(SFTConfig(batch_size=4, retain=("refusal", "benign"))), model)
    inside = in_layers(model, drawn_in(method))
    pairs = [(f, e) for f, e, i in zip(found, expected, inside, strict=True) if i]
    assert relative_error(*zip(*pairs, strict=True)) < 1e-12
    assert method.passes_per_step == pytest.approx(1.02)
    assert method.active_terms == ("retain",)


def test_a_quarter_of_the_layers_is_drawn_by_default():
    assert method_for(layers=None).prepare(tiny_context(tiny_llama(layers=8))) == {"layers": 2.0}
    assert method_for(layers=None).prepare(tiny_context(tiny_llama(layers=1))) == {"layers": 1.0}


def test_hooks_do_not_pile_up(space):
    model = tiny_model(space)
    before = by_hand.hooks(model)
    for _ in range(3):
        step_of(method_for(), model)
    assert by_hand.hooks(model) == before


def test_a_harmful_loss_without_a_gradient_stops_the_run(monkeypatch):
    monkeypatch.setattr(
        sites, "answer_cross_entropy", lambda model, batch: 0 * mean_loss(model, batch)
    )
    with pytest.raises(InactiveTermError, match="no gradient at some layer"):
        step_of(method_for(), tiny_llama())


def test_what_cannot_be_drawn_is_refused_before_work(tmp_path):
    with pytest.raises(InputError, match="layers 3: the model has 2"):
        by_hand.run(method_for(layers=3), tmp_path / "deep")
    with pytest.raises(InputError, match="'harmful', which has no examples"):
        by_hand.run(method_for(), tmp_path / "without", without=("harmful",))
    only_one = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(InputError, match="layer 0 has no trainable weights"):
        method_for().prepare(tiny_context(get_peft_model(tiny_llama(), only_one)))


@pytest.mark.parametrize("name", ["layers", "redraw_every", "refresh_every", "statistic_batches"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: 0 is not"):
        from_mapping(TVaccineConfig, {name: 0}, where="run.yaml: method")
    with pytest.raises(InputError, match="radius: -1"):
        from_mapping(TVaccineConfig, {"radius": -1}, where="run.yaml: method")
