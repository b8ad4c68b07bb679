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
6 passes               5 at one micro-batch           lens and refusal share a backward call
====================== ============================== ==========================================
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mithridate.chat import IGNORE, Batch
from mithridate.configs import require
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.methods.coupling import Coupling
from mithridate.methods.pairs import Pair, pair_by_prompt, without_common_tokens
from mithridate.methods.unlearning import Kind, Layers, Unlearning
from mithridate.weights.losses import answer_cross_entropy


@dataclass(frozen=True, kw_only=True)
class SEAMConfig(MethodConfig):
    """Options of SEAM.

    Parameters
    ----------
    batch_size
        Rows per step of each of the three streams.
    refusal_weight, coupling_weight
        alpha and beta; 0 makes no pass.
    unlearning
        L_ul: ``layerwise_log``, ``log`` (output only, costs nothing), ``ascent`` (-l, unbounded)
        or ``none``.
    unlearning_layers
        Inner layers read: ``all`` (1...L-1), ``released``, or how many are drawn per step.
    unlearning_cap
        Clamps S, so that the pull ends there; log|V| is a natural value.
    hvp
        ``finite``, ``central`` (2 passes more), ``exact``, or ``auto``: finite in true float32,
        exact under autocast.
    epsilon
        L2 length of the finite difference; ``auto`` chooses by the fidelity check.
    fd_step
        ``released``: length epsilon * ||delta||.
    answer_mask
        ``difference``: only harmful and refusal tokens that differ at their position; pairs the
        two streams by prompt.
    benign_labels
        ``all`` trains the benign prompt too.
    variant
        ``released`` sets every value of the released code: for reproduction only.
    """

    batch_size: int = 8
    refusal_weight: float = 1.0
    coupling_weight: float = 0.01
    unlearning: Kind = "layerwise_log"
    unlearning_layers: Layers = "all"
    unlearning_cap: float | None = None
    hvp: Literal["auto", "finite", "central", "exact"] = "auto"
    epsilon: float | Literal["auto"] = "auto"
    fd_step: Literal["unit", "released"] = "unit"
    answer_mask: Literal["answer", "difference"] = "answer"
    benign_labels: Literal["answer", "all"] = "answer"
    variant: Literal["default", "released"] = "default"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size is below 1", "give at least one row")
        require(
            min(self.refusal_weight, self.coupling_weight) >= 0
            and (self.refusal_weight or self.coupling_weight or self.unlearning != "none") != 0,
            "SEAM's weights are negative, or no term is left",
            "give a weight above 0 to at least one term",
        )
        for name in ("unlearning_layers", "epsilon", "unlearning_cap"):
            value = getattr(self, name)
            require(
                not isinstance(value, (int, float)) or value > 0,
                f"{name} {value!r} is not above 0",
                "give a number above 0, or leave it at its default",
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
            warnings.warn("SEAM as released is for reproduction only", stacklevel=2)
            config = replace(config, **RELEASED)  # type: ignore[arg-type]
        self.config = config
        self.coupled = config.coupling_weight > 0
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
        passes = len(self.streams)
        if self.coupled:
            passes += self._coupling.backwards
            if self.config.unlearning == "layerwise_log" and not self.config.refusal_weight:
                passes += 1
        return passes

    @property
    def parameter_buffers(self) -> int:
        return 3 if self.coupled else 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        terms = ["harmful_norm", "benign_norm"] if self.coupled else []
        if self.config.unlearning != "none":
            terms.append("unlearning")
        return (*terms, "refusal") if self.config.refusal_weight else tuple(terms)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Pair the streams where asked for, and check the Hessian-vector products (F1)."""
        if self.config.answer_mask == "difference":
            self._pairs = pair_by_prompt(context.examples["harmful"], context.examples["refusal"])
        if not self.coupled:
            return {}
        harmful, benign = (
            context.chat.batch(context.examples[name][: self.config.batch_size])
            for name in ("harmful", "benign")
        )
        return self._coupling.prepare(context, harmful, benign)

    def step(self, context: RunContext) -> dict[str, float]:
        oracle, alpha = context.oracle, self.config.refusal_weight
        context.space.give_gradient(None)
        batches = self._draw(context)
        terms: dict[str, float] = {}
        done, g_a = False, context.space.zeros() if self.coupled else None
        precision = self._coupling.precision(context) if self.coupled else nullcontext()
        with precision:
            if g_a is not None and alpha > 0:
                done = self._unlearning.add_with_refusals(
                    context, batches["harmful"], terms, g_a, batches["refusal"], alpha
                )
            if not done and "harmful" in batches:
                self._unlearning.add(context, batches["harmful"], terms, g_a)
        if not done and alpha > 0:
            terms["refusal"] = oracle.accumulate(
                answer_cross_entropy, batches["refusal"], purpose="refusal", coefficient=alpha
            )
        if g_a is not None:
            with self._coupling.precision(context):
                g_b, terms["benign"] = oracle.gradient(
                    answer_cross_entropy, batches["benign"], purpose="benign"
                )
            self._coupling.add(context, batches["harmful"], g_a, batches["benign"], g_b, terms)
        return terms

    def _draw(self, context: RunContext) -> dict[str, Batch]:
        rows = self.config.batch_size
        if self.config.answer_mask == "difference":
            chosen = context.rows_of_step(len(self._pairs), rows, "seam")
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
