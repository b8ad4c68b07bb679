r"""A fresh LoRA adapter as an attacker would train it, without putting one into the model.

With W = W_0 + s B A, the chain rule gives the factors' gradients from that of the merged weight,

.. math:: \nabla_B = s\,G_W A^\top, \qquad \nabla_A = s\,B^\top G_W,

so that the attack runs on the model as it is and ends where its adapter, merged, would be. Each
expert of a layer has factors of its own.
"""

from __future__ import annotations

import math
from random import Random

import torch

from mithridate.configs import require
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.maps import LinearMap, linear_maps

SCALING = 2.0
"""alpha / rank, the usual two."""


class Adapter:
    """Factors of every linear map of the decoder layers; B starts at zero.

    Parameters
    ----------
    rank
        Of every product B A.
    seed
        Of A, which is uniform within 1/sqrt(inputs) as in peft; equal on all ranks.
    """

    def __init__(self, context: RunContext, *, rank: int, seed: Random) -> None:
        self.maps = adaptable(context)
        generator = torch.Generator().manual_seed(seed.getrandbits(63))
        self.factors: list[torch.Tensor] = []
        for one in self.maps.values():
            weight = one.oriented(one.weight.data)
            *experts, outputs, inputs = weight.shape
            bound = 1 / math.sqrt(inputs)
            a = torch.empty(*experts, rank, inputs).uniform_(-bound, bound, generator=generator)
            self.factors += [weight.new_zeros(*experts, outputs, rank), a.to(weight)]

    def take_gradient(self, context: RunContext) -> Gradient:
        """Turn the gradient of the merged weights into the factors' ``.grad``; return those."""
        whole = context.space.take_gradient()
        found: Gradient = []
        for (place, one), (b, a) in zip(self.maps.items(), self._pairs(), strict=True):
            of_weight = one.oriented(whole[place])
            found += [SCALING * of_weight @ a.mT, SCALING * b.mT @ of_weight]
        for factor, gradient in zip(self.factors, found, strict=True):
            factor.grad = gradient
        return found

    def merge_into(self, context: RunContext, start: Gradient) -> None:
        """Set the weights to ``start`` with the adapter merged."""
        for (place, one), (b, a) in zip(self.maps.items(), self._pairs(), strict=True):
            weight = context.space.tensors[place].data
            left, right = (a.mT, b.mT) if one.transposed else (b, a)
            add = torch.addmm if weight.dim() == 2 else torch.baddbmm
            add(start[place], left, right, alpha=SCALING, out=weight)

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.factors[::2], self.factors[1::2], strict=True))


def adaptable(context: RunContext) -> dict[int, LinearMap]:
    """Return the linear maps of the decoder layers that are trained, by their place in the space.

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
    known = {id(one.weight): one for one in linear_maps(model)}
    maps = {
        place: known[id(tensor)]
        for place, tensor in enumerate(space.tensors)
        if id(tensor) in known
    }
    require(bool(maps), "no linear map is trainable", "leave lora out of attackers")
    return maps
