"""The line scan against closed forms: a quadratic and a hand-composed direction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mithridate.errors import InactiveTermError
from mithridate.measures.line_scan import SCALES, basin, line_scan, unit_line
from mithridate.weights import GradientOracle, dot, norm
from mithridate.weights.arithmetic import WeightSpace
from mithridate.weights.losses import answer_cross_entropy
from tests.tiny import tiny_batch, tiny_llama

CURVATURE = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


class Bowl(nn.Module):
    """f(w) = sum(curvature * w^2) / 2, whose every value on a line is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))

    def value(self) -> float:
        return float((CURVATURE * self.weight.detach() ** 2).sum() / 2)


def test_a_scan_of_a_quadratic_is_its_taylor_series_and_leaves_no_trace():
    bowl = Bowl()
    before = bowl.weight.detach().clone()
    gradient = CURVATURE * before
    line = gradient / gradient.norm()
    rows = line_scan(WeightSpace(bowl), [line], lambda: {"f": bowl.value()}, length=0.3)
    assert [row["scale"] for row in rows] == list(SCALES)
    curved = float((CURVATURE * line**2).sum())
    for row in rows:
        far = 0.3 * row["scale"]
        expected = rows[0]["f"] - far * float(gradient.norm()) + far**2 * curved / 2
        assert row["f"] == pytest.approx(expected, rel=1e-12)
    assert torch.equal(bowl.weight.detach(), before)


@pytest.mark.parametrize("kind", ["gradient", "sign", "random"])
def test_a_line_is_a_unit_direction_of_ascent(kind):
    oracle, batch = GradientOracle(tiny_llama()), tiny_batch()
    line = unit_line(oracle, batch, kind, seed=3)
    gradient, loss = oracle.gradient(answer_cross_entropy, batch, purpose="test")
    assert norm(line) == pytest.approx(1.0, rel=1e-6)
    slope = {
        "gradient": norm(gradient),
        "sign": sum(float(g.abs().sum()) for g in gradient)
        / math.sqrt(sum(int((g != 0).sum()) for g in gradient)),
        "random": dot(gradient, line),
    }[kind]
    assert dot(gradient, line) == pytest.approx(slope, rel=1e-6)
    step = 1e-5
    (row,) = line_scan(
        oracle.space, line, length=step, scales=(1.0,),
        look=lambda: {"loss": oracle.loss(answer_cross_entropy, batch, purpose="test")},
    )  # fmt: skip
    assert (loss - row["loss"]) / step == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_random_lines_differ_by_seed_only():
    oracle, batch = GradientOracle(tiny_llama()), tiny_batch()
    one, same, other = (unit_line(oracle, batch, "random", seed=s) for s in (1, 1, 2))
    assert dot(one, same) == pytest.approx(1.0, rel=1e-6)
    assert abs(dot(one, other)) < 0.2


def test_a_flat_loss_has_no_line():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.inner.requires_grad_(False)
            self.idle = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, input_ids, attention_mask, **_):
            found = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            found.logits = found.logits + 0.0 * self.idle.sum()
            return found

    with pytest.raises(InactiveTermError, match="no line"):
        unit_line(GradientOracle(Flat()), tiny_batch(), "gradient")


def test_a_basin_is_where_perplexity_has_more_than_doubled():
    heights = [1.0, 1.2, 1.0 + math.log(2) - 1e-9, 1.0 + math.log(2) + 1e-9, 9.0, 1.1, math.nan]
    rows = [{"scale": float(s), "log_perplexity": h} for s, h in enumerate(heights)]
    assert basin(rows) == [3.0, 4.0, 6.0]
    assert basin(rows, rise=5.0) == [4.0, 6.0]


def test_a_planted_step_shows_where_it_was_planted():
    """Weights composed by hand: answers are ruined once ``line`` has been walked for 1.5."""
    model = tiny_llama()
    oracle, batch = GradientOracle(model), tiny_batch()
    line = unit_line(oracle, batch, "random", seed=0)
    walked = {"far": 0.0}
    start = oracle.space.snapshot()

    def look() -> dict[str, float]:
        moved = [now.detach() - then for now, then in zip(oracle.space.tensors, start, strict=True)]
        walked["far"] = -dot(moved, line)
        return {"log_perplexity": 5.0 if walked["far"] > 1.5 else 1.0}

    assert basin(line_scan(oracle.space, line, look, length=0.5)) == [4.0, 8.0, 16.0]
