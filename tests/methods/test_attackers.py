"""Simulated attackers of several kinds, and staying near the aligned model."""

from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from mithridate.chat import IGNORE
from mithridate.errors import InputError
from mithridate.methods.adapter import Adapter
from mithridate.methods.trajectory import Trajectory, TrajectoryConfig
from mithridate.weights import arithmetic
from mithridate.weights.arithmetic import bound_
from mithridate.weights.maps import linear_maps
from tests.compat.zoo import zoo_model
from tests.methods.test_trajectory import ONE, Spy
from tests.tiny import (
    LORA,
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

RATE = (1e-2, 1e-2)


def attacked(kind, *, steps=3, simulator="steps"):
    """Walk once; return the batches, the weights before, and those where the attack ends."""
    model = tiny_llama()
    context = tiny_context(model)
    spy = Spy(context)
    config = TrajectoryConfig(
        **ONE | {"attack_steps": (steps, steps)}, attackers=(kind,), simulator=simulator,
        benign_weight=0.0, sgd_learning_rate=RATE, lora_learning_rate=RATE, lora_rank=3,
        horizon=(6, 6),
    )  # fmt: skip
    method = Trajectory(config)
    method.prepare(context)
    terms = method.step(context)
    ((_, theta_h),) = spy.of("collapse")
    assert terms["attack_travel"] == pytest.approx(
        float((flat(theta_h) - flat(model.parameters())).norm())
    )
    return method, [batch for batch, _ in spy.of("attack")], theta_h


def train(model, trained, optimiser, batches):
    """Plain fine-tuning with gradients bounded by 1, by torch alone."""
    for batch in batches:
        found = torch.autograd.grad(mean_loss(model, batch), trained)
        for weight, gradient in zip(trained, found, strict=True):
            weight.grad = gradient
        bound_([weight.grad for weight in trained])
        optimiser.step()


@pytest.mark.parametrize("simulator", ["steps", "stored"])
def test_a_simulated_sgd_attacker_is_torch_s_with_momentum(simulator):
    _, batches, theta_h = attacked("sgd", simulator=simulator)
    twin = tiny_llama()
    trained = weights_of(twin)
    train(twin, trained, torch.optim.SGD(trained, lr=RATE[0], momentum=0.9), batches)
    start = weights_of(tiny_llama())
    moved = [a - b for a, b in zip(theta_h, start, strict=True)]
    assert relative_error(moved, [a - b for a, b in zip(trained, start, strict=True)]) < 1e-9


@pytest.mark.parametrize("simulator", ["steps", "stored"])
def test_a_simulated_adapter_is_peft_s_merged(monkeypatch, simulator):
    drawn = []
    make = Adapter.__init__

    def noting(self, *arguments, **options):
        make(self, *arguments, **options)
        drawn.append([factor.clone() for factor in self.factors])

    monkeypatch.setattr(Adapter, "__init__", noting)
    _, batches, theta_h = attacked("lora", simulator=simulator)
    ((*factors,),) = drawn
    twin = get_peft_model(
        tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0)
    ).double()
    a = [weight for name, weight in twin.named_parameters() if "lora_A" in name]
    assert len(a) == len(factors) / 2 == 2 * 7
    with torch.no_grad():
        for weight, value in zip(a, factors[1::2], strict=True):
            # Both start from the same distribution.
            assert float(value.abs().max()) <= float(weight.shape[1]) ** -0.5
            assert float(value.std()) == pytest.approx(float(weight.std()), rel=0.4)
            weight.copy_(value)
    trained = weights_of(twin)
    train(twin, trained, torch.optim.AdamW(trained, lr=RATE[0], weight_decay=0.0), batches)
    merged = list(twin.merge_and_unload().parameters())
    start = weights_of(tiny_llama())
    moved = [end - begin for end, begin in zip(theta_h, start, strict=True)]
    expected = [end.detach() - begin for end, begin in zip(merged, start, strict=True)]
    assert relative_error(moved, expected) < 1e-9
    still = [float(flat([tensor]).abs().max()) == 0 for tensor in moved]
    # Embedding, tied with the head, and norms stay where they are.
    assert sum(still) == len(moved) - 2 * 7


def test_one_step_of_sgd_is_ctrap_s_look_ahead():
    """Its length is the learning rate, where the gradient is longer than the bound."""
    _, (batch,), theta_h = attacked("sgd", steps=1)
    model = tiny_llama()
    g = gradient_of(model, mean_loss(model, batch))
    size = float(flat(g).norm())
    assert size > 1
    expected = [w - RATE[0] / size * d for w, d in zip(weights_of(model), g, strict=True)]
    assert relative_error(theta_h, expected) < 1e-12


