"""Hessian-vector products of a mean loss, two ways, and the check that the cheap one is true.

Both ways add ``coefficient * H v`` to the weights' ``.grad``, where H is the Hessian of the mean
loss over the whole batch and v is a linear combination of gradients. v is formed element by
element and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.weights.arithmetic import Gradient, dot, norm
from mithridate.weights.losses import Loss
from mithridate.weights.oracle import GradientOracle

Terms = Sequence[tuple[float, Gradient]]
"""A direction in weight space as ``sum(coefficient * gradient)``."""

STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
_PROBE_TOKENS = 64
# How torch words a missing derivative, a once-differentiable function, reentrant checkpointing.
_NO_SECOND_DERIVATIVE = ("derivative", "differentiate", "heckpoint")


def add_finite(
    oracle: GradientOracle,
    loss: Loss,
    batch: Batch,
    direction: Terms,
    *,
    step: float,
    purpose: str,
    coefficient: float = 1.0,
    base: Gradient | None = None,
) -> None:
    """Add ``coefficient * H v`` to ``.grad`` by a finite difference of gradients.

    Runs in true float32 (`methods.md` P3) and restores the weights bit for bit.

    Parameters
    ----------
    direction
        v; for a unit v, ``step`` is the L2 length of the shift.
    base
        The mean loss's gradient at the weights, taken in true float32: a forward difference, one
        pass. ``None``: a central difference, two passes, error of second order in ``step``.
    """
    signs = (1.0, -1.0) if base is None else (1.0,)
    share = coefficient / (step * len(signs))
    with oracle.full_precision():
        for sign in signs:
            with oracle.space.shifted(*((sign * step * c, g) for c, g in direction)):
                oracle.accumulate(loss, batch, purpose=purpose, coefficient=sign * share)
    if base is not None:
        torch._foreach_add_(oracle.space.gradient(), base, alpha=-share)


def add_far_end(
    oracle: GradientOracle,
    loss: Loss,
    batch: Batch,
    displacement: Gradient,
    *,
    purpose: str,
    coefficient: float,
) -> None:
    """Add ``coefficient`` times the gradient a displacement away to ``.grad``, in true float32.

    The far end of a forward difference whose near end the caller has at hand. ``displacement``
    becomes the shifted weights, so that no buffer is needed, and comes back empty.
    """
    oracle.space.arrive_(displacement)
    with oracle.full_precision(), oracle.space.exchanged(displacement):
        oracle.accumulate(loss, batch, purpose=purpose, coefficient=coefficient)
    displacement.clear()


def gradient_with_graph(
    oracle: GradientOracle, loss: Loss, batch: Batch, *, purpose: str
) -> tuple[Gradient, float, Gradient]:
    """Return the gradient of the mean loss, the loss, and the graph for one `add_exact`.

    The graph is the gradient once more, as tensors that can be differentiated, and keeps the
    pass's activations. It is empty where several passes make the gradient (micro-batches,
    processes): kept together they would need the memory that the split saves.

    Raises
    ------
    InputError
        If an operation of the model has no second derivative.
    """
    graph: Gradient = []
    pieces = oracle.micro_batches(batch)
    if len(pieces) > 1 or oracle.processes > 1:
        return *oracle.gradient(loss, batch, purpose=purpose), graph
    (piece,) = pieces
    with _differentiating_twice():
        (value,) = oracle.backward(
            lambda: (loss(oracle.model, piece) / batch.label_count,),
            tokens=piece.tokens,
            purpose=purpose,
            into=(graph,),
            create_graph=True,
        )
    return [tensor.detach() for tensor in graph], value, graph


def add_exact(
    oracle: GradientOracle,
    loss: Loss,
    batch: Batch,
    direction: Terms,
    *,
    purpose: str,
    coefficient: float = 1.0,
    graph: Gradient | None = None,
) -> None:
    """Add ``coefficient * H v`` to ``.grad`` as the gradient of the slope of the loss along v.

    One forward and two backward traversals per micro-batch; holds one parameter-sized buffer.
    Attention runs in the MATH backend of `scaled_dot_product_attention`, the only one that can be
    differentiated twice. ``direction`` must not share memory with ``.grad``.

    Parameters
    ----------
    graph
        What `gradient_with_graph` returned for this loss and batch at these weights: it is walked,
        and emptied, in place of a forward and a backward traversal.

    Raises
    ------
    InactiveTermError
        If the model's graph ends after the first derivative.
    InputError
        If an operation of the model has no second derivative.
    """

    def slope(model: nn.Module, piece: Batch) -> torch.Tensor:
        value = loss(model, piece)
        with torch.autocast(value.device.type, enabled=False):
            first = torch.autograd.grad(
                value, oracle.space.tensors, create_graph=True, materialize_grads=True
            )
            oracle.ledger[purpose].backwards += 1
            # The second call walks the first one's graph and the forward pass again.
            oracle.ledger[purpose].walks += 2
            return _along(first, direction)

    with _differentiating_twice():
        if graph:
            oracle.backward(
                lambda: (coefficient * _along(graph, direction),),
                tokens=0,
                purpose=purpose,
                forwards=0,
                walks=2,
            )
            graph.clear()
        else:
            oracle.accumulate(slope, batch, purpose=purpose, coefficient=coefficient)


def _along(first: Sequence[torch.Tensor], direction: Terms) -> torch.Tensor:
    """Return the slope along ``direction`` of the loss whose gradient is ``first``."""
    total = first[0].new_zeros(())
    for c, gradient in direction:
        for g, t in zip(first, gradient, strict=True):
            if g.requires_grad:
                total = total + c * (g * t).sum()
    if not total.requires_grad:
        raise InactiveTermError("double backward found no graph: the product would be zero")
    return total


@contextmanager
def _differentiating_twice() -> Iterator[None]:
    """Run attention in the one backend that can be; refuse models that cannot be."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _NO_SECOND_DERIVATIVE):
            raise
        raise InputError(
            f"this model cannot be differentiated twice: {str(error).splitlines()[0]}",
            where="hvp: exact",
            mend="load it with attn_implementation='eager', use non-reentrant gradient "
            "checkpointing, or choose hvp: finite in float32",
        ) from error


