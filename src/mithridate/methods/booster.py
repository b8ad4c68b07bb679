r"""Booster: flatten the harmful loss along its own gradient.

arXiv 2409.01586 (ICLR 2025); code git-disl/Booster@6421918 (`methods.md` §9).

.. math:: \min_\theta\; \ell(\theta; \text{refusal}) + \lambda\,[h(\theta) - h(\theta')], \qquad
          \theta' = \theta - r\,\nabla h / \|\nabla h\|,

with h the harmful loss, of one batch at both points. The gradient of the bracket is
:math:`\nabla h(\theta) - v,\ v = \nabla h(\theta')` (first order, as published), or exact, with
H_h the Hessian of h and :math:`\hat g` its unit gradient:

.. math:: \nabla h(\theta) - v + \tfrac{r}{\|\nabla h\|} H_h (v - \hat g \langle\hat g, v\rangle)
          \quad\text{(raw: } \nabla h(\theta) - v + \alpha H_h v\text{)}.

====================== =========================== =============================================
paper / code           here                        why
====================== =========================== =============================================
any precision          true float32 for both ends  a difference of close gradients is rounded
                                                   away under autocast (P3)
restore by adding back by copy, bit for bit        adding back drifts (P2)
a batch at a time      whole step (A1)             the code keeps the last micro-batch only
radius 0.1 in factors  measured, in merged weights 0.1 belongs to alpha / rank = 4 / 32 (`merged`)
gradient direction     ``lookahead_direction``     where AdamW attackers really go; these turn
                                                   the gradient in place: one pass more
====================== =========================== =============================================
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mithridate.configs import Count, Positive, Weight, require
from mithridate.methods.base import Method, MethodConfig, RunContext, as_released
from mithridate.methods.lookahead import (
    RELEASED_ADAPTER,
    RELEASED_RADIUS,
    Direction,
    LookAhead,
    Radius,
    RadiusIn,
)
from mithridate.weights import dot, norm
from mithridate.weights.arithmetic import scale_
from mithridate.weights.hvp import add_exact, gradient_with_graph
from mithridate.weights.losses import answer_cross_entropy
from mithridate.weights.oracle import refuse_rounded, rounded_weights

_WATCH_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class BoosterConfig(MethodConfig):
    """Options of Booster.

    Parameters
    ----------
    harmful_rows, retain_rows
        Rows per step of each batch.
    retain
        Streams of the alignment data, shared evenly.
    flatness_weight
        lambda; 0 leaves plain SFT, without a look-ahead pass.
    lookahead
        ``raw``: the radius multiplies the gradient itself instead of its unit vector.
    lookahead_direction
        ``gradient``; ``sign``; ``adam`` (one buffer more); ``unrolled``: real AdamW steps;
        ``random`` (an ablation).
    lookahead_radius
        L2 length over all trained weights; an interval is drawn from log-uniformly; ``auto`` and
        ``null``: the travel of 1 to 20 AdamW steps.
    lookahead_radius_in
        Where an adapter is trained, whose length the radius is: that of the ``merged`` weights'
        move, or of its ``factors``' move, which leads farther the larger alpha / rank is.
    attack_learning_rate, unrolled_steps
        The attacker's, for ``auto`` and ``unrolled``.
    gradient
        Through the look-ahead: ``first_order`` or ``exact``.
    variant
        ``released`` sets every value of the released code, and its adapter (rank 32, alpha 4, on
        query, key and value): for reproduction only.
    """

    harmful_rows: Count = 10
    retain_rows: Count = 10
    retain: tuple[str, ...] = ("refusal",)
    flatness_weight: Weight = 5.0
    lookahead: Literal["normalised", "raw"] = "normalised"
    lookahead_direction: Direction = "gradient"
    lookahead_radius: Radius = None
    lookahead_radius_in: RadiusIn = "merged"
    attack_learning_rate: Positive = 2e-5
    unrolled_steps: Count = 4
    gradient: Literal["first_order", "exact"] = "first_order"
    variant: Literal["default", "released"] = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.retain_rows >= len(self.retain) >= 1,
            f"retain_rows {self.retain_rows} gives some of the {len(self.retain)} streams no row",
            "raise retain_rows or name fewer streams in retain",
        )
        require(
            self.gradient == "first_order" or self.lookahead_direction == "gradient",
            f"gradient 'exact' is not worked out for direction {self.lookahead_direction!r}",
            "use gradient: first_order",
        )
        self.look_ahead()

    def look_ahead(self) -> LookAhead:
        """Return the look-ahead that these options describe."""
        return LookAhead(
            direction=self.lookahead_direction,
            radius=self.lookahead_radius,
            radius_in=self.lookahead_radius_in,
            raw=self.lookahead == "raw",
            rows=self.harmful_rows,
            learning_rate=self.attack_learning_rate,
            steps=self.unrolled_steps,
        )


RELEASED = {
    "harmful_rows": 10,
    "retain_rows": 10,
    "retain": ("refusal",),
    "flatness_weight": 5.0,
    "lookahead": "normalised",
    "lookahead_direction": "gradient",
    "lookahead_radius": RELEASED_RADIUS,
    "lookahead_radius_in": "factors",
    "gradient": "first_order",
}


class Booster(Method):
    """min l(weights; refusal) + lambda * the harmful loss's fall along its own gradient."""

    name = "booster"
    paper = "arXiv 2409.01586"
    summary = "Flattens the harmful loss along its own gradient."
    defends = "attackers whose first steps follow the harmful gradient, in the adapter it is in"
    limits = "tested by its authors only in that adapter; tuned learning rates break it"
    config_class: ClassVar[type[MethodConfig]] = BoosterConfig

    def __init__(self, config: BoosterConfig) -> None:
        if config.variant == "released":
            config = as_released("Booster", config, RELEASED)
        self.config = config
        self.flattened = config.flatness_weight > 0
        self._ahead = config.look_ahead()

    @property
    def adapter(self) -> Mapping[str, Any]:
        return RELEASED_ADAPTER if self.config.variant == "released" else {}

    @property
    def streams(self) -> tuple[str, ...]:
        harmful = ("harmful",) if self.flattened else ()
        return tuple(dict.fromkeys((*harmful, *self.config.retain)))

    @property
    def passes_per_step(self) -> float:
        if not self.flattened:
            return 1
        if self.config.gradient == "exact":
            return 4
        turned = self.config.lookahead_direction != "gradient"
        return self._ahead.backwards + (3 if turned else 2)

    @property
    def parameter_buffers(self) -> int:
        if not self.flattened:
            return 0
        # Exact: g, v, and what is carried back through g's graph.
        return 3 if self.config.gradient == "exact" else self._ahead.buffers

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("retain", "flatness_norm") if self.flattened else ("retain",)

    def check(self, model: nn.Module | None) -> None:
        """Refuse weights that round the difference away."""
        if model is not None and self.flattened:
            refuse_rounded(rounded_weights(model))

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Measure the radius where asked for."""
        return self._ahead.prepare(context) if self.flattened else {}

    def step(self, context: RunContext) -> dict[str, float]:
        terms: dict[str, float] = {}
        if self.flattened:
            context.space.give_gradient(None)
            with context.oracle.full_precision():
                if self.config.gradient == "exact":
                    self._exact(context, terms)
                elif self.config.lookahead_direction == "gradient":
                    self._along_the_gradient(context, terms)
                else:
                    self._along_another_direction(context, terms)
            terms["flatness"] = terms["harmful"] - terms["harmful_ahead"]
            terms["flatness_norm"] = norm(context.space.gradient())
            context.share("flatness")
            _warn_off_the_slope(context, terms)
        batch = context.draw_joined(self.config.retain, self.config.retain_rows)
        terms["retain"] = context.oracle.accumulate(answer_cross_entropy, batch, purpose="retain")
        if self.flattened:
            context.share("retain")
        return terms

    def _along_the_gradient(self, context: RunContext, terms: dict[str, float]) -> None:
        """Leave lambda * (g - v) in ``.grad``, in place; the saved weights are the one buffer."""
        weight, space = self.config.flatness_weight, context.space
        harmful = self._ahead.gradient(context, terms)
        g = space.gradient()
        shift = -self._ahead.step_along(context, g, terms)
        with space.shifted((shift, g)):
            scale_(g, weight)
            terms["harmful_ahead"] = context.oracle.accumulate(
                answer_cross_entropy, harmful, purpose="flatness", coefficient=-weight
            )

    def _along_another_direction(self, context: RunContext, terms: dict[str, float]) -> None:
        """Do the same where the direction has taken g's place: g is made again."""
        weight, oracle = self.config.flatness_weight, context.oracle
        with self._ahead.shifted(context, terms) as harmful:
            terms["harmful_ahead"] = oracle.accumulate(
                answer_cross_entropy, harmful, purpose="flatness", coefficient=-weight
            )
        terms["harmful"] = oracle.accumulate(
            answer_cross_entropy, harmful, purpose="flatness", coefficient=weight
        )

    def _exact(self, context: RunContext, terms: dict[str, float]) -> None:
        """Leave lambda * (g - J^T v) in ``.grad``; g and v are kept beside it."""
        oracle, space, weight = context.oracle, context.space, self.config.flatness_weight
        harmful = context.draw("harmful", self.config.harmful_rows)
        g, terms["harmful"], graph = gradient_with_graph(
            oracle, answer_cross_entropy, harmful, purpose="look-ahead"
        )
        shift = -self._ahead.step_along(context, g, terms)
        with space.shifted((shift, g)):
            v, terms["harmful_ahead"] = oracle.gradient(
                answer_cross_entropy, harmful, purpose="flatness"
            )
        direction = [(1.0, v)]
        if self.config.lookahead == "normalised":
            direction.append((-dot(g, v) / dot(g, g), g))
        add_exact(
            oracle,
            answer_cross_entropy,
            harmful,
            direction,
            coefficient=-weight * shift,
            purpose="exact",
            graph=graph,
        )
        torch._foreach_add_(space.gradient(), g, alpha=weight)
        torch._foreach_add_(space.gradient(), v, alpha=-weight)

    def state(self) -> dict[str, torch.Tensor]:
        return self._ahead.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._ahead.load_state(state)


def _warn_off_the_slope(context: RunContext, terms: dict[str, float]) -> None:
    if context.step % _WATCH_EVERY == 0 and terms["flatness"] < 0:
        warnings.warn(
            f"the look-ahead left the descent range: at radius {terms['radius']:.3g} the harmful "
            f"loss is {terms['harmful_ahead']:.3g}, {terms['harmful']:.3g} at the weights",
            stacklevel=3,
        )