def test_every_kind_is_drawn_and_a_stored_attacker_keeps_its_kind():
    def kinds(simulator, steps):
        context = tiny_context(tiny_llama())
        config = TrajectoryConfig(
            **ONE | {"attack_steps": (2, 2)}, attackers=("adamw", "sgd", "lora"),
            benign_weight=0.0, simulator=simulator, horizon=(4, 4),
        )  # fmt: skip
        method, found = Trajectory(config), []
        for step in range(steps):
            context.step = step
            (name,) = [key for key in method.step(context) if key.startswith("attack_travel_")]
            found.append(name.removeprefix("attack_travel_"))
        return found

    assert set(kinds("steps", 12)) == {"adamw", "sgd", "lora"}
    stored = kinds("stored", 16)
    assert set(stored) == {"adamw", "sgd", "lora"}
    # A life of four steps is two walks.
    assert stored[::2] == stored[1::2]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lora"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_reloaded_attacker_goes_on_bit_for_bit_also_when_its_life_is_over(kind, stop):
    """After three walks of two steps a life of six is over."""

    def run(reload):
        model = tiny_llama(dtype=torch.float32)
        context = tiny_context(model)
        config = TrajectoryConfig(**ONE | {"attack_steps": (2, 2)}, simulator="stored",
                                  horizon=(6, 6), attackers=(kind,))  # fmt: skip
        method = Trajectory(config)
        for step in range(5):
            context.step = step
            context.space.give_gradient(None)
            terms = method.step(context)
            if reload and step == stop:
                state = {name: tensor.clone() for name, tensor in method.state().items()}
                method = Trajectory(config)
                method.load_state(state)
        return flat(context.space.gradient()), terms

    straight, again = run(reload=False), run(reload=True)
    assert torch.equal(straight[0], again[0])
    assert straight[1] == again[1]


def test_an_adapter_attacker_in_an_adapter_is_refused():
    method = Trajectory(TrajectoryConfig(attackers=("adamw", "lora")))
    with pytest.raises(InputError, match="needs the full weights"):
        method.prepare(tiny_context(tiny_model(LORA)))


@pytest.mark.parametrize(
    ("options", "buffers"),
    [
        ({}, 4),
        ({"attackers": ("sgd",)}, 4),
        ({"simulator": "jump"}, 2),
        ({"simulator": "stored"}, 8),
        ({"simulator": "stored", "attackers": ("sgd",)}, 7),
        ({"simulator": "stored", "attackers": ("lora",), "lora_rank": 1}, 5),
        ({"retain_kl": 0.5}, 5),
    ],
)
def test_buffers(monkeypatch, options, buffers):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = Trajectory(TrajectoryConfig(**ONE | {"batch_size": 3}, **options, horizon=(9, 9)))
    context = tiny_context(tiny_llama(dtype=torch.float32, hidden=128))
    with MemoryWatch() as watch:
        for context.step in range(2):
            context.space.give_gradient(None)
            method.step(context)
    assert method.parameter_buffers == buffers
    held = watch.peak / context.space.bytes - 1
    assert buffers - 0.7 < held < buffers + 0.7


# Staying near the aligned model ------------------------------------------------------------------


def mean_divergence(model, aligned, batch):
    """KL(aligned || model) per answer token, written a second time."""
    rows = batch.labels[:, 1:] != IGNORE
    p, q = (
        network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        .logits[:, :-1][rows]
        .log_softmax(-1)
        for network in (aligned, model)
    )
    return (p.exp() * (p - q)).sum(-1).mean()