def twice_differentiable(oracle: GradientOracle, loss: Loss, batch: Batch) -> bool:
    """Tell whether `add_exact` works on this model, by trying it on a few tokens."""
    sample = _few_tokens(batch)
    gradient, _ = oracle.gradient(loss, sample, purpose="fidelity")
    try:
        with oracle.fresh_gradient():
            add_exact(oracle, loss, sample, [(1.0, gradient)], purpose="fidelity")
    except (InactiveTermError, InputError):
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """How true a finite-difference product is (`methods.md` F1).

    Attributes
    ----------
    step
        L2 length of the shift.
    cosine, ratio
        Cosine with the reference, and ratio of norms (estimate to exact; half step to full step).
    moved
        Share of the weights that the shift changes at all.
    reference
        What it was compared with.
    """

    step: float
    cosine: float
    ratio: float
    moved: float
    reference: Literal["exact", "half step"]

    @property
    def passed(self) -> bool:
        """Whether the estimate may be used without a warning. The cosine alone is not enough."""
        return self.cosine >= 0.99 and 0.9 <= self.ratio <= 1.1

    @property
    def void(self) -> bool:
        """Whether the estimate must not be used."""
        return not (self.cosine >= 0.9 and 0.8 <= self.ratio <= 1.25)

    @property
    def error(self) -> float:
        """The estimate's relative error, for a reference of norm 1."""
        return math.sqrt(max(0.0, 1 + self.ratio**2 - 2 * self.ratio * self.cosine))


def fidelity(
    oracle: GradientOracle,
    loss: Loss,
    batch: Batch,
    direction: Terms,
    *,
    steps: Sequence[float] = STEPS,
    central: bool = False,
    exact: bool = True,
) -> Fidelity:
    """Choose the step of a finite difference by comparing products (`methods.md` F1).

    Parameters
    ----------
    batch
        Its first rows are used, 64 tokens or one row.
    direction
        A unit direction.
    steps
        Candidates.
    exact
        Compare with the exact product; ``False``, for models too large for one, compares each
        step with half of it. So are models that cannot be differentiated twice.

    Returns
    -------
    Fidelity
        Of the step with the smallest error that is not void.

    Raises
    ------
    RunStoppedError
        If the estimate is void at every step; names the ratios.
    """
    sample = _few_tokens(batch)
    with oracle.full_precision():
        base = None if central else oracle.gradient(loss, sample, purpose="fidelity")[0]

        def estimate(step: float) -> Gradient:
            with oracle.fresh_gradient() as product:
                add_finite(
                    oracle, loss, sample, direction, step=step, purpose="fidelity", base=base
                )
            return product

        truth: Gradient | None = None
        if exact:
            try:
                with oracle.fresh_gradient() as truth:
                    add_exact(oracle, loss, sample, direction, purpose="fidelity")
            except InputError:
                truth = None
        found = []
        for step in steps:
            product = estimate(step)
            reference = estimate(step / 2) if truth is None else truth
            size, expected = norm(product), norm(reference)
            if not size * expected > 0:
                raise InactiveTermError(f"a Hessian-vector product at step {step:g} is zero")
            found.append(
                Fidelity(
                    step=step,
                    cosine=dot(product, reference) / (size * expected),
                    ratio=expected / size if truth is None else size / expected,
                    moved=_share_moved(oracle, step, direction),
                    reference="half step" if truth is None else "exact",
                )
            )
            del product, reference  # their room is the next step's
    usable = [one for one in found if not one.void]
    if not usable:
        table = "; ".join(
            f"step {one.step:g}: cosine {one.cosine:.3f}, norm ratio {one.ratio:.3g}, "
            f"{one.moved:.0%} of weights moved"
            for one in found
        )
        raise RunStoppedError(
            f"finite-difference Hessian-vector products are void against {found[0].reference}: "
            f"{table}. Use hvp: exact, or load all weights in float32"
        )
    return min(usable, key=lambda one: one.error)


def _few_tokens(batch: Batch) -> Batch:
    lengths = batch.attention_mask.sum(dim=1).cumsum(dim=0)
    return batch.rows(0, max(1, int((lengths <= _PROBE_TOKENS).sum())))


def _share_moved(oracle: GradientOracle, step: float, direction: Terms) -> float:
    space = oracle.space
    with space.kept() as saved:
        space.add_(*((step * c, g) for c, g in direction))
        moved = sum(int((p != s).sum()) for p, s in zip(space.tensors, saved, strict=True))
    return moved / space.count
