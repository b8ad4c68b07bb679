"""Progress along and off an axis, and the cosine of two gradients, against hand-made models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mithridate.attacks.finetune import with_adapter
from mithridate.measures.line_scan import unit_line
from mithridate.measures.progress import Axis, gradient_cosine, half_life
from mithridate.weights import GradientOracle, dot, norm
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import tiny_batch, tiny_llama


def axis_of(model, *, length=0.5):
    oracle = GradientOracle(model)
    return Axis(
        start={name: weight.detach().clone() for name, weight in model.named_parameters()},
        line=unit_line(oracle, tiny_batch(), "gradient"),
        length=length,
    )


def test_a_hand_composed_walk_is_taken_apart_again():
    model = tiny_llama()
    axis = axis_of(model)
    torch.manual_seed(0)
    side = [torch.randn_like(tensor) for tensor in axis.line]
    torch._foreach_sub_(side, axis.line, alpha=dot(side, axis.line))
    torch._foreach_mul_(side, 1 / norm(side))
    with torch.no_grad():
        for weight, along, off in zip(model.parameters(), axis.line, side, strict=True):
            weight.add_(-1.25 * along + 3.0 * off)
    found = axis.progress(model)
    assert found.along == pytest.approx(2.5, rel=1e-9)
    assert found.off == pytest.approx(6.0, rel=1e-9)


def test_the_start_has_made_no_progress_and_ascent_counts_against():
    model = tiny_llama()
    axis = axis_of(model)
    assert axis.progress(model).along == 0.0
    assert axis.progress(model).off == 0.0
    with torch.no_grad():
        for weight, along in zip(model.parameters(), axis.line, strict=True):
            weight.add_(along, alpha=0.5)
    found = axis.progress(model)
    assert found.along == pytest.approx(-1.0, rel=1e-9)
    assert found.off == pytest.approx(0.0, abs=1e-9)


def test_one_step_of_gradient_descent_stays_on_the_axis():
    model = tiny_llama()
    axis = axis_of(model, length=0.1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    oracle = GradientOracle(model)
    gradient, _ = oracle.gradient(answer_cross_entropy, tiny_batch(), purpose="test")
    oracle.space.give_gradient(gradient)
    optimiser.step()
    found = axis.progress(model)
    assert found.along == pytest.approx(1e-3 * norm(gradient) / 0.1, rel=1e-6)
    assert found.off < 1e-6 * found.along


def test_an_adapter_counts_as_what_it_adds_to_the_weights():
    plain = tiny_llama(dtype=torch.float32)
    axis = axis_of(plain)
    adapted = with_adapter(copy.deepcopy(plain), 2)
    assert axis.progress(adapted).off == pytest.approx(0.0, abs=1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    found = axis.progress(adapted)
    added = 0.0
    for module in adapted.modules():
        if hasattr(module, "get_delta_weight"):
            added += float(module.get_delta_weight("default").detach().double().square().sum())
    assert math.hypot(found.along, found.off) == pytest.approx(math.sqrt(added) / 0.5, rel=1e-5)
    assert any("lora_" in name for name, _ in adapted.named_parameters()), "it is left as it was"


class Line(nn.Module):
    """Logits linear in one weight vector, so that both gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def test_the_cosine_of_a_batch_with_itself_is_one_and_with_its_own_opposite_minus_one(monkeypatch):
    oracle = GradientOracle(Line())
    answers = {
        "a": [torch.tensor([3.0, 4.0])],
        "b": [torch.tensor([-6.0, -8.0])],
        "c": [torch.tensor([4.0, -3.0])],
        "nothing": [torch.zeros(2)],
    }
    monkeypatch.setattr(oracle, "gradient", lambda loss, batch, purpose: (answers[batch], 0.0))
    assert gradient_cosine(oracle, "a", "a") == pytest.approx(1.0)
    assert gradient_cosine(oracle, "a", "b") == pytest.approx(-1.0)
    assert gradient_cosine(oracle, "a", "c") == pytest.approx(0.0)
    assert math.isnan(gradient_cosine(oracle, "a", "nothing"))


def test_half_life():
    assert half_life([0, 1, 5, 20], [-0.8, -0.6, -0.4, 0.1]) == 5
    assert half_life([0, 1, 5], [-0.8, -0.7, -0.6]) is None
    assert half_life([0, 1], [0.2, -0.5]) == 0
