"""RepNoise: the oracle tests of `methods.md` §10."""

import math
from dataclasses import replace

import pytest
import torch

from mithridate.chat import IGNORE
from mithridate.configs import from_mapping
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods import noise as noise_module
from mithridate.methods.noise import Noise, at_answers, mmd
from mithridate.methods.repnoise import RepNoise, RepNoiseConfig
from mithridate.methods.sft import SFT, SFTConfig
from mithridate.weights import arithmetic
from tests.methods import by_hand
from tests.methods.by_hand import HARMFUL, REFUSAL, SPACES, step_of
from tests.tiny import (
    gradient_of,
    mean_loss,
    relative_error,
    tiny_context,
    tiny_llama,
    tiny_model,
)

ALPHA, BETA = 0.6, 0.7


def method_for(**options):
    weights = {"unlearning_weight": ALPHA, "noise_weight": BETA}
    return RepNoise(RepNoiseConfig(**{"batch_size": 4} | weights | options))


def all_heads(model, batch=HARMFUL):
    """S: the output and each inner layer through the final norm and head."""
    logits, states, _ = by_hand.forward(model, batch)
    inner = by_hand.plain(model)
    heads = [inner.lm_head(inner.model.norm(state)) for state in states[1:-1]]
    losses = [by_hand.cross_entropy(each, batch) for each in (logits, *heads)]
    return sum(losses) / len(losses)


def answer_points(model, batch=HARMFUL):
    """Each layer's MLP outputs at the tokens of the answers."""
    chosen = batch.labels != IGNORE
    return [output[chosen] for output in by_hand.forward(model, batch)[2]]


@pytest.fixture
def plain_mmd(monkeypatch):
    """A stand-in that noise has no part in; it keeps what it was given."""
    seen = []

    def stand_in(x, y, *, unbiased):
        seen.append((x.detach(), y, unbiased))
        return x.square().mean()

    monkeypatch.setattr(noise_module, "mmd", stand_in)
    return seen


# The discrepancy ---------------------------------------------------------------------------------


def slow_mmd(x, y, *, unbiased):
    both = [*x, *y]
    pairs = [(a, b) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    b = float(sum((p - q).square().sum() for p, q in pairs)) / len(pairs)

    def k(p, q):
        return sum(torch.exp(-(p - q).square().sum() / (2.0 ** (i - 2) * b)) for i in range(5))

    def own(points):
        values = [
            k(p, q)
            for i, p in enumerate(points)
            for j, q in enumerate(points)
            if i != j or not unbiased
        ]
        return sum(values) / len(values)

    cross = [k(p, q) for p in x for q in y]
    return own(x) + own(y) - 2 * sum(cross) / len(cross)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_the_double_sum_over_pairs(unbiased):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, generator=generator, dtype=torch.float64) + 1
    found, expected = (one(x, y, unbiased=unbiased) for one in (mmd, slow_mmd))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (a,), (b,) = (torch.autograd.grad(value, x) for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_identical_sets_have_no_biased_discrepancy():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    assert abs(float(mmd(x, x.clone(), unbiased=False))) < 1e-5
    assert abs(float(mmd(x.double(), x.double(), unbiased=False))) < 1e-12


def test_the_unbiased_estimate_is_zero_in_the_mean_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(2)
    draws = [
        [torch.randn(12, 8, generator=generator) for _ in range(2)] for _ in range(200)
    ]  # fmt: skip
    null = torch.tensor([float(mmd(x, y, unbiased=True)) for x, y in draws])
    assert abs(float(null.mean())) < 4 * float(null.std()) / math.sqrt(200)
    biased = torch.tensor([float(mmd(x, y, unbiased=False)) for x, y in draws])
    assert float(biased.mean()) > 20 * float(biased.std()) / math.sqrt(200)
    x, y = draws[0]
    shifted = [float(mmd(x + shift, y, unbiased=True)) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted)
    assert shifted[-1] > shifted[0] + 1


# The points --------------------------------------------------------------------------------------


def test_points_are_the_mlp_outputs_at_answer_tokens(space, plain_mmd):
    model = tiny_model(space, layers=3)
    step_of(method_for(), model)
    expected = answer_points(model)
    assert len(plain_mmd) == len(expected) == 3
    for (x, y, unbiased), points in zip(plain_mmd, expected, strict=True):
        torch.testing.assert_close(x, points.detach(), rtol=1e-9, atol=1e-12)
        assert x.shape == y.shape
        assert unbiased


def test_released_points_are_rows_that_are_zero_outside_the_answer(plain_mmd):
    model = tiny_llama()
    step_of(method_for(noise_loss="released"), model)
    batch = HARMFUL.trimmed()
    mask = (batch.labels != IGNORE).unsqueeze(-1)
    outputs = by_hand.forward(model, batch)[2]
    for (x, y, unbiased), output in zip(plain_mmd, outputs, strict=True):
        torch.testing.assert_close(x, (output * mask).flatten(1).detach(), rtol=1e-9, atol=1e-12)
        assert torch.equal(y == 0, ~mask.expand(output.shape).flatten(1))
        assert not unbiased


def test_noise_is_standard_normal_and_new_for_each_layer_step_and_batch(plain_mmd):
    model = tiny_llama(layers=3)
    draws = []
    for step in (1, 2, 1):
        plain_mmd.clear()
        step_of(method_for(batch_size=32), model, step=step)
        draws.append([y for _, y, _ in plain_mmd])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))
    several = torch.cat([*draws[0], *draws[1]])
    assert len(several.flatten().unique()) == several.numel()
    assert abs(float(several.mean())) < 4 / math.sqrt(several.numel())
    assert float(several.var()) == pytest.approx(1, abs=0.1)
    plain_mmd.clear()
    step_of(method_for(batch_size=32), model, step=1, micro_batch_size=16)
    halves = torch.cat([y for _, y, _ in plain_mmd])
    assert len(halves.flatten().unique()) == halves.numel()


