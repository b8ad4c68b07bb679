"""The oracle: means over the whole step, counted passes, gradients where they belong."""

import math
from dataclasses import replace

import pytest
import torch

from mithridate.chat import IGNORE
from mithridate.errors import InactiveTermError, InputError, NonFiniteError
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import (
    FULL,
    LORA,
    gradient_of,
    mean_loss,
    relative_error,
    tiny_batch,
    tiny_model,
)


@pytest.fixture(params=[FULL, LORA])
def model(request):
    return tiny_model(request.param)


def test_gradient_is_that_of_the_mean_loss(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    gradient, value = oracle.gradient(answer_cross_entropy, batch, purpose="x")
    loss = mean_loss(model, batch)
    assert value == pytest.approx(float(loss.detach()), rel=1e-12)
    assert relative_error(gradient, gradient_of(model, loss)) < 1e-10


@pytest.mark.parametrize("size", [1, 3, 8])
def test_eight_rows_give_the_same_however_they_are_split(model, size):
    batch = tiny_batch(8)
    whole, value = GradientOracle(model).gradient(answer_cross_entropy, batch, purpose="x")
    split = GradientOracle(model, micro_batch_size=size)
    found, again = split.gradient(answer_cross_entropy, batch, purpose="x")
    assert again == pytest.approx(value, rel=1e-12)
    assert relative_error(found, whole) < 1e-9
    assert split.loss(answer_cross_entropy, batch, purpose="y") == pytest.approx(value, rel=1e-12)
    assert split.ledger["x"].backwards == math.ceil(8 / size)


def test_micro_batches_are_the_same_at_every_call(model):
    oracle, batch = GradientOracle(model, micro_batch_size=2), tiny_batch(5)
    first, second = oracle.micro_batches(batch), oracle.micro_batches(batch)
    assert [len(piece) for piece in first] == [2, 2, 1]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)


