r"""Lengths in an adapter's space, measured where they count: in the weights that it merges into.

With W = W_0 + s B A a move (dB, dA) of the factors moves the merged weight by

.. math:: \Delta(t) = t X + t^2 Y, \qquad X = s\,(dB\,A + B\,dA), \quad Y = s\,dB\,dA,

so that the same length in factors travels farther with a larger alpha / rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mithridate.errors import InactiveTermError
from mithridate.weights.arithmetic import Gradient, WeightSpace, dot, gram

_HALVINGS = 100


class Merged:
    """The merged weights of a model whose trainable weights are (mostly) an adapter's factors.

    Parameters
    ----------
    model
        With `peft` adapters; other trainable weights are merged as they are.
    space
        Its trainable weights.
    """

    def __init__(self, model: nn.Module, space: WeightSpace) -> None:
        self._space = space
        places = {id(p): index for index, p in enumerate(space.tensors)}
        self._layers: list[tuple[Any, str, int, int]] = []
        for layer in model.modules():
            if not callable(getattr(layer, "get_delta_weight", None)):
                continue
            for name in layer.active_adapters:  # type: ignore[union-attr]
                a, b = (places.get(id(factor)) for factor in _factors(layer, name))
                if a is not None and b is not None:
                    self._layers.append((layer, name, a, b))
        factors = {index for *_, a, b in self._layers for index in (a, b)}
        self._rest = [index for index in range(len(space.tensors)) if index not in factors]

    def travel(self, start: Gradient) -> float:
        """Return the L2 distance of the merged weights from those of the factors ``start``."""
        here = [p.data for p in self._space.tensors]
        total = 0.0
        for layer, name, a, b in self._layers:
            # B A - B_0 A_0, without the difference of two large products.
            moved = self._product(layer, name, here[a], here[b] - start[b])
            moved += self._product(layer, name, here[a] - start[a], start[b])
            total += dot([moved], [moved])
        for index in self._rest:
            total += dot([moved := here[index] - start[index]], [moved])
        return math.sqrt(total)

    def reach(self, direction: Gradient, length: float) -> float:
        """Return the t > 0 for which factors moved by -t times ``direction`` travel ``length``.

        Raises
        ------
        InactiveTermError
            If the merged weights do not move along ``direction``.
        """
        xx, xy, yy = self._speeds(direction)
        if xx + yy == 0:
            raise InactiveTermError("the look-ahead's direction does not move the merged weights")
        low, high = 0.0, length / math.sqrt(xx) if xx else math.sqrt(length / math.sqrt(yy))
        while _travelled(high, xx, xy, yy) < length:
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            short = _travelled(middle, xx, xy, yy) < length
            low, high = (middle, high) if short else (low, middle)
        return high

    def distance(self, direction: Gradient, factor: float) -> float:
        """Return how far factors moved by -``factor`` times ``direction`` travel."""
        return _travelled(factor, *self._speeds(direction))

    def _speeds(self, direction: Gradient) -> tuple[float, float, float]:
        """Return (X, X), -(X, Y) and (Y, Y), in float64."""
        xx = xy = yy = 0.0
        here = [p.data for p in self._space.tensors]
        for layer, name, a, b in self._layers:
            x = self._product(layer, name, here[a], direction[b])
            x += self._product(layer, name, direction[a], here[b])
            y = self._product(layer, name, direction[a], direction[b])
            one, mixed, two = gram([x], [y])
            xx, xy, yy = xx + one, xy - mixed, yy + two
        rest = [direction[index] for index in self._rest]
        return xx + (dot(rest, rest) if rest else 0.0), xy, yy

    @staticmethod
    def _product(layer: Any, name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return what `peft` would add to the layer's weight if its factors were ``a``, ``b``."""
        factors = _factors(layer, name)
        kept = [factor.data for factor in factors]
        for factor, value in zip(factors, (a, b), strict=True):
            factor.data = value
        try:
            with torch.no_grad():
                product: torch.Tensor = layer.get_delta_weight(name)
        finally:
            for factor, value in zip(factors, kept, strict=True):
                factor.data = value
        return product


def _travelled(t: float, xx: float, xy: float, yy: float) -> float:
    return t * math.sqrt(max(0.0, xx + t * (2 * xy + t * yy)))


def _factors(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