def test_at_most_so_many_points_are_drawn(plain_mmd):
    model = tiny_llama()
    step_of(method_for(mmd_points=3), model)
    everything = answer_points(model)
    for (x, y, _), points in zip(plain_mmd, everything, strict=True):
        assert x.shape == y.shape == (3, 16)
        distances = torch.cdist(x, points.detach())
        assert float(distances.min(dim=1).values.max()) < 1e-9
        assert len(set(distances.argmin(dim=1).tolist())) == 3


def test_kernels_are_float32_under_autocast(plain_mmd):
    step_of(method_for(), tiny_llama(dtype=torch.float32), autocast=True)
    assert {x.dtype for x, _, _ in plain_mmd} == {torch.float32}


def test_too_few_points_stop_the_run():
    one = replace(HARMFUL, labels=torch.full_like(HARMFUL.labels, IGNORE))
    one.labels[0, 5] = 7
    with pytest.raises(InactiveTermError, match="1 answer tokens"):
        Noise("tokens", 4).loss(tiny_context(tiny_llama()), one, [torch.ones(1, 16)])


# The objective -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 3])
def test_the_step_is_the_gradient_of_the_objective(space, plain_mmd, size):
    model = tiny_model(space, layers=3)
    found, terms, _ = step_of(method_for(), model, micro_batch_size=size)
    push = sum(points.square().mean() for points in answer_points(model)) / 3
    pull = torch.log1p(all_heads(model))
    loss = mean_loss(model, REFUSAL) + BETA * push - ALPHA * pull
    assert relative_error(found, gradient_of(model, loss)) < 1e-9
    assert terms["noise"] == pytest.approx(float(push.detach()))
    assert terms["unlearning"] == pytest.approx(-float(pull.detach()))
    assert terms["refusal"] == pytest.approx(float(mean_loss(model, REFUSAL).detach()))
    assert terms["harmful"] == pytest.approx(float(mean_loss(model, HARMFUL).detach()))


def test_the_log_term_alone_has_the_gradient_of_minus_alpha_s_over_one_plus_s(space):
    model = tiny_model(space, layers=3)
    found, terms, _ = step_of(method_for(noise_weight=0.0), model)
    s = all_heads(model)
    here = gradient_of(model, mean_loss(model, REFUSAL))
    expected = [
        r - ALPHA / (1 + float(s.detach())) * d
        for r, d in zip(here, gradient_of(model, s), strict=True)
    ]
    assert relative_error(found, expected) < 1e-10
    assert "noise" not in terms


