"""Micro-batches change memory and time, never a gradient or a term (`methods.md` A1, A3)."""

import pytest

from mithridate.chat import IGNORE
from mithridate.methods import METHODS
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy
from tests.methods.every import EVERY, MASKED, step
from tests.tiny import relative_error, tiny_batch, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:the look-ahead left"),
]


def test_every_method_that_takes_steps_is_here():
    stepping = {name for name in METHODS.names() if not METHODS.load(name).one_shot}
    assert stepping == {name.split()[0] for name in EVERY if "+" not in name}


@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_of_one_leave_the_gradient_of_eight(name):
    whole, terms, _ = step(name, micro_batch_size=8)
    split, again, context = step(name, micro_batch_size=1)
    assert [g is None for g in split] == [g is None for g in whole]
    kept = [index for index, g in enumerate(whole) if g is not None]
    assert relative_error([split[i] for i in kept], [whole[i] for i in kept]) < 1e-9
    assert again == pytest.approx(terms, rel=1e-9, abs=1e-12)
    assert context.oracle.micro_batch_size == 1


@pytest.mark.parametrize("name", MASKED)
def test_a_micro_batch_without_labels_adds_nothing(name):
    whole, terms, _ = step(name, unlabelled=2)
    split, again, _ = step(name, unlabelled=2, micro_batch_size=1)
    assert relative_error(split, whole) < 1e-9
    assert again == pytest.approx(terms)


def test_the_mean_is_over_the_labels_that_there_are():
    batch = tiny_batch(4)
    batch.labels[1:3] = IGNORE
    found = []
    for given, size in ((batch, 1), (batch, None), (batch.rows(0, 1), None), (batch.rows(3, 4), 1)):
        oracle = GradientOracle(tiny_llama(), micro_batch_size=size)
        gradient, loss = oracle.gradient(answer_cross_entropy, given, purpose="test")
        assert oracle.loss(answer_cross_entropy, given, purpose="test") == pytest.approx(loss)
        found.append((gradient, loss, given.label_count, oracle.ledger["test"].forwards))
    (split, mean, count, passes), (whole, *_), (first, a, n, _), (last, b, m, _) = found
    assert passes == 4  # two micro-batches of four, with and without a gradient
    assert relative_error(split, whole) < 1e-12
    assert mean == pytest.approx((n * a + m * b) / count)
    parts = [(n * x + m * y) / count for x, y in zip(first, last, strict=True)]
    assert relative_error(split, parts) < 1e-12
