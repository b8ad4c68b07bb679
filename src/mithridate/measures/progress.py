"""Where an attack went: along the planted axis or off it, and how long the gradients opposed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from mithridate.chat import Batch
from mithridate.weights import Gradient, GradientOracle, dot, norm
from mithridate.weights.losses import answer_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the weights moved, in virtual steps d_v.

    Attributes
    ----------
    along
        s = <start - weights, axis> / d_v; 1 is where the virtual step ends.
    off
        r = ||(start - weights) without its part along the axis|| / d_v.
    """

    along: float
    off: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The planted axis.

    Attributes
    ----------
    start
        Weights before the attack, by name.
    line
        Unit direction, one tensor for each of them in their order; an attack is expected to walk
        against it.
    length
        d_v, the L2 length of the virtual step.
    """

    start: dict[str, torch.Tensor]
    line: Gradient
    length: float

    def progress(self, model: PreTrainedModel) -> Progress:
        """Return how far ``model`` is from the start; an adapter counts as what it adds."""
        weights = dict(unadapted(model).named_parameters())
        moved = [
            before.double() - weights[name].detach().double() for name, before in self.start.items()
        ]
        line = [tensor.double() for tensor in self.line]
        along = dot(moved, line)
        torch._foreach_sub_(moved, line, alpha=along)
        return Progress(along=along / self.length, off=norm(moved) / self.length)


def unadapted(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model``, or a copy with its adapter merged, which is left as it was."""
    if not hasattr(model, "merge_and_unload"):
        return model
    merge = cast("Callable[[], PreTrainedModel]", copy.deepcopy(model).merge_and_unload)
    return merge().requires_grad_(True)


def gradient_cosine(oracle: GradientOracle, harmful: Batch, benign: Batch) -> float:
    """Return cos(g_a, g_b) of the two batches' cross-entropies; not a number if one is zero."""
    g_a, _ = oracle.gradient(answer_cross_entropy, harmful, purpose="evaluation")
    g_b, _ = oracle.gradient(answer_cross_entropy, benign, purpose="evaluation")
    size = norm(g_a) * norm(g_b)
    return dot(g_a, g_b) / size if size > 0 else math.nan


def half_life(steps: Sequence[int], cosines: Sequence[float]) -> int | None:
    """Return the first step at which a negative cosine has come up to half its start.

    None where it never does; 0 where the start is not negative: there was no coupling to lose.
    """
    if cosines[0] >= 0:
        return 0
    return next(
        (step for step, value in zip(steps, cosines, strict=True) if value >= cosines[0] / 2), None
    )
