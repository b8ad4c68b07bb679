"""What only a GPU can show: its allocator's books, and products under its autocast and TF32."""

from __future__ import annotations

import pytest
import torch

from mithridate.costing import CostPlan, run_cost
from mithridate.weights import GradientOracle, dot, norm
from mithridate.weights.hvp import add_exact, fidelity
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import (
    FULL,
    LORA,
    gradient_of,
    mean_loss,
    random_direction,
    tiny_batch,
    tiny_model,
    twice_differentiable,
)

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)


@pytest.mark.parametrize("space", [FULL, LORA])
def test_the_cost_meter_reads_the_gpu_s_allocator(space):
    plan = CostPlan(shape="lattice", methods=("ctrap", "seam"), space=space, batch_size=4,
                    length=16, seconds=0.0)  # fmt: skip
    document = run_cost(plan)
    assert document["machine"]["device"] == torch.cuda.get_device_name(0)
    weights, trained = 4 * document["parameters"], 4 * document["trainable"]
    for name, passes in (("sft", 1), ("ctrap", 3), ("seam", 5)):
        row = document["methods"][name]
        assert row["passes_per_step"] == passes
        assert weights + 2 * trained < row["peak_memory_bytes"]
        assert weights + 2 * trained < row["peak_reserved_bytes"]
        assert "cuda:0" in row["extra_bytes_per_device"]
    assert document["methods"]["seam"]["extra_bytes"] > trained
    assert document["methods"]["ctrap"]["clock_ratio"] > 1


@pytest.fixture(params=[FULL, LORA])
def model(request):
    return tiny_model(request.param, dtype=torch.float32, hidden=32).to(DEVICE)


def test_exact_products_are_true_under_the_gpu_s_autocast(model):
    batch = tiny_batch().to(DEVICE)
    direction = [tensor.to(DEVICE) for tensor in random_direction(model.cpu(), 1)]
    model.to(DEVICE)
    with twice_differentiable():
        first = gradient_of(model, mean_loss(model, batch), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(first, direction, strict=True))
        truth = gradient_of(model, slope)
    oracle = GradientOracle(model, autocast=True)
    with oracle.fresh_gradient() as found:
        add_exact(oracle, answer_cross_entropy, batch, [(1.0, direction)], purpose="x")
    assert dot(found, truth) / (norm(found) * norm(truth)) > 0.98


def test_differences_are_true_where_tf32_and_autocast_are_on(model):
    direction = [tensor.to(DEVICE) for tensor in random_direction(model.cpu(), 1)]
    model.to(DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        oracle = GradientOracle(model, autocast=True)
        found = fidelity(oracle, answer_cross_entropy, tiny_batch(16), [(1.0, direction)])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.passed