def moved_away(model, context):
    torch.manual_seed(5)
    noise = [0.1 * torch.randn_like(weight) for weight in weights_of(model)]
    context.space.add_((1.0, noise))


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("cross_entropy", [0.0, 0.6])
def test_the_retain_term_is_cross_entropy_and_divergence(space, cross_entropy, size):
    model, aligned = tiny_model(space), tiny_model(space)
    context = tiny_context(model, micro_batch_size=size)
    spy = Spy(context)
    method = Trajectory(TrajectoryConfig(**ONE, collapse_weight=0.0, benign_weight=0.0,
                                         retain_weight=cross_entropy, retain_kl=0.3))  # fmt: skip
    method.step(context)
    moved_away(model, context)
    away = [weight.detach().clone() for weight in weights_of(model)]
    other = Trajectory(method.config)
    other.load_state({name: tensor.clone() for name, tensor in method.state().items()})
    context.space.give_gradient(None)
    terms = other.step(context)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), away, strict=True))
    batch = spy.of("retain")[-1][0]
    apart = mean_divergence(model, aligned, batch)
    assert terms["retain_kl"] == pytest.approx(float(apart.detach()))
    assert terms["retain"] == pytest.approx(float(mean_loss(model, batch).detach()))
    expected = gradient_of(model, cross_entropy * mean_loss(model, batch) + 0.3 * apart)
    assert relative_error(context.space.gradient(), expected) < 1e-9
    pieces = len(context.oracle.micro_batches(batch))
    assert context.oracle.ledger["retain"].forwards == 2 * 2 * pieces
    assert context.oracle.ledger["retain"].backwards == 2 * pieces


def test_where_it_began_the_divergence_and_its_gradient_are_zero():
    context = tiny_context(tiny_llama())
    method = Trajectory(TrajectoryConfig(**ONE, collapse_weight=0.0, benign_weight=0.0,
                                         retain_weight=0.0, retain_kl=1.0))  # fmt: skip
    assert method.step(context)["retain_kl"] == pytest.approx(0.0, abs=1e-12)
    assert float(flat(context.space.gradient()).norm()) < 1e-10
    assert "retain_kl" in method.active_terms


def test_under_autocast_the_aligned_pass_leaves_no_cast_weights_behind():
    """Autocast keeps casts by weight: the aligned ones would be taken for the present ones."""
    model, aligned = (tiny_llama(dtype=torch.float32) for _ in range(2))
    context = tiny_context(model, autocast=True)
    spy = Spy(context)
    method = Trajectory(TrajectoryConfig(**ONE, collapse_weight=0.0, benign_weight=0.0,
                                         retain_weight=0.0, retain_kl=1.0))  # fmt: skip
    method.step(context)
    moved_away(model, context)
    context.space.give_gradient(None)
    method.step(context)
    ((_, _), (batch, _)) = spy.of("retain")
    with torch.autocast("cpu", torch.bfloat16):
        rows = batch.labels[:, 1:] != IGNORE
        p, q = (
            network(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            .logits[:, :-1][rows]
            .float()
            .log_softmax(-1)
            for network in (aligned, model)
        )
        apart = functional.kl_div(q, p.detach(), log_target=True, reduction="sum") / len(p)
    assert relative_error(context.space.gradient(), gradient_of(model, apart)) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attackers": ()}, "empty"),
        ({"attackers": ("sgd", "sgd")}, "twice"),
        ({"attackers": ("sgd",), "simulator": "jump"}, "jump"),
        ({"sgd_learning_rate": (1e-2, 1e-3)}, "sgd_learning_rate"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"retain_kl": -0.1}, "retain_kl: -0.1"),
        ({"retain_weight": 0.0}, "nothing is retained"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        TrajectoryConfig(**options)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "llama4_text", "mixtral", "qwen3_moe"])
def test_a_simulated_adapter_follows_the_chain_rule_on_every_kind_of_weight(family):
    model = zoo_model(family)
    context = tiny_context(model)
    adapter = Adapter(context, rank=2, seed=Random(0))
    assert [one.name for one in adapter.maps.values()] == [m.name for m in linear_maps(model)]
    start = context.space.snapshot()
    torch.manual_seed(0)
    factors = [torch.randn_like(factor).requires_grad_() for factor in adapter.factors]
    for factor, value in zip(adapter.factors, factors, strict=True):
        factor.copy_(value.detach())
    adapter.merge_into(context, start)
    slopes = [torch.randn_like(weight) for weight in start]
    total = 0.0
    for (place, one), b, a in zip(adapter.maps.items(), factors[::2], factors[1::2], strict=True):
        change = 2.0 * b @ a
        merged = start[place] + (change.mT if one.transposed else change)
        torch.testing.assert_close(context.space.tensors[place].data, merged.detach())
        total = total + (merged * slopes[place]).sum()
    context.space.give_gradient([slope.clone() for slope in slopes])
    found = adapter.take_gradient(context)
    for gradient, wanted in zip(found, torch.autograd.grad(total, factors), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    untouched = set(range(len(start))) - set(adapter.maps)
    assert all(torch.equal(context.space.tensors[place], start[place]) for place in untouched)
