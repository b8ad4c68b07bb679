r"""Vaccine: alignment that holds while the hidden embeddings drift.

arXiv 2402.01109 (NeurIPS 2024); code git-disl/Vaccine@8937f68 (`methods.md` §7).

.. math:: \min_\theta \max_{\|\epsilon\| \le \rho} \ell(\theta; e + \epsilon), \qquad
          \epsilon_l = \rho\,\nabla_{e_l}\ell \,/\, \|(\nabla_{e_1}\ell, \dots,
          \nabla_{e_L}\ell)\|,

with e_l the output of layer l's attention and epsilon a constant of the second pass, whose
gradient is the update.

====================== =========================== =============================================
paper / code           here                        why
====================== =========================== =============================================
layer embeddings       attention outputs           as the code; ``site="block"`` as the paper
one norm per batch     same, of the whole step     per token it shrinks with the batch:
                                                   ``radius_scope``
weights' gradients of  never computed              only the sites' are wanted
pass 1 thrown away
dropout in both passes none                        both passes must see one network (S2)
a batch at a time      whole step (A1)             the code keeps the last micro-batch only
====================== =========================== =============================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from mithridate.chat import Batch
from mithridate.configs import Count, Weight, require
from mithridate.errors import InactiveTermError
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.methods.sites import outputs_changed, sites_of, walk_sites
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy

_OWN_DIMENSIONS = {"batch": 0, "sequence": 1, "token": 2}


@dataclass(frozen=True, kw_only=True)
class VaccineConfig(MethodConfig):
    """Options of Vaccine.

    Parameters
    ----------
    batch_size
        Rows per step, shared evenly among ``retain``.
    retain
        Streams of the alignment data.
    radius
        rho, an L2 length over activations; 0 leaves plain SFT, in one pass.
    radius_scope
        Whose length it is: the whole step's, or each ``sequence``'s or ``token``'s own.
    site
        Outputs of each layer's ``attention``, or of the whole ``block``.
    """

    batch_size: Count = 5
    retain: tuple[str, ...] = ("refusal", "benign")
    radius: Weight = 2.0
    radius_scope: Literal["batch", "sequence", "token"] = "batch"
    site: Literal["attention", "block"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size >= len(self.retain) >= 1,
            f"batch_size {self.batch_size} gives some of the {len(self.retain)} streams no row",
            "raise batch_size or name fewer streams in retain",
        )


class Vaccine(Method):
    """min l(weights; embeddings + their worst drift of length rho)."""

    name = "vaccine"
    paper = "arXiv 2402.01109"
    summary = "Trains refusals to hold under the worst small drift of the hidden embeddings."
    defends = "mixtures of a few harmful rows into benign fine-tuning"
    limits = "no wall: by its own paper it lowers the harm, and leaves much of it"
    config_class: ClassVar[type[MethodConfig]] = VaccineConfig

    def __init__(self, config: VaccineConfig) -> None:
        self.config = config

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.retain)

    @property
    def passes_per_step(self) -> float:
        return 2 if self.config.radius else 1

    @property
    def parameter_buffers(self) -> int:
        return 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("retain", "site_norm") if self.config.radius else ("retain",)

    def check(self, model: nn.Module | None) -> None:
        """Refuse a model without the sites."""
        if model is not None:
            sites_of(model, self.config.site)

    def step(self, context: RunContext) -> dict[str, float]:
        batch = context.draw_joined(self.config.retain, self.config.batch_size)
        sites = sites_of(context.oracle.model, self.config.site)
        return train_under_drift(context.oracle, sites, batch, self.config)


def train_under_drift(
    oracle: GradientOracle, sites: Sequence[nn.Module], batch: Batch, config: VaccineConfig
) -> dict[str, float]:
    """Add the gradient of l(e + epsilon) to ``.grad``, epsilon being a constant.

    Returns
    -------
    dict
        ``retain``: l(e); and, with a radius, ``drifted``: l(e + epsilon), and ``site_norm``: the
        L2 norm of l's gradient by e over all sites.
    """
    if config.radius == 0:
        return {"retain": oracle.accumulate(answer_cross_entropy, batch, purpose="retain")}
    drifts, terms = worst_drift(oracle, sites, batch, config)
    walk, drift = iter(drifts), drifts[0] if drifts else {}

    def loss(model: nn.Module, piece: Batch) -> torch.Tensor:
        nonlocal drift
        drift = next(walk)
        return answer_cross_entropy(model, piece)

    with outputs_changed(sites, lambda site, output: output + drift[site].to(output.dtype)):
        terms["drifted"] = oracle.accumulate(loss, batch, purpose="update")
    return terms


def worst_drift(
    oracle: GradientOracle, sites: Sequence[nn.Module], batch: Batch, config: VaccineConfig
) -> tuple[list[dict[int, torch.Tensor]], dict[str, float]]:
    """Return epsilon of each micro-batch and site, and the terms of the first pass."""
    found: list[dict[int, torch.Tensor]] = []
    total = 0.0
    for piece in oracle.micro_batches(batch):
        found.append({})
        total += walk_sites(
            oracle, sites, piece, batch.label_count, found[-1].__setitem__, purpose="perturbation"
        )
    terms = {"retain": oracle.all_sum(total)}
    own = _OWN_DIMENSIONS[config.radius_scope]
    squares = [
        torch.stack([g.flatten(own).double().square().sum(dim=-1) for g in each.values()]).sum(0)
        for each in found
    ]
    whole = oracle.all_sum(sum(float(square.sum()) for square in squares))
    if whole == 0:
        raise InactiveTermError("no site has a gradient: there is no drift to train against")
    terms["site_norm"] = math.sqrt(whole)
    for gradients, square in zip(found, squares, strict=True):
        size = (square if own else torch.full_like(square, whole)).sqrt()
        # Padding has no gradient of its own and does not drift.
        length = torch.where(size > 0, config.radius / size, 0.0)
        for site, g in gradients.items():
            factor = length.reshape(length.shape + (1,) * (g.dim() - own))
            gradients[site] = g * factor.to(g.dtype)
    return found, terms
