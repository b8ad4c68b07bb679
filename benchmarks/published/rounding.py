"""F5: how many bf16 weights one AdamW step moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mithridate.events import Event, Listener
from published.contexts import DRAWS
from published.judging import Measurement, over_repeats

if TYPE_CHECKING:
    from mithridate.testbeds.base import Testbed

RATES = {"5e-7": 5e-7, "2e-5": 2e-5, "2e-4": 2e-4}
WEIGHTS = 1_000_000
SPREAD = 0.02


def adamw_step(bed: Testbed, on_event: Listener) -> list[Measurement]:  # noqa: ARG001
    """Measure the share of normal weights that one step changes, at three learning rates."""
    on_event(Event(stage="AdamW in bf16"))
    return [
        Measurement(
            claim="F5",
            quantity=f"share of weights changed at {name}",
            subject="AdamW, bf16 weights",
            **over_repeats([share_moved(rate, seed) for seed in range(DRAWS)]),
            setting=f"one step from a fresh state, {WEIGHTS:,} weights drawn with spread {SPREAD}",
            model="synthetic weights",
        )
        for name, rate in RATES.items()
    ]


def share_moved(rate: float, seed: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the share of weights that differ after one AdamW step."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(WEIGHTS, generator=generator) * SPREAD).to(dtype)
    before = weights.clone()
    parameter = torch.nn.Parameter(weights)
    parameter.grad = torch.randn(WEIGHTS, generator=generator).to(dtype)
    torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0).step()
    return float((parameter.data != before).float().mean())
