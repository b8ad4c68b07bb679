r"""T-Vaccine: Vaccine on a few layers, drawn by how much the harmful loss pulls at them.

arXiv 2410.09760; code Lslland/T-Vaccine@4513750 (`methods.md` §8).

.. math:: p_l = s_l \Big/ \sum_k s_k, \qquad s_l = \|\nabla_{e_l}\ell(\theta;\text{harmful})\|,

S layers are drawn by p without replacement; only they drift (epsilon of norm rho over their sites
alone) and only they train.

====================== =========================== =============================================
paper / code           here                        why
====================== =========================== =============================================
a draw per step        every 20 steps              as the code; ``redraw_every=1`` as the paper
s of one batch         mean of 4                   one batch is noise; ``statistic_batches=1``
8 of 32 layers         a quarter                   models differ in depth; ``layers``
LoRA factors           any weights                 outside the layers (embeddings, head) a full
                                                   model is frozen: only drawn layers train
stale Adam moments     kept, logged                ``idle_layers``: trained once, not drawn now
undrawn layers' MLPs   frozen                      the paper freezes undrawn layers; the code
                                                   freezes their attention alone, and most of its
                                                   update is MLPs': ``undrawn="mlp"``
====================== =========================== =============================================
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mithridate.configs import Count, Weight, require
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods.base import Method, MethodConfig, RunContext, as_released
from mithridate.methods.sites import sites_of, walk_sites
from mithridate.methods.vaccine import VaccineConfig, train_under_drift
from mithridate.weights.maps import blocks_of


@dataclass(frozen=True, kw_only=True)
class TVaccineConfig(VaccineConfig):
    """Options of T-Vaccine, beside those of `VaccineConfig`.

    Parameters
    ----------
    layers
        S; ``None``: a quarter of the model's layers, as published.
    redraw_every
        Steps between draws of the layers.
    refresh_every
        Steps between measurements of s.
    statistic_batches
        Harmful batches, of ``batch_size`` rows each, whose s are averaged.
    undrawn
        Layers that are not drawn stay ``frozen``, or train their ``mlp``.
    variant
        ``released`` sets every value of the released code, and its adapter (rank 8, alpha 4, on
        seven projections): for reproduction only.
    """

    batch_size: Count = 10
    radius: Weight = 3.0
    layers: Count | None = None
    redraw_every: Count = 20
    refresh_every: Count = 200
    statistic_batches: Count = 4
    undrawn: Literal["frozen", "mlp"] = "frozen"
    variant: Literal["default", "released"] = "default"


RELEASED = {
    "batch_size": 10,
    "radius": 3.0,
    "radius_scope": "batch",
    "site": "attention",
    "layers": None,
    "redraw_every": 20,
    "refresh_every": 200,
    "statistic_batches": 1,
    "undrawn": "mlp",
}
RELEASED_ADAPTER: dict[str, Any] = {
    "lora_rank": 8,
    "lora_alpha": 4,
    "lora_targets": (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ),
}  # fmt: skip


class TVaccine(Method):
    """min l(drawn layers' weights; their embeddings + the worst drift of length rho)."""

    name = "tvaccine"
    paper = "arXiv 2410.09760"
    summary = "Vaccine on a few layers at a time, drawn by the harmful gradient's size."
    defends = "mixtures of a few harmful rows into benign fine-tuning, in less memory"
    limits = "as Vaccine; a layer that is hardly ever drawn is hardly ever trained"
    config_class: ClassVar[type[MethodConfig]] = TVaccineConfig

    def __init__(self, config: TVaccineConfig) -> None:
        if config.variant == "released":
            config = as_released("T-Vaccine", config, RELEASED)
        self.config = config
        self._probabilities: list[float] = []
        self._drawn: list[int] = []
        self._steps: list[int] = []

    @property
    def adapter(self) -> Mapping[str, Any]:
        return RELEASED_ADAPTER if self.config.variant == "released" else {}

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("harmful", *self.config.retain)))

    @property
    def passes_per_step(self) -> float:
        statistic: float = self.config.statistic_batches / self.config.refresh_every
        return (2 if self.config.radius else 1) + statistic

    @property
    def parameter_buffers(self) -> int:
        return 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("retain", "site_norm") if self.config.radius else ("retain",)

    def check(self, model: nn.Module | None) -> None:
        """Refuse a model that has not as many layers."""
        if model is None:
            return
        depth = len(blocks_of(model))
        sites_of(model, self.config.site)
        if self.config.undrawn == "mlp":
            sites_of(model, "mlp")
        require(
            self._count(depth) <= depth,
            f"layers {self.config.layers}: the model has {depth}",
            "draw fewer, or null for a quarter",
        )

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Check that each layer can be trained."""
        layers = blocks_of(context.oracle.model)
        for index, layer in enumerate(layers):
            if not any(p.requires_grad for p in layer.parameters()):
                raise InputError(
                    f"layer {index} has no trainable weights",
                    where="method tvaccine",
                    mend="adapt every layer (training.lora_targets), or use vaccine",
                )
        return {"layers": float(self._count(len(layers)))}

    def step(self, context: RunContext) -> dict[str, float]:
        oracle, terms = context.oracle, dict[str, float]()
        layers, sites = blocks_of(oracle.model), sites_of(oracle.model, self.config.site)
        if not self._probabilities or context.step % self.config.refresh_every == 0:
            self._probabilities = self._measure(context, sites)
        if not self._drawn or context.step % self.config.redraw_every == 0:
            count, rng = self._count(len(layers)), context.random("layers")
            self._drawn = draw_layers(self._probabilities, count, rng)
            self._steps = self._steps or [0] * len(layers)
            for index, p in enumerate(self._probabilities):
                terms[f"layer_{index}_probability"] = p
                terms[f"layer_{index}_steps"] = float(self._steps[index])
        batch = context.draw_joined(self.config.retain, self.config.batch_size)
        trained = [layers[index] for index in self._drawn]
        if self.config.undrawn == "mlp":
            trained += sites_of(oracle.model, "mlp")
        with oracle.training_only(trained):
            drifting = [sites[index] for index in self._drawn]
            terms |= train_under_drift(oracle, drifting, batch, self.config)
        for index in self._drawn:
            self._steps[index] += 1
        ever = sum(steps > 0 for steps in self._steps)
        return terms | {"layers_ever": float(ever), "idle_layers": float(ever - len(self._drawn))}

    def _count(self, depth: int) -> int:
        return self.config.layers or max(1, round(depth / 4))

    def _measure(self, context: RunContext, sites: Sequence[nn.Module]) -> list[float]:
        """Return p, in float64, from s averaged over a few harmful batches."""
        oracle, sizes = context.oracle, [0.0] * len(sites)
        for _ in range(self.config.statistic_batches):
            batch, squares = context.draw("harmful", self.config.batch_size), [0.0] * len(sites)

            def add(site: int, g: torch.Tensor, squares: list[float] = squares) -> None:
                squares[site] += float(g.double().square().sum())

            for piece in oracle.micro_batches(batch):
                walk_sites(oracle, sites, piece, batch.label_count, add, purpose="statistic")
            for site, square in enumerate(squares):
                sizes[site] += math.sqrt(oracle.all_sum(square))
        if min(sizes) == 0:
            raise InactiveTermError("the harmful loss has no gradient at some layer's output")
        return [size / math.fsum(sizes) for size in sizes]

    def state(self) -> dict[str, torch.Tensor]:
        return {
            "probabilities": torch.tensor(self._probabilities, dtype=torch.float64),
            "drawn": torch.tensor(self._drawn, dtype=torch.int64),
            "steps": torch.tensor(self._steps, dtype=torch.int64),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._probabilities = state["probabilities"].tolist()
        self._drawn, self._steps = state["drawn"].tolist(), state["steps"].tolist()


def draw_layers(probabilities: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Return ``count`` different indices, drawn one after the other by what is left of p."""
    left = dict(enumerate(probabilities))
    drawn = []
    for _ in range(count):
        (index,) = rng.choices(list(left), weights=list(left.values()))
        drawn.append(index)
        del left[index]
    return sorted(drawn)
