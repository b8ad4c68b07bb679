"""Loud inactivity: what stops a run that would otherwise end as plain fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mithridate.errors import InactiveTermError, NonFiniteError, RunStoppedError

PATIENCE = 20
"""Steps for which an active term may stay zero or absent (`methods.md` H1)."""

_CHANGED = 0.9
_SAMPLE = 4096
# Below its eps AdamW damps a step on purpose: such a weight need not move.
_EPS = 1e-8


class TermMonitor:
    """Watches the terms of a method's steps; ``idle`` is its state."""

    def __init__(self) -> None:
        self.idle: dict[str, int] = {}

    def check(self, terms: Mapping[str, float], active: Sequence[str]) -> None:
        """Raise when a term is not finite, or an active one has been zero or absent too long."""
        for name, value in terms.items():
            if not math.isfinite(value):
                raise NonFiniteError(name, value)
        for name in active:
            idle = 0 if terms.get(name, 0.0) != 0.0 else self.idle.get(name, 0) + 1
            self.idle[name] = idle
            if idle >= PATIENCE:
                state = "zero" if name in terms else "absent"
                raise InactiveTermError(
                    f"the term {name!r} was {state} for {idle} steps: the defence is not being "
                    "planted; check that its stream and its weight are what you meant"
                )


class ChangeCheck:
    """Checks once that an optimiser step moves the weights (`metrics.md` G12, `style.md` trap 6).

    A sample of each tensor is enough, evenly spaced: the failure it is for, steps below the
    precision of the weights, strikes everywhere.
    """

    def __init__(self, weights: Sequence[torch.nn.Parameter]) -> None:
        self.done = False
        self._weights = weights
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(self) -> None:
        """Note the weights and which of them have a gradient."""
        self._before = [
            (_sample(p).clone(), _sample(p.grad).abs() > _EPS)
            for p in self._weights
            if p.grad is not None
        ]

    def after(self) -> None:
        """Raise unless 90 % of the weights that have a gradient moved."""
        having = moved = 0
        held = [p for p in self._weights if p.grad is not None]
        for p, (old, graded) in zip(held, self._before, strict=True):
            stride = _stride(p)
            having += int(graded.sum()) * stride
            moved += int(((_sample(p) != old) & graded).sum()) * stride
        self._before, self.done = [], True
        if having == 0:
            raise InactiveTermError(
                "the first optimiser step had a zero gradient everywhere: the method was fed "
                "nothing it could learn from"
            )
        if moved < _CHANGED * having:
            raise RunStoppedError(
                f"only {moved / having:.0%} of the weights with a gradient changed in the first "
                "optimiser step: the learning rate is too small for their precision; raise it"
            )


def _stride(tensor: torch.Tensor) -> int:
    return max(1, tensor.numel() // _SAMPLE)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten()[:: _stride(tensor)]
