"""Arithmetic over a model's trainable weights, exact where exactness is promised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mithridate.errors import InputError

Gradient = list[torch.Tensor]
"""One tensor per trainable weight tensor, in `WeightSpace.tensors` order and shapes."""

# Small enough for a CPU's cache; a GPU takes more at a time.
_CHUNK = 1 << 16
_ON_GPU = 1 << 10


def dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """Return the inner product over all weights, accumulated in float64.

    Parameters
    ----------
    a, b
        Gradients of equal shapes.
    """
    total = torch.zeros((), dtype=torch.float64, device=a[0].device)
    for x, y in _chunks(a, b):
        total += torch.dot(x, y)
    return float(total)


def gram(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[float, float, float]:
    """Return the inner products (a, a), (a, b) and (b, b) as `dot` does, in a single walk."""
    total = torch.zeros(3, dtype=torch.float64, device=a[0].device)
    for x, y in _chunks(a, b):
        total += torch.stack((torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)))
    aa, ab, bb = total.tolist()
    return aa, ab, bb


def _chunks(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both in float64, a chunk at a time, in memory that the next chunk overwrites."""
    scratch = _scratch(a)
    size = scratch.shape[1]
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left.flatten().split(size), right.flatten().split(size), strict=True):
            wide = scratch[0, : len(x)].copy_(x)
            yield wide, wide if left is right else scratch[1, : len(y)].copy_(y)


def _scratch(like: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return room for two chunks in float64.

    A block taken and given back for each chunk costs several times the arithmetic on it: the
    system clears every page anew.
    """
    device = like[0].device
    size = _CHUNK if device.type == "cpu" else _CHUNK * _ON_GPU
    size = min(size, max(tensor.numel() for tensor in like))
    return torch.empty(2, size, dtype=torch.float64, device=device)


def norm(a: Sequence[torch.Tensor]) -> float:
    """Return the L2 norm over all weights, accumulated in float64."""
    return math.sqrt(dot(a, a))


class WeightSpace:
    """The trainable weights of a model: the full model, or the factors of a LoRA adapter.

    Tied weights are counted once (`methods.md` S2); frozen weights are absent.

    Parameters
    ----------
    model
        Any module with at least one parameter that requires a gradient.

    Raises
    ------
    InputError
        If nothing is trainable, or trainable weights are in half precision: a small step or a
        perturb-and-restore vanishes there (`methods.md` P1).
    """

    def __init__(self, model: nn.Module) -> None:
        found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not found:
            raise InputError(
                "the model has no trainable weights",
                mend="unfreeze them (requires_grad_) or attach a LoRA adapter",
            )
        half = [name for name, p in found if p.dtype in (torch.bfloat16, torch.float16)]
        if half:
            raise InputError(
                f"{len(half)} trainable weights are in half precision (first: {half[0]})",
                mend="load the model with dtype=torch.float32; use autocast for speed",
            )
        self.names = [name for name, _ in found]
        self.tensors: list[nn.Parameter] = [p for _, p in found]

    @property
    def count(self) -> int:
        """Number of trainable weights, N."""
        return sum(p.numel() for p in self.tensors)

    @property
    def bytes(self) -> int:
        """Size of one parameter-sized buffer in bytes."""
        return sum(p.numel() * p.element_size() for p in self.tensors)

    def _data(self) -> list[torch.Tensor]:
        return [p.data for p in self.tensors]

    def zeros(self) -> Gradient:
        """Return a fresh zero buffer."""
        return [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self._data()]

    def snapshot(self) -> Gradient:
        """Return a copy of the weights (one buffer)."""
        return [p.clone() for p in self._data()]

    def restore(self, saved: Gradient) -> None:
        """Set the weights to ``saved``, bit for bit."""
        with torch.no_grad():
            torch._foreach_copy_(self._data(), saved)

    def take_gradient(self) -> Gradient:
        """Detach ``.grad`` from the weights and return it without copying."""
        taken = [
            torch.zeros_like(p.data) if p.grad is None else p.grad.detach() for p in self.tensors
        ]
        self.give_gradient(None)
        return taken

    def give_gradient(self, gradient: Gradient | None) -> None:
        """Make ``gradient`` the weights' ``.grad`` without copying; ``None`` clears it."""
        for index, p in enumerate(self.tensors):
            p.grad = None if gradient is None else gradient[index]

    def gradient(self) -> Gradient:
        """Return the current ``.grad`` tensors themselves (zeros are put where there are none)."""
        for p in self.tensors:
            if p.grad is None:
                p.grad = torch.zeros_like(p.data)
        return [p.grad for p in self.tensors if p.grad is not None]

    def add_(self, *terms: tuple[float, Gradient]) -> None:
        """Add the linear combination ``sum(coefficient * gradient)`` to the weights in place."""
        with torch.no_grad():
            for coefficient, gradient in terms:
                torch._foreach_add_(self._data(), gradient, alpha=coefficient)

    def arrive_(self, displacement: Gradient) -> None:
        """Turn a displacement from the weights, in place, into the weights that it leads to."""
        torch._foreach_add_(displacement, self._data())

    def travel(self, start: Gradient) -> float:
        """Return the L2 distance of the weights from ``start``, accumulated in float64."""
        total = torch.zeros((), dtype=torch.float64, device=start[0].device)
        scratch = _scratch(start)
        size = scratch.shape[1]
        for here, there in zip(self._data(), start, strict=True):
            for x, y in zip(here.flatten().split(size), there.flatten().split(size), strict=True):
                moved = scratch[0, : len(x)].copy_(x).sub_(y)
                total += torch.dot(moved, moved)
        return math.sqrt(float(total))

    @contextmanager
    def kept(self) -> Iterator[Gradient]:
        """Run the body, then restore the weights bit for bit, also when the body raises.

        Yields
        ------
        Gradient
            The copy of the weights (one buffer) that will be restored.
        """
        saved = self.snapshot()
        try:
            yield saved
        finally:
            self.restore(saved)

    @contextmanager
    def exchanged(self, weights: Gradient) -> Iterator[None]:
        """Run the body with ``weights`` in the place of the trainable ones; nothing is copied.

        Inside, the list holds the weights that were set aside, so that they come back bit for bit.
        """
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    def _exchange(self, weights: Gradient) -> None:
        for index, p in enumerate(self.tensors):
            p.data, weights[index] = weights[index], p.data

    @contextmanager
    def shifted(self, *terms: tuple[float, Gradient]) -> Iterator[None]:
        """Run the body at ``weights + sum(coefficient * gradient)``; restore as `exchanged` does.

        The direction is formed element by element and never stored, so the cost is one buffer
        (the shifted weights).
        """
        (coefficient, gradient), *others = terms
        moved = torch._foreach_add(self._data(), gradient, alpha=coefficient)
        for coefficient, gradient in others:
            torch._foreach_add_(moved, gradient, alpha=coefficient)
        del terms, others, gradient  # whoever gave them may want their memory back
        with self.exchanged(list(moved)):
            del moved
            yield


def scale_(gradient: Gradient, factor: float) -> None:
    """Multiply a gradient in place."""
    torch._foreach_mul_(gradient, factor)


def bound_(gradient: Gradient, limit: float = 1.0) -> float:
    """Scale ``gradient`` in place to an L2 norm of at most ``limit``; return the norm before."""
    size = norm(gradient)
    if size > limit:
        scale_(gradient, limit / size)
    return size
