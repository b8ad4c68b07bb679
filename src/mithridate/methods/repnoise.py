r"""RepNoise: push the activations of harmful answers towards noise.

arXiv 2405.14577 (NeurIPS 2024); code domenicrosati/representation-noising@03689ff
(`methods.md` §10), which its authors call incomplete.

.. math:: \ell(\theta; \text{refusal}) + \beta\,\text{mean}_l\,\text{MMD}^2(m_l, N(0, I))
          - \alpha\log(1 + S),

with m_l the outputs of layer l's MLP at the tokens of harmful answers, and S the harmful
cross-entropy averaged over the output and the inner layers read through the final norm and head.
The maximum mean discrepancy and its kernel are `noise.mmd`'s.

====================== =========================== =============================================
released code          here                        why
====================== =========================== =============================================
a point: a whole       a point: an answer token,   4 against 4 points in 10^6 dimensions tell
sequence; biased       at most 256 drawn; unbiased little: ``noise_loss="released"``
ids that differ        answer spans                off by one in the code, which trains no first
                                                   answer token (not reproduced);
                                                   ``answer_mask="difference"``
pads trained           never                       masked in both forms
L + 2 lens terms       output and layers 1...L-1   counts the output twice: ``unlearning_layers``
hooks pile up          removed after each pass     they are run once each
====================== =========================== =============================================

beta belongs to an estimator: it is to be chosen anew with ``noise_loss`` and ``mmd_points``. Both S
and MMD are of the whole step (A1): several micro-batches, or processes, cost one forward pass more,
which finds S and the activations; each micro-batch is walked back from MMD's gradient by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from mithridate.chat import IGNORE, Batch
from mithridate.configs import Count, Limit, Positive, Weight
from mithridate.methods.base import Method, MethodConfig, RunContext, as_released
from mithridate.methods.noise import Noise, at_answers
from mithridate.methods.pairs import Pair, telling_pairs, without_common_tokens
from mithridate.methods.sites import outputs_seen, sites_of
from mithridate.methods.unlearning import Layers, Unlearning
from mithridate.weights.losses import answer_cross_entropy, layerwise_cross_entropy

Points = Annotated[int, Limit("2 or more", lambda n: n >= 2)]


@dataclass(frozen=True, kw_only=True)
class RepNoiseConfig(MethodConfig):
    """Options of RepNoise.

    Parameters
    ----------
    batch_size
        Rows per step of each stream.
    unlearning_weight
        alpha; 0 makes no such term.
    noise_weight
        beta; 0 makes no such term.
    noise_loss
        Points that are compared with noise: answer ``tokens``, or whole rows (``released``).
    mmd_points
        Most answer tokens that are compared, drawn anew each step.
    unlearning_layers
        Inner layers read: ``all`` (1...L-1), ``released``, or how many are drawn per step.
    unlearning_cap
        Clamps S, so that the pull ends there; log|V| is a natural value.
    answer_mask
        ``difference``: only harmful and refusal tokens that differ at their position; pairs the
        two streams by prompt.
    variant
        ``released`` sets every value of the released code: for reproduction only.
    """

    batch_size: Count = 4
    unlearning_weight: Weight = 1.0
    noise_weight: Weight = 1e-3
    noise_loss: Literal["tokens", "released"] = "tokens"
    mmd_points: Points = 256
    unlearning_layers: Layers = "all"
    unlearning_cap: Positive | None = None
    answer_mask: Literal["answer", "difference"] = "answer"
    variant: Literal["default", "released"] = "default"


RELEASED = {
    "batch_size": 4,
    "unlearning_weight": 1.0,
    "noise_weight": 1e-3,
    "noise_loss": "released",
    "unlearning_layers": "released",
    "unlearning_cap": None,
    "answer_mask": "difference",
}


class RepNoise(Method):
    """min l(refusal) + beta * MMD^2(harmful activations, noise) - alpha * log(1 + S)."""

    name = "repnoise"
    paper = "arXiv 2405.14577"
    summary = "Pushes the activations of harmful answers towards noise, and unlearns the answers."
    defends = "supervised fine-tuning at low learning rates"
    limits = "its weights must be searched anew each time; another seed or order may break it"
    config_class: ClassVar[type[MethodConfig]] = RepNoiseConfig

    def __init__(self, config: RepNoiseConfig) -> None:
        if config.variant == "released":
            config = as_released("RepNoise", config, RELEASED)
        self.config = config
        self._unlearning = Unlearning(
            "layerwise_log" if config.unlearning_weight else "none",
            config.unlearning_layers,
            config.unlearning_cap,
        )
        self._noise = Noise(config.noise_loss, config.mmd_points)
        self._pairs: list[Pair] = []

    @property
    def streams(self) -> tuple[str, ...]:
        pushed = self.config.unlearning_weight or self.config.noise_weight
        return ("harmful", "refusal") if pushed else ("refusal",)

    @property
    def _paired(self) -> bool:
        return self.config.answer_mask == "difference" and "harmful" in self.streams

    @property
    def passes_per_step(self) -> float:
        return len(self.streams)

    @property
    def parameter_buffers(self) -> int:
        return 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        weights = {
            "unlearning": self.config.unlearning_weight,
            "noise": self.config.noise_weight,
            "refusal": 1.0,
        }
        return tuple(name for name, weight in weights.items() if weight)

    def check(self, model: nn.Module | None) -> None:
        """Refuse a model without the layers to be read, or the sites to be made noise."""
        if model is not None:
            self._unlearning.check(model)
            if self.config.noise_weight:
                sites_of(model, "mlp")

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Pair the streams where asked for."""
        if self._paired:
            self._pairs = telling_pairs(context)
        return {}

    def step(self, context: RunContext) -> dict[str, float]:
        context.space.give_gradient(None)
        batches = self._draw(context)
        terms: dict[str, float] = {}
        if "harmful" in batches:
            self._push(context, batches["harmful"], terms)
        terms["refusal"] = context.oracle.accumulate(
            answer_cross_entropy, batches["refusal"], purpose="refusal"
        )
        if "harmful" in batches:
            context.share("refusal")
        return terms

    def _push(self, context: RunContext, harmful: Batch, terms: dict[str, float]) -> None:
        """Put the gradients of the two terms on the harmful batch into an empty ``.grad``."""
        oracle, count = context.oracle, harmful.label_count
        alpha, beta = self.config.unlearning_weight, self.config.noise_weight
        layers, heads = self._unlearning.read(context)
        sites = sites_of(oracle.model, "mlp") if beta else []
        pieces = oracle.micro_batches(harmful)
        found: tuple[float, list[list[torch.Tensor]]] | None = None
        if len(pieces) > 1 or oracle.processes > 1:
            found = self._look(context, harmful, sites, layers, heads, terms)
        pushes = iter(found[1] if found else ())
        # Only steps that ask for each term's share pay for telling the terms apart.
        apart = context.space.zeros() if alpha and beta and context.shares is not None else None
        output_mean = 0.0

        def forward(piece: Batch) -> list[torch.Tensor]:
            nonlocal output_mean
            with outputs_seen(sites) as outputs:
                output, lens = layerwise_cross_entropy(oracle.model, piece, layers)
            output_mean += float(output.detach()) / count
            parts = []
            if alpha:
                mean = (output + lens) / heads / count
                pull = found[0] if found else self._unlearning.pull(float(mean.detach()), terms)
                parts.append(alpha * pull * mean)
            if beta:
                states = at_answers(piece, outputs)
                if found:
                    noise = torch.stack(
                        [(x * push).sum() for x, push in zip(states, next(pushes), strict=True)]
                    ).sum()
                else:
                    noise = self._noise.loss(context, harmful, states)
                    terms["noise"] = float(noise.detach())
                parts.append(beta * noise)
            return parts if apart else [torch.stack(parts).sum()]

        for piece in pieces:
            oracle.backward(
                lambda piece=piece: forward(piece),  # type: ignore[misc]
                tokens=piece.tokens,
                purpose="harmful",
                into=(None, apart) if apart else (None,),
            )
        gradient = context.space.gradient()
        oracle.reduce(gradient)
        context.share("unlearning" if alpha else "noise")
        if apart:
            oracle.reduce(apart)
            torch._foreach_add_(gradient, apart)
            context.share("noise")
        terms["harmful"] = oracle.all_sum(output_mean)

    def _look(
        self,
        context: RunContext,
        harmful: Batch,
        sites: Sequence[nn.Module],
        layers: Sequence[int],
        heads: int,
        terms: dict[str, float],
    ) -> tuple[float, list[list[torch.Tensor]]]:
        """Return f'(S), and the gradient of MMD^2 by each micro-batch's states at each site.

        Both are of the whole step (A1): a pass without a gradient finds S and the states.
        """
        oracle, states = context.oracle, list[list[torch.Tensor]]()

        def look(model: nn.Module, piece: Batch) -> torch.Tensor:
            with outputs_seen(sites) as outputs:
                output, lens = layerwise_cross_entropy(model, piece, layers)
            states.append(at_answers(piece, outputs))
            return (output + lens) / heads

        mean = oracle.loss(look, harmful, purpose="S")
        pull = self._unlearning.pull(mean, terms) if self.config.unlearning_weight else 0.0
        if not sites:
            return pull, []
        before = [0, *(harmful.labels != IGNORE).sum(dim=1).cumsum(dim=0).tolist()]
        spans = [
            slice(before[first], before[first] + len(own[0]))
            for first, own in zip(oracle.first_rows(harmful), states, strict=True)
        ]
        config: Any = oracle.model.config
        width = config.get_text_config().hidden_size
        everywhere = [context.space.tensors[0].new_zeros(before[-1], width) for _ in sites]
        for site, whole in enumerate(everywhere):
            for span, own in zip(spans, states, strict=True):
                whole[span] = own[site]
        oracle.reduce(everywhere)
        leaves = [whole.requires_grad_() for whole in everywhere]
        noise = self._noise.loss(context, harmful, leaves)
        terms["noise"] = float(noise.detach())
        pushes = torch.autograd.grad(noise, leaves)
        return pull, [[push[span] for push in pushes] for span in spans]

    def _draw(self, context: RunContext) -> dict[str, Batch]:
        rows = self.config.batch_size
        if not self._paired:
            return {name: context.draw(name, rows) for name in self.streams}
        evenly = not context.balanced.isdisjoint(self.streams)
        categories = [pair[0].category for pair in self._pairs] if evenly else None
        chosen = context.rows_of_step(len(self._pairs), rows, "repnoise", categories)
        harmful, refusal = (
            context.chat.batch([self._pairs[row][side] for row in chosen]) for side in (0, 1)
        )
        return {
            "harmful": without_common_tokens(harmful, refusal),
            "refusal": without_common_tokens(refusal, harmful),
        }
