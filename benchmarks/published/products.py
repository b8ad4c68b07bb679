"""F4: SEAM's finite difference in float32 and in bf16, against the exact product."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mithridate.chat import Batch
from mithridate.events import Event, Listener
from mithridate.weights import Gradient, GradientOracle, dot, norm
from mithridate.weights.hvp import add_exact
from mithridate.weights.losses import answer_cross_entropy
from published.contexts import DRAWS, describe, draws, open_model
from published.judging import Measurement, over_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mithridate.testbeds.base import Testbed

LENGTH = 1e-3
"""Epsilon of the released code."""


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """An estimate beside the exact product.

    Attributes
    ----------
    error
        Norm of the difference over the exact product's norm.
    moved
        Share of the weights that the shift changes at all.
    """

    cosine: float
    ratio: float
    error: float
    moved: float


def finite_difference(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """Compare ``H_a delta_a`` with its finite difference, in two precisions."""
    model, chat = open_model(bed)
    oracle = GradientOracle(model)
    found: dict[str, list[Likeness]] = {"bf16": [], "float32": []}
    for number, batches in enumerate(draws(bed, model, chat)):
        on_event(Event(stage="finite differences", step=number, total=DRAWS))
        with oracle.full_precision():
            g_a, _ = oracle.gradient(answer_cross_entropy, batches["harmful"], purpose="F4")
            g_b, _ = oracle.gradient(answer_cross_entropy, batches["benign"], purpose="F4")
            direction = away_from(g_a, g_b)
            with oracle.fresh_gradient() as exact:
                add_exact(
                    oracle,
                    answer_cross_entropy,
                    batches["harmful"],
                    [(1.0, direction)],
                    purpose="F4",
                )
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
            found[name].append(likeness(model, batches["harmful"], direction, exact, dtype))
    return [
        Measurement(
            claim="F4",
            quantity=f"{quantity} in {name}",
            subject="finite difference",
            **over_repeats([getattr(one, key) for one in ones]),
            over="batches",
            setting=f"length {LENGTH:g}, unit direction",
            model=describe(bed, model),
        )
        for name, ones in found.items()
        for key, quantity in (
            ("error", "relative error"),
            ("cosine", "cosine with the exact product"),
            ("ratio", "norm over the exact norm"),
            ("moved", "share of weights moved"),
        )
    ]


def away_from(a: Gradient, b: Gradient) -> Gradient:
    """Return SEAM's delta_a as a unit direction: what b has at right angles to a."""
    share = dot(a, b) / dot(a, a)
    part = [y - share * x for x, y in zip(a, b, strict=True)]
    size = norm(part)
    return [one / size for one in part]


def likeness(
    model: PreTrainedModel,
    batch: Batch,
    direction: Gradient,
    exact: Gradient,
    dtype: torch.dtype,
) -> Likeness:
    """Compare a forward difference along a unit direction, all in ``dtype``, with ``exact``."""
    cast: Any = copy.deepcopy(model)
    cast.to(dtype)
    weights = [weight for weight in cast.parameters() if weight.requires_grad]

    def gradient() -> Sequence[torch.Tensor]:
        loss = answer_cross_entropy(cast, batch) / batch.label_count
        return torch.autograd.grad(loss, weights)

    before = gradient()
    moved = 0
    with torch.no_grad():
        for weight, part in zip(weights, direction, strict=True):
            was = weight.clone()
            weight.add_((LENGTH * part).to(dtype))
            moved += int((weight != was).sum())
    estimate = [
        (after.float() - at.float()) / LENGTH for after, at in zip(gradient(), before, strict=True)
    ]
    size, expected = norm(estimate), norm(exact)
    off = [e - x for e, x in zip(estimate, exact, strict=True)]
    return Likeness(
        cosine=dot(estimate, exact) / (size * expected) if size > 0 else 0.0,
        ratio=size / expected,
        error=norm(off) / expected,
        moved=moved / sum(weight.numel() for weight in weights),
    )
