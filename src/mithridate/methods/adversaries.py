"""Kinds of attackers to simulate, each with the optimiser that such an attacker really uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch

from mithridate.chat import Batch
from mithridate.configs import Count, Positive, Weight, check_values, require
from mithridate.methods.adapter import Adapter
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import bound_
from mithridate.weights.losses import answer_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """One kind of simulated attacker.

    Parameters
    ----------
    learning_rates
        Peak rates, of which every attack draws one.
    optimiser, momentum, weight_decay
        Torch's own, its state fresh for each attack; as in fine-tuning libraries, norms and
        biases do not decay.
    schedule
        Of the learning rate over the attack.
    max_grad_norm
        Clipping bound on the gradient's L2 norm; 0 turns clipping off.
    first
        A stream to train on before switching to harmful rows after a Beta(6, 3) share of the
        attack; ``None`` trains on harmful rows from the start.
    lora_rank
        Trains a fresh adapter of this rank on every linear map of the decoder layers; ``None``
        trains what the defence trains.
    """

    learning_rates: tuple[Positive, ...] = (2e-6, 2e-5, 4e-5)
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: Weight = 0.0
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Weight = 1.0
    first: str | None = None
    lora_rank: Count | None = None

    def __post_init__(self) -> None:
        check_values(self)
        require(bool(self.learning_rates), "learning_rates is empty", "give one, as in [2e-5]")
        require(
            self.optimiser == "sgd" or not self.momentum,
            "adamw has betas, not a momentum",
            "use optimiser: sgd, or leave momentum out",
        )

    @property
    def buffers(self) -> int:
        """Parameter-sized buffers of its optimiser's state."""
        if self.lora_rank is not None:
            return 0
        return 2 if self.optimiser == "adamw" else int(self.momentum > 0)

    def make_optimiser(self, trained: list[torch.Tensor], rate: float) -> torch.optim.Optimizer:
        """Return a fresh optimiser of this kind."""
        groups = [
            {"params": [w for w in trained if w.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimiser == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=rate, fused=True)


def attack(
    context: RunContext,
    adversary: Adversary,
    batches: Iterable[Batch],
    start: Gradient,
    *,
    steps: int,
    seed: Random,
) -> Iterator[float]:
    """Fine-tune the weights in place, a step a batch; yield each step's loss after it.

    ``.grad`` is the caller's between the steps.

    Parameters
    ----------
    batches
        ``steps`` of them.
    start
        The weights that the attack starts from, which are also the present ones.
    seed
        Draws the learning rate and, for LoRA, the adapter.
    """
    # Slow to import, and `mithridate methods` needs none of it.
    from transformers.optimization import get_scheduler

    space = context.space
    rate = seed.choice(adversary.learning_rates)
    adapter, trained = None, list[torch.Tensor](space.tensors)
    if adversary.lora_rank is not None:
        adapter = Adapter(context, rank=adversary.lora_rank, seed=seed)
        trained = adapter.factors
    optimiser = adversary.make_optimiser(trained, rate)
    schedule = get_scheduler(
        adversary.schedule, optimiser, num_warmup_steps=0, num_training_steps=steps
    )
    for batch in batches:
        space.give_gradient(None)
        loss = context.oracle.accumulate(answer_cross_entropy, batch, purpose="attack")
        # No name keeps the gradient: its memory is free while the caller has the weights.
        bound_(
            space.gradient() if adapter is None else adapter.take_gradient(context),
            adversary.max_grad_norm or math.inf,
        )
        optimiser.step()
        schedule.step()
        if adapter is not None:
            adapter.merge_into(context, start)
        space.give_gradient(None)
        yield loss