def test_accumulate_adds_and_scales(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    plain, value = oracle.gradient(answer_cross_entropy, batch, purpose="x")
    for _ in range(2):
        again = oracle.accumulate(answer_cross_entropy, batch, purpose="x", coefficient=-1.5)
        assert again == pytest.approx(value)
    assert relative_error(oracle.space.gradient(), [-3 * tensor for tensor in plain]) < 1e-12


def test_fresh_gradient_leaves_the_present_one_alone(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    oracle.accumulate(answer_cross_entropy, batch, purpose="x")
    held = oracle.space.gradient()
    before = [tensor.clone() for tensor in held]
    with oracle.fresh_gradient() as taken:
        oracle.accumulate(answer_cross_entropy, tiny_batch(seed=5), purpose="x")
    assert all(a is b for a, b in zip(oracle.space.gradient(), held, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
    assert relative_error(taken, before) > 0.01
    with pytest.raises(RuntimeError, match="body"), oracle.fresh_gradient():
        raise RuntimeError("body")
    assert all(a is b for a, b in zip(oracle.space.gradient(), held, strict=True))


def test_one_forward_can_fill_two_buffers(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    apart = oracle.space.zeros()

    def forward():
        loss = answer_cross_entropy(model, batch)
        return [loss, 2 * loss]

    values = oracle.backward(forward, tokens=batch.tokens, purpose="two", into=(apart, None))
    assert values[1] == pytest.approx(2 * values[0])
    assert relative_error(oracle.space.gradient(), [2 * tensor for tensor in apart]) < 1e-12
    count = oracle.ledger["two"]
    assert (count.forwards, count.backwards, count.tokens) == (1, 2, batch.tokens)


def test_terms_are_made_in_turn_and_an_empty_buffer_is_filled(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    first, lengths = [], []

    def forward():
        for factor in (1.0, 2.0):
            lengths.append(len(first))
            yield factor * mean_loss(model, batch)

    for _ in range(2):
        oracle.backward(forward, tokens=batch.tokens, purpose="two", into=(first, None))
    # The second round adds to what the first has filled.
    truth = gradient_of(model, mean_loss(model, batch))
    assert lengths == [0, len(truth), len(truth), len(truth)]
    assert relative_error(first, [2 * tensor for tensor in truth]) < 1e-12
    assert relative_error(oracle.space.gradient(), [4 * tensor for tensor in truth]) < 1e-12


def test_a_gradient_by_given_tensors_leaves_the_weights_alone(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    factor = torch.full((), 2.0, dtype=torch.float64, requires_grad=True)
    (value,) = oracle.backward(
        lambda: [factor.square() * mean_loss(model, batch)],
        tokens=batch.tokens,
        purpose="x",
        inputs=[factor],
    )
    assert float(factor.grad) == pytest.approx(value)
    assert all(p.grad is None for p in oracle.space.tensors)
    assert oracle.backwards == 1


def test_training_only_some_modules_gives_the_others_no_gradient(model):
    oracle, batch = GradientOracle(model), tiny_batch()
    whole = oracle.space
    expected = dict(zip(whole.names, gradient_of(model, mean_loss(model, batch)), strict=True))
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]
    with oracle.training_only([layer]):
        oracle.accumulate(answer_cross_entropy, batch, purpose="x")
        names = oracle.space.names
        assert names
        assert all(".layers.1." in name for name in names)
        assert relative_error(oracle.space.gradient(), [expected[name] for name in names]) < 1e-10
    assert oracle.space is whole
    for name, p in zip(whole.names, whole.tensors, strict=True):
        assert p.requires_grad
        assert (p.grad is not None) == (name in names)
    with pytest.raises(InputError, match="no trainable"), oracle.training_only([]):
        pass
    with pytest.raises(RuntimeError, match="body"), oracle.training_only([layer]):
        raise RuntimeError("body")
    assert oracle.space is whole
    assert all(p.requires_grad for p in whole.tensors)


def test_the_ledger_counts_passes_and_real_tokens_per_purpose(model):
    oracle, batch = GradientOracle(model, micro_batch_size=2), tiny_batch(4)
    oracle.accumulate(answer_cross_entropy, batch, purpose="a")
    oracle.accumulate(answer_cross_entropy, batch, purpose="a")
    oracle.loss(answer_cross_entropy, batch, purpose="b")
    a, b = oracle.ledger["a"], oracle.ledger["b"]
    assert (a.forwards, a.backwards, a.tokens) == (4, 4, 2 * batch.tokens)
    assert (b.forwards, b.backwards, b.tokens) == (2, 0, batch.tokens)
    assert a.seconds > 0
    assert a.peak_bytes > 0
    assert oracle.backwards == 4


def test_a_loss_alone_leaves_no_gradient(model):
    oracle = GradientOracle(model)
    oracle.loss(answer_cross_entropy, tiny_batch(), purpose="x")
    assert all(p.grad is None for p in oracle.space.tensors)


def test_full_precision_switches_autocast_off_and_back():
    model = tiny_model(FULL, dtype=torch.float32)
    batch = tiny_batch()
    plain = GradientOracle(model).loss(answer_cross_entropy, batch, purpose="x")
    oracle = GradientOracle(model, autocast=True)
    rough = oracle.loss(answer_cross_entropy, batch, purpose="x")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with oracle.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert oracle.loss(answer_cross_entropy, batch, purpose="x") == plain
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert oracle.autocast
    assert rough != plain


def test_a_batch_without_answers_stops_the_run(model):
    batch = tiny_batch()
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    with pytest.raises(InactiveTermError, match="answer token"):
        GradientOracle(model).accumulate(answer_cross_entropy, empty, purpose="x")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(model, bad):
    def loss(network, batch):
        return answer_cross_entropy(network, batch) * bad

    with pytest.raises(NonFiniteError, match="the term 'refusal' became"):
        GradientOracle(model).accumulate(loss, tiny_batch(), purpose="refusal")