def test_the_noise_term_is_the_slope_of_the_real_discrepancy(space):
    model = tiny_model(space)
    method = method_for(unlearning_weight=0.0)
    found, terms, context = step_of(method, model)
    outputs = by_hand.forward(model, HARMFUL)[2]
    piece = HARMFUL.trimmed()
    outputs = [output[:, : piece.input_ids.shape[1]] for output in outputs]
    value = Noise("tokens", 256).loss(context, HARMFUL, at_answers(piece, outputs))
    expected = gradient_of(model, mean_loss(model, REFUSAL) + BETA * value)
    assert relative_error(found, expected) < 1e-9
    assert terms["noise"] == pytest.approx(float(value.detach()))
    assert "unlearning" not in terms


def test_without_weights_it_is_plain_sft_on_refusals(space):
    model = tiny_model(space)
    method = method_for(unlearning_weight=0.0, noise_weight=0.0)
    found, terms, context = step_of(method, model)
    expected, _, _ = step_of(SFT(SFTConfig(batch_size=4, retain=("refusal",))), model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert set(terms) == set(context.oracle.ledger) == {"refusal"}
    assert context.oracle.backwards == method.passes_per_step == 1
    assert method.streams == method.active_terms == ("refusal",)


def test_the_cap_ends_the_pull(space):
    model = tiny_model(space)
    capped, terms, _ = step_of(method_for(noise_weight=0.0, unlearning_cap=0.5), model)
    assert terms["unlearning"] == pytest.approx(-math.log1p(0.5))
    assert relative_error(capped, gradient_of(model, mean_loss(model, REFUSAL))) < 1e-12


@pytest.mark.parametrize("points", ["tokens", "tokens, few", "released"])
def test_eight_rows_equal_eight_micro_batches(space, points):
    model = tiny_model(space, layers=3)
    kind, _, few = points.partition(", ")
    method = method_for(batch_size=8, noise_loss=kind, mmd_points=5 if few else 256)
    whole, terms, _ = step_of(method, model)
    for size in (1, 3):
        split, again, _ = step_of(method, model, micro_batch_size=size)
        assert relative_error(split, whole) < 1e-9
        assert again == pytest.approx(terms)


@pytest.mark.parametrize("size", [None, 2])
def test_steps_that_log_shares_tell_the_terms_apart_and_change_nothing(space, size):
    model = tiny_model(space)
    expected, _, _ = step_of(method_for(), model, micro_batch_size=size)
    context = tiny_context(model, micro_batch_size=size)
    context.shares = {}
    method_for().step(context)
    assert relative_error(context.space.gradient(), expected) < 1e-12
    assert set(context.shares) == {"unlearning", "noise", "refusal"}
    without, _, _ = step_of(method_for(unlearning_weight=0.0), model, micro_batch_size=size)
    parts = [n + r for n, r in zip(context.shares["noise"], context.shares["refusal"], strict=True)]
    assert relative_error(parts, without) < 1e-9


# The mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["answer", "difference"])
def test_the_first_answer_token_is_trained(mask):
    model = tiny_llama()
    method = method_for(answer_mask=mask, batch_size=1, noise_weight=0.0)
    context, seen = tiny_context(model), []
    method.prepare(context)

    def keep(_module, _inputs, output):
        output.retain_grad()
        seen.append(output)

    hook = model.lm_head.register_forward_hook(keep)
    method.step(context)
    hook.remove()
    # The lens reads each state as a text of one token.
    whole = [logits for logits in seen if logits.shape[1] > 1]
    assert len(whole) == 2
    # Projections begin where the first answer token is predicted.
    for logits in whole:
        assert float(logits.grad[0, 0].abs().sum()) > 0


def test_the_difference_mask_pairs_by_prompt_and_drops_what_both_answers_share(monkeypatch):
    context, seen = tiny_context(tiny_llama()), []
    refusals = [replace(e, answer=e.answer + " w9") for e in context.examples["harmful"]]
    context.examples["refusal"] = refusals[::-1]
    method = method_for(answer_mask="difference", noise_weight=0.0, batch_size=3)
    method.prepare(context)
    monkeypatch.setattr(
        method, "_push", lambda context, harmful, terms: seen.append(harmful)
    )  # fmt: skip
    method.step(context)
    labels = seen[0].labels
    # Only the end of the turn stands where the refusal says w9.
    assert labels[labels != IGNORE].tolist() == [context.chat.end_id] * 3
    context.examples["refusal"] = context.examples["benign"]
    with pytest.raises(InputError, match="no harmful prompt has a refusal"):
        method.prepare(context)


# Cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_two_passes_and_no_buffer(monkeypatch, space):
    monkeypatch.setattr(arithmetic, "_CHUNK", 512)
    method = method_for(batch_size=1)
    assert -0.2 < by_hand.buffers_of(method, space) < 0.4
    assert method.parameter_buffers == 0
    _, _, context = step_of(method, tiny_model(space))
    assert context.oracle.backwards == method.passes_per_step == 2
    assert {name: count.forwards for name, count in context.oracle.ledger.items()} == {
        "harmful": 1,
        "refusal": 1,
    }


def test_several_micro_batches_cost_a_forward_pass_more():
    _, _, context = step_of(method_for(), tiny_llama(), micro_batch_size=2)
    ledger = context.oracle.ledger
    assert (ledger["S"].forwards, ledger["S"].backwards) == (2, 0)
    assert (ledger["harmful"].forwards, ledger["harmful"].backwards) == (2, 2)
    # Without the log term it is for the activations that the discrepancy compares.
    _, _, context = step_of(method_for(unlearning_weight=0.0), tiny_llama(), micro_batch_size=2)
    assert (context.oracle.ledger["S"].forwards, context.oracle.ledger["S"].backwards) == (2, 0)


def test_hooks_do_not_pile_up(monkeypatch, space):
    model = tiny_model(space)
    # The library keeps hooks of its own from the first time that hidden states are asked for.
    step_of(method_for(), model)
    before = by_hand.hooks(model)
    for step in range(10):
        step_of(method_for(), model, step=step)
    assert by_hand.hooks(model) == before
    monkeypatch.setattr(
        "mithridate.methods.repnoise.layerwise_cross_entropy", lambda *_: 1 / 0
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        step_of(method_for(), model)
    assert by_hand.hooks(model) == before


def test_checkpointed_activations_change_nothing(space):
    model = tiny_model(space)
    expected, _, _ = step_of(method_for(), model)
    model.gradient_checkpointing_enable()
    model.train()
    found, _, _ = step_of(method_for(), model)
    assert relative_error(found, expected) < 1e-12


def test_training_moves_activations_to_noise_and_forgets():
    model = tiny_llama(dtype=torch.float32)
    method = method_for(noise_weight=1.0, unlearning_weight=1.0)
    context = tiny_context(model)
    optimiser = torch.optim.AdamW(context.space.tensors, lr=3e-3)
    history = []
    for step in range(30):
        context.step = step
        context.space.give_gradient(None)
        history.append(method.step(context))
        optimiser.step()
    noise = [row["noise"] for row in history]
    assert sum(noise[-5:]) < 0.6 * sum(noise[:5])
    assert history[-1]["harmful"] > history[0]["harmful"]
    assert history[-1]["refusal"] < 0.5 * history[0]["refusal"]


# Bad input ---------------------------------------------------------------------------------------


def test_a_missing_stream_is_refused_before_work(tmp_path):
    with pytest.raises(InputError, match="'harmful', which has no examples"):
        by_hand.run(method_for(), tmp_path / "without", without=("harmful",))


def test_more_inner_layers_than_there_are_are_refused_before_work():
    with pytest.raises(InputError, match="9 inner layers"):
        method_for(unlearning_layers=9).check(tiny_llama())


def test_released_sets_everything_and_warns():
    with pytest.warns(UserWarning, match="only: it replaces noise_weight 5.0$"):
        method = RepNoise(RepNoiseConfig(variant="released", noise_weight=5.0))
    assert method.config.noise_loss == "released"
    assert method.config.answer_mask == "difference"
    assert method.config.noise_weight == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"unlearning_weight": -1.0}, "unlearning_weight: -1.0"),
        ({"noise_weight": float("inf")}, "noise_weight: inf"),
        ({"mmd_points": 1}, "2 or more"),
        ({"unlearning_layers": 0}, "unlearning_layers: 0"),
        ({"unlearning_cap": -2.0}, "unlearning_cap: -2.0"),
        ({"noise_loss": "biased"}, "noise_loss"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        from_mapping(RepNoiseConfig, options, where="run.yaml: method")
