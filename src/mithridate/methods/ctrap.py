r"""CTRAP: plant, one harmful step away, a model that predicts one fixed token.

arXiv 2505.16559; code clearloveclearlove/CTRAP@bb0f07e (`methods.md` §4).

.. math:: \min_\theta\; \ell(\theta; R) + \lambda\,\ell_C(\theta'; G), \qquad
          \theta' = \theta - r\,u(\theta),

where l_C is the mean of -log p(e | true context) over the answers of G, and u is the direction of
a harmful step, :math:`\hat g_h` as released. The gradient is :math:`v = \nabla\ell_C(\theta')`
straight through (first order, as released), or exact, with H_h the harmful loss's Hessian:

.. math:: v - \tfrac{r}{\|g_h\|} H_h (v - \hat g_h \langle\hat g_h, v\rangle)
          \quad\text{(raw: } v - \alpha H_h v\text{)}.

====================== =========================== =============================================
paper / code           here                        why
====================== =========================== =============================================
theta - alpha g        ``lookahead="raw"``         the code normalises; so does the default
collapse on D_general  own draw of ``general``     the code relabels the retain batch:
                                                   ``collapse_on="retain"``
restore by adding back by copy, bit for bit        adding back drifts (P2)
a batch at a time      whole step (A1)             the code keeps the last micro-batch only
radius 0.1 in factors  measured, in merged weights 0.1 belongs to alpha / rank = 4 / 32 (`merged`)
====================== =========================== =============================================
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mithridate.chat import Batch
from mithridate.configs import Count, Natural, Positive, Weight, require
from mithridate.errors import InactiveTermError, InputError
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
from mithridate.weights.hvp import add_exact, gradient_with_graph
from mithridate.weights.losses import (
    Loss,
    answer_cross_entropy,
    check_token,
    token_collapse,
    token_probability,
    uniform_collapse,
)
from mithridate.weights.oracle import refuse_rounded, rounded_weights

_WATCH_EVERY = 10
_RARE = 1e-4


@dataclass(frozen=True, kw_only=True)
class CTRAPConfig(MethodConfig):
    """Options of CTRAP.

    Parameters
    ----------
    harmful_rows, retain_rows, collapse_rows
        Rows per step of each batch.
    retain
        Streams of R, shared evenly.
    collapse_weight
        lambda; 0 leaves plain SFT on R, without a look-ahead pass.
    collapse_on
        G: an own draw of ``general``, or the retain batch relabelled.
    collapse_target
        One ``token``, e; or ``uniform``: KL(uniform || p).
    collapse_token
        The id of e; ``None`` takes the last piece of "an error", which answers must not use.
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
    shifted_precision
        Of the passes at the look-ahead: true ``float32``, or the run's ``autocast``, refused where
        a check at the start finds that rounding moves the look-ahead.
    variant
        ``released`` sets every value of the released code, and its adapter (rank 32, alpha 4, on
        query, key and value): for reproduction only.
    """

    harmful_rows: Count = 10
    retain_rows: Count = 10
    collapse_rows: Count = 10
    retain: tuple[str, ...] = ("refusal", "general")
    collapse_weight: Weight = 0.1
    collapse_on: Literal["general", "retain"] = "general"
    collapse_target: Literal["token", "uniform"] = "token"
    collapse_token: Natural | None = None
    lookahead: Literal["normalised", "raw"] = "normalised"
    lookahead_direction: Direction = "gradient"
    lookahead_radius: Radius = None
    lookahead_radius_in: RadiusIn = "merged"
    attack_learning_rate: Positive = 2e-5
    unrolled_steps: Count = 4
    gradient: Literal["first_order", "exact"] = "first_order"
    shifted_precision: Literal["float32", "autocast"] = "float32"
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
            "use gradient: first_order (for sign it is exact)",
        )
        require(
            self.collapse_target == "token" or self.collapse_token is None,
            "collapse_token goes with collapse_target: token, and only with it",
            "use collapse_target: token, or leave collapse_token out",
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
    "retain": ("refusal", "general"),
    "collapse_weight": 0.1,
    "collapse_on": "retain",
    "collapse_target": "token",
    "lookahead": "normalised",
    "lookahead_direction": "gradient",
    "lookahead_radius": RELEASED_RADIUS,
    "lookahead_radius_in": "factors",
    "gradient": "first_order",
    "shifted_precision": "float32",
}


class CTRAP(Method):
    """min l(weights; retain) + lambda * collapse one harmful step away."""

    name = "ctrap"
    paper = "arXiv 2505.16559"
    summary = "Plants a model that predicts one token, one harmful step away."
    defends = "attackers whose steps lead where the look-ahead stepped"
    limits = "planted is not firing: an optimiser that travels elsewhere never meets the trap"
    config_class: ClassVar[type[MethodConfig]] = CTRAPConfig

    def __init__(self, config: CTRAPConfig) -> None:
        if config.variant == "released":
            config = as_released("CTRAP", config, RELEASED)
        self.config = config
        self.trapped = config.collapse_weight > 0
        self._ahead = config.look_ahead()
        self._token = config.collapse_token if config.collapse_target == "token" else None

    @property
    def adapter(self) -> Mapping[str, Any]:
        return RELEASED_ADAPTER if self.config.variant == "released" else {}

    @property
    def streams(self) -> tuple[str, ...]:
        if not self.trapped:
            return tuple(self.config.retain)
        trap = ("harmful", "general") if self.config.collapse_on == "general" else ("harmful",)
        return tuple(dict.fromkeys((*trap, *self.config.retain)))

    @property
    def passes_per_step(self) -> float:
        if not self.trapped:
            return 1
        return self._ahead.backwards + (3 if self.config.gradient == "exact" else 2)

    @property
    def parameter_buffers(self) -> int:
        if not self.trapped:
            return 0
        # Exact: g_h, v, and what is carried back through g_h's graph.
        return 3 if self.config.gradient == "exact" else self._ahead.buffers

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("retain", "collapse") if self.trapped else ("retain",)

    def check(self, model: nn.Module | None) -> None:
        """Refuse weights that round the look-ahead, and a token that the model does not have."""
        if model is None:
            return
        if self.trapped:
            refuse_rounded(rounded_weights(model))
        if self._token is not None:
            check_token(model, self._token)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Choose the collapse token and, where asked for, measure the radius."""
        if not self.trapped:
            return {}
        found = self._ahead.prepare(context)
        if self.config.collapse_target == "token":
            if self._token is None:
                self._token = collapse_token(context, rare=self.config.variant != "released")
            found["collapse_token"] = float(self._token)
        if self.config.shifted_precision == "autocast":
            general, harmful = (
                context.chat.batch(context.examples[name][:rows])
                for name, rows in (
                    (self._collapsing, self.config.collapse_rows),
                    ("harmful", self.config.harmful_rows),
                )
            )
            found |= self._ahead.check_autocast(context, self._loss(), general, harmful)
        return found

    @property
    def _collapsing(self) -> str:
        return "general" if self.config.collapse_on == "general" else self.config.retain[0]

    def _loss(self) -> Loss:
        if self.config.collapse_target == "uniform":
            return uniform_collapse
        if self._token is None:
            raise InactiveTermError("CTRAP has no collapse token: prepare() was not called")
        return token_collapse(self._token)

    def step(self, context: RunContext) -> dict[str, float]:
        retain = context.draw_joined(self.config.retain, self.config.retain_rows)
        terms: dict[str, float] = {}
        if self.trapped:
            relabelled = self.config.collapse_on == "retain"
            batch = retain if relabelled else context.draw("general", self.config.collapse_rows)
            if self.config.gradient == "exact":
                self._exact(context, batch, terms)
            else:
                with self._ahead.shifted(context, terms) as harmful:
                    self._collapse(context, batch, harmful, terms)
            terms["collapse_norm"] = norm(context.space.gradient())
            context.share("collapse")
            self._watch(context, batch, terms, "p_e")
        terms["retain"] = context.oracle.accumulate(answer_cross_entropy, retain, purpose="retain")
        if self.trapped:
            context.share("retain")
        return terms

    def _exact(self, context: RunContext, batch: Batch, terms: dict[str, float]) -> None:
        """Leave lambda * J^T v in ``.grad``; g_h, its graph and v are kept beside it."""
        oracle, space = context.oracle, context.space
        harmful = context.draw("harmful", self.config.harmful_rows)
        g, terms["harmful"], graph = gradient_with_graph(
            oracle, answer_cross_entropy, harmful, purpose="look-ahead"
        )
        shift = -self._ahead.step_along(context, g, terms)
        with oracle.fresh_gradient() as v, space.shifted((shift, g)):
            self._collapse(context, batch, harmful, terms)
        direction = [(1.0, v)]
        if self.config.lookahead == "normalised":
            direction.append((-dot(g, v) / dot(g, g), g))
        add_exact(
            oracle,
            answer_cross_entropy,
            harmful,
            direction,
            coefficient=shift,
            purpose="exact",
            graph=graph,
        )
        torch._foreach_add_(space.gradient(), v)

    def _collapse(
        self, context: RunContext, batch: Batch, harmful: Batch, terms: dict[str, float]
    ) -> None:
        """Add lambda * v to ``.grad``, in true float32: autocast may round the shift (F2)."""
        oracle = context.oracle
        rounding = self.config.shifted_precision == "autocast"
        with nullcontext() if rounding else oracle.full_precision():
            terms["collapse"] = oracle.accumulate(
                self._loss(), batch, purpose="collapse", coefficient=self.config.collapse_weight
            )
            self._watch(context, batch, terms, "p_e_ahead")
            if context.step % _WATCH_EVERY == 0:
                ahead = oracle.loss(answer_cross_entropy, harmful, purpose="watch")
                terms["harmful_ahead"] = ahead
                if ahead > terms["harmful"]:
                    warnings.warn(
                        f"the look-ahead left the descent range: at radius {terms['radius']:.3g} "
                        f"the harmful loss is {ahead:.3g}, {terms['harmful']:.3g} at the weights",
                        stacklevel=2,
                    )

    def _watch(self, context: RunContext, batch: Batch, terms: dict[str, float], name: str) -> None:
        if self._token is not None and context.step % _WATCH_EVERY == 0:
            probability = token_probability(self._token)
            terms[name] = context.oracle.loss(probability, batch, purpose="watch")

    def state(self) -> dict[str, torch.Tensor]:
        return self._ahead.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._ahead.load_state(state)


def collapse_token(context: RunContext, *, rare: bool = True) -> int:
    """Return the last piece of "an error"; it must be an ordinary token, rare in the answers.

    Raises
    ------
    InputError
        Asking for ``collapse_token`` where the rule gives no usable token.
    """
    tokenizer = context.chat.tokenizer
    token = int(tokenizer("an error", add_special_tokens=False)["input_ids"][-1])
    answers = [
        label
        for example in chain.from_iterable(context.examples.values())
        for label in context.chat.answer_ids(example.answer)
    ]
    share = answers.count(token) / max(1, len(answers))
    special = token in tokenizer.all_special_ids
    if special or (rare and share >= _RARE):
        found = "a special token" if special else f"{share:.2%} of the answers' tokens"
        raise InputError(
            f'the last piece of "an error" is {found}',
            where="collapse_token",
            mend="give the id of an ordinary token that answers do not use",
        )
    return token
