r"""A fresh LoRA adapter as an attacker would train it, without putting one into the model.

With W = W_0 + s B A, the chain rule gives the factors' gradients from that of the merged weight,

.. math:: \nabla_B = s\,G_W A^\top, \qquad \nabla_A = s\,B^\top G_W,

so that the attack runs on the model as it is and ends where its adapter, merged, would be.
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import nn

from mithridate.configs import require
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient

SCALING = 2.0
"""alpha / rank, the usual two."""


class Adapter:
    """Factors of every linear layer's weight except the head's; B starts at zero.

    Parameters
    ----------
    rank
        Of every product B A.
    seed
        Of A, which is uniform within 1/sqrt(inputs) as in peft; equal on all ranks.
    """

    def __init__(self, context: RunContext, *, rank: int, seed: Random) -> None:
        self.places = adaptable(context)
        generator = torch.Generator().manual_seed(seed.getrandbits(63))
        self.factors: list[torch.Tensor] = []
        for place in self.places:
            weight = context.space.tensors[place].data
            bound = 1 / math.sqrt(weight.shape[1])
            a = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
            self.factors += [weight.new_zeros(weight.shape[0], rank), a.to(weight)]

    def take_gradient(self, context: RunContext) -> Gradient:
        """Turn the gradient of the merged weights into the factors' ``.grad``; return those."""
        whole = context.space.take_gradient()
        found: Gradient = []
        for place, (b, a) in zip(self.places, self._pairs(), strict=True):
            found += [SCALING * whole[place] @ a.T, SCALING * b.T @ whole[place]]
        for factor, gradient in zip(self.factors, found, strict=True):
            factor.grad = gradient
        return found

    def merge_into(self, context: RunContext, start: Gradient) -> None:
        """Set the weights to ``start`` with the adapter merged."""
        for place, (b, a) in zip(self.places, self._pairs(), strict=True):
            weight = context.space.tensors[place].data
            torch.addmm(start[place], b, a, alpha=SCALING, out=weight)

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.factors[::2], self.factors[1::2], strict=True))


def adaptable(context: RunContext) -> list[int]:
    """Return which trainable tensors are weights of linear layers other than the head.

    Raises
    ------
    InputError
        If there are none, or the trap itself is being planted in an adapter.
    """
    model, space = context.oracle.model, context.space
    require(
        not any("lora_" in name for name in space.names),
        "an adapter is being trained, and a simulated LoRA attacker needs the full weights",
        "leave lora out of attackers (adamw already attacks the same adapter), or train in full",
    )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded = {id(p) for module in (*others, head) if module for p in module.parameters()}
    places = [
        index
        for index, tensor in enumerate(space.tensors)
        if tensor.ndim == 2 and id(tensor) not in excluded
    ]
    require(bool(places), "no linear layer is trainable", "leave lora out of attackers")
    return places
