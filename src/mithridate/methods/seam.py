r"""SEAM: make harmful descent benign ascent by opposing the two gradients.

arXiv 2505.12186 (ICLR 2026); code ZJUWYH/seam@65f3d5c (`methods.md` §5).

.. math:: L = L_{ul} + \alpha\,\ell(\theta;\text{refusal}) + \beta\cos(g_a, g_b), \qquad
          g_a = \nabla\ell(\theta;\text{harmful}),\ g_b = \nabla\ell(\theta;\text{benign}).

With c the cosine, :math:`\delta_a = \hat g_b - c\,\hat g_a`, :math:`\delta_b` likewise, and H the
losses' Hessians,

.. math:: \nabla c = H_a\delta_a/\|g_a\| + H_b\delta_b/\|g_b\|, \qquad
          H_a\delta_a \approx \|\delta_a\|\,
          \bigl(g_a(\theta + \epsilon\hat\delta_a) - g_a(\theta)\bigr)/\epsilon.

L_ul is -log(1 + S), S the harmful cross-entropy averaged over the output and the inner layers read
through the final norm and head: the log damps the pull by 1/(1 + S), it does not bound the loss.

====================== ============================== ==========================================
released code          here                           why
====================== ============================== ==========================================
L + 2 lens terms       output and layers 1...L-1      the code counts the output twice and norms
                                                      a layer twice: ``unlearning_layers``
ids that differ        answer spans                   off by one in the code, which trains no
                                                      first answer token (not reproduced);
                                                      ``answer_mask="difference"``
benign prompt trained  answer only                    ``benign_labels="all"``
step of length         unit direction                 the probe vanishes as c approaches -1;
eps * ||delta||                                       ``fd_step="released"``
bf16 weights           refused; exact under autocast  the difference is void there (P3)
c per micro-batch      of the whole step (A1)         a cosine of means is not a mean of cosines
c at the weights       the same                       ours, against attackers who leave the point:
                                                      ``coupling_at="trajectory"``, c where a
                                                      simulated attack ends, straight through
6 passes               5 at one micro-batch           lens and refusal share a backward call
====================== ============================== ==========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from mithridate.chat import IGNORE, Batch
from mithridate.configs import Count, Positive, Range, Steps, Weight, require
from mithridate.methods.base import Method, MethodConfig, RunContext, as_released
from mithridate.methods.coupling import Coupling
from mithridate.methods.pairs import Pair, telling_pairs, without_common_tokens
from mithridate.methods.unlearning import Kind, Layers, Unlearning
from mithridate.methods.walkers import Walker
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import scale_
from mithridate.weights.losses import answer_cross_entropy
from mithridate.weights.oracle import refuse_rounded, rounded_weights


@dataclass(frozen=True, kw_only=True)
class SEAMConfig(MethodConfig):
    """Options of SEAM.

    Parameters
    ----------
    batch_size
        Rows per step of each of the three streams.
    refusal_weight
        alpha, of the refusals' cross-entropy; 0 makes no pass.
    coupling_weight
        beta, of the cosine; 0 makes no pass (the ablation).
    unlearning
        L_ul: ``layerwise_log``, ``log`` (output only, costs nothing), ``ascent`` (-l, unbounded)
        or ``none``.
    unlearning_layers
        Inner layers read: ``all`` (1...L-1), ``released``, or how many are drawn per step.
    unlearning_cap
        Clamps S, so that the pull ends there; log|V| is a natural value.
    hvp
        ``finite``, ``central`` (2 passes more), ``exact``, or ``auto``: finite in true float32;
        exact under autocast, or where the model's frozen weights are in half precision.
    epsilon
        L2 length of the finite difference; ``auto`` chooses by the fidelity check.
    fd_step
        ``released``: length epsilon * ||delta||.
    answer_mask
        ``difference``: only harmful and refusal tokens that differ at their position; pairs the
        two streams by prompt.
    benign_labels
        ``all`` trains the benign prompt too.
    coupling_at
        ``point``: the present weights. ``trajectory``: where a simulated AdamW attack ends, first
        order (its steps are not differentiated).
    attack_steps
        Of the simulated attack, drawn uniformly for each step.
    attack_learning_rate
        Of the simulated attack, drawn log-uniformly for each step.
    attack_rows
        Examples in the simulated attack's data set, drawn for each step.
    variant
        ``released`` sets every value of the released code: for reproduction only.
    """

    batch_size: Count = 8
    refusal_weight: Weight = 1.0
    coupling_weight: Weight = 0.01
    unlearning: Kind = "layerwise_log"
    unlearning_layers: Layers = "all"
    unlearning_cap: Positive | None = None
    hvp: Literal["auto", "finite", "central", "exact"] = "auto"
    epsilon: Positive | Literal["auto"] = "auto"
    fd_step: Literal["unit", "released"] = "unit"
    answer_mask: Literal["answer", "difference"] = "answer"
    benign_labels: Literal["answer", "all"] = "answer"
    coupling_at: Literal["point", "trajectory"] = "point"
    attack_steps: Steps = (1, 10)
    attack_learning_rate: Range = (2e-5, 2e-4)
    attack_rows: Count = 20
    variant: Literal["default", "released"] = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.refusal_weight + self.coupling_weight > 0 or self.unlearning != "none",
            "no term of SEAM is left",
            "give a weight above 0 to at least one term",
        )


RELEASED = {
    "batch_size": 8,
    "refusal_weight": 1.0,
    "coupling_weight": 0.01,
    "unlearning": "layerwise_log",
    "unlearning_layers": "released",
    "unlearning_cap": None,
    "hvp": "finite",
    "epsilon": 1e-3,
    "fd_step": "released",
    "answer_mask": "difference",
    "benign_labels": "all",
    "coupling_at": "point",
}


class SEAM(Method):
    """min unlearning + alpha * l(refusal) + beta * cos(harmful gradient, benign gradient)."""

    name = "seam"
    paper = "arXiv 2505.12186"
    summary = "Couples harmful descent to benign ascent through the cosine of two gradients."
    defends = "supervised fine-tuning near the released weights"
    limits = "the coupling is local; low learning rates, projected gradients and RL walk around it"
    config_class: ClassVar[type[MethodConfig]] = SEAMConfig

    def __init__(self, config: SEAMConfig) -> None:
        if config.variant == "released":
            config = as_released("SEAM", config, RELEASED)
        self.config = config
        self.coupled = config.coupling_weight > 0
        self.walks = self.coupled and config.coupling_at == "trajectory"
        self._attacker = Walker("attack", "steps", steps=config.attack_steps, life=(1, 1),
                                learning_rates={"adamw": config.attack_learning_rate},
                                batch_size=config.batch_size)  # fmt: skip
        self._coupling = Coupling(
            config.coupling_weight, config.hvp, config.epsilon, config.fd_step
        )
        self._unlearning = Unlearning(
            config.unlearning, config.unlearning_layers, config.unlearning_cap
        )
        self._pairs: list[Pair] = []

    @property
    def streams(self) -> tuple[str, ...]:
        harmful = self.coupled or self.config.unlearning != "none"
        used = {"harmful": harmful, "refusal": self.config.refusal_weight, "benign": self.coupled}
        return tuple(name for name, active in used.items() if active)

    @property
    def passes_per_step(self) -> float:
        passes: float = len(self.streams)
        if self.walks:
            # L_ul needs the harmful batch at the weights, c at the attack's end.
            passes += bool(self.config.unlearning != "none") + self._attacker.mean_passes
            return passes + self._coupling.backwards
        if self.coupled:
            passes += self._coupling.backwards
            if self.config.unlearning == "layerwise_log" and not self.config.refusal_weight:
                passes += 1
        return passes

    @property
    def parameter_buffers(self) -> int:
        # Gradients that turn into the weights of a forward difference; other products add one.
        # Until it is prepared, auto counts as finite, as its passes do.
        more = self._coupling.hvp not in ("auto", "finite")
        return 2 + more + self.walks if self.coupled else 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        terms = ["harmful_norm", "benign_norm"] if self.coupled else []
        if self.config.unlearning != "none":
            terms.append("unlearning")
        return (*terms, "refusal") if self.config.refusal_weight else tuple(terms)

    def check(self, model: nn.Module | None) -> None:
        """Refuse a model without the layers to be read, and differences that would be rounded."""
        if model is None:
            return
        self._unlearning.check(model)
        if self.coupled and self.config.hvp in ("finite", "central"):
            refuse_rounded(rounded_weights(model))

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Pair the streams where asked for, and check the differences of gradients (F1)."""
        if self.config.answer_mask == "difference":
            self._pairs = telling_pairs(context)
        if not self.coupled:
            return {}
        harmful, benign = (
            context.chat.batch(context.examples[name][: self.config.batch_size])
            for name in ("harmful", "benign")
        )
        with self._simulated(context, {}):
            return self._coupling.prepare(context, harmful, benign)

    def step(self, context: RunContext) -> dict[str, float]:
        context.space.give_gradient(None)
        batches = self._draw(context)
        terms: dict[str, float] = {}
        if self.walks:
            with self._simulated(context, terms):
                self._couple(context, batches, None, terms)
            coupling = context.space.take_gradient()
            self._unlearn(context, batches, None, terms)
            torch._foreach_add_(context.space.gradient(), coupling)
        else:
            g_a: Gradient | None = [] if self.coupled else None
            self._unlearn(context, batches, g_a, terms)
            if g_a is not None:
                self._couple(context, batches, g_a, terms)
        if self.coupled:
            context.share("coupling")
        return terms

    def _unlearn(
        self,
        context: RunContext,
        batches: dict[str, Batch],
        g_a: Gradient | None,
        terms: dict[str, float],
    ) -> None:
        """Put the gradient of L_ul + alpha * L_up into an empty ``.grad``; fill ``g_a``."""
        oracle, alpha = context.oracle, self.config.refusal_weight
        unlearning, done = self.config.unlearning != "none", False
        with nullcontext() if g_a is None else self._coupling.precision(context):
            if g_a is not None and alpha > 0:
                done = self._unlearning.add_with_refusals(
                    context, batches["harmful"], terms, g_a, batches["refusal"], alpha
                )
            if not done and (unlearning or g_a is not None):
                self._unlearning.add(context, batches["harmful"], terms, g_a)
        if done and context.shares is not None:
            # One call made both: only a pass of its own tells them apart.
            refusal, _ = oracle.gradient(answer_cross_entropy, batches["refusal"], purpose="watch")
            scale_(refusal, alpha)
            context.share("refusal", refusal)
        if unlearning:
            context.share("unlearning")
        if not done and alpha > 0:
            terms["refusal"] = oracle.accumulate(
                answer_cross_entropy, batches["refusal"], purpose="refusal", coefficient=alpha
            )
            context.share("refusal")

    def _couple(
        self,
        context: RunContext,
        batches: dict[str, Batch],
        g_a: Gradient | None,
        terms: dict[str, float],
    ) -> None:
        """Add the gradient of beta * c at the weights as they stand; ``g_a`` where known."""
        harmful, benign = batches["harmful"], batches["benign"]
        with self._coupling.precision(context):
            if g_a is None:
                g_a, terms["harmful_ahead"] = context.oracle.gradient(
                    answer_cross_entropy, harmful, purpose="harmful ahead"
                )
            g_b, terms["benign"], graph = self._coupling.last_gradient(
                context, benign, purpose="benign"
            )
        self._coupling.add(context, harmful, g_a, benign, g_b, terms, graph)

    @contextmanager
    def _simulated(self, context: RunContext, terms: dict[str, float]) -> Iterator[None]:
        """Run the body where a simulated attack ends, if it is there that c is to be lowered."""
        if not self.walks:
            yield
            return
        with context.space.kept() as start:
            terms |= self._attacker.walk(
                context, start, lambda rng: context.some("harmful", self.config.attack_rows, rng)
            )
            yield

    def _draw(self, context: RunContext) -> dict[str, Batch]:
        rows = self.config.batch_size
        if self.config.answer_mask == "difference":
            evenly = not context.balanced.isdisjoint(("harmful", "refusal"))
            categories = [harmful.category for harmful, _ in self._pairs] if evenly else None
            chosen = context.rows_of_step(len(self._pairs), rows, "seam", categories)
            harmful, refusal = (
                context.chat.batch([self._pairs[row][side] for row in chosen]) for side in (0, 1)
            )
            found = {
                "harmful": without_common_tokens(harmful, refusal),
                "refusal": without_common_tokens(refusal, harmful),
            }
            if self.coupled:
                found["benign"] = context.draw("benign", rows)
            batches = {name: found[name] for name in self.streams}
        else:
            batches = {name: context.draw(name, rows) for name in self.streams}
        if self.config.benign_labels == "all" and "benign" in batches:
            batch = batches["benign"]
            labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
            batches["benign"] = replace(batch, labels=labels)
        return batches
