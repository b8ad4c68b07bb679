"""The gradient of a cosine between gradients: what couples one task's descent to another's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import gram
from mithridate.weights.hvp import (
    STEPS,
    add_exact,
    add_far_end,
    add_finite,
    fidelity,
    gradient_with_graph,
    twice_differentiable,
)
from mithridate.weights.losses import answer_cross_entropy

_AT_OPTIMUM = 1e-4
_TOO_MANY_FOR_EXACT = 3_000_000_000


@dataclass
class Coupling:
    """beta * cos(g_a, g_b), by Hessian-vector products (`methods.md` §5).

    Parameters
    ----------
    weight
        beta.
    hvp
        ``finite``, ``central``, ``exact``, or ``auto``: finite in true float32; where passes are
        rounded exact, if the model can be differentiated twice.
    epsilon
        L2 length of the finite difference; ``auto`` lets `prepare` choose.
    fd_step
        ``unit``: along the unit vector of delta; ``released``: epsilon * ||delta|| long, a probe
        that vanishes as the cosine approaches -1.
    """

    weight: float
    hvp: Literal["auto", "finite", "central", "exact"] = "auto"
    epsilon: float | Literal["auto"] = "auto"
    fd_step: Literal["unit", "released"] = "unit"

    @property
    def backwards(self) -> int:
        """Backward calls of `add` at one micro-batch."""
        return {"central": 4, "exact": 3}.get(self.hvp, 2)

    def prepare(self, context: RunContext, a: Batch, b: Batch) -> dict[str, float]:
        """Check differences before anything depends on them (F1), and choose ``epsilon``."""
        oracle = context.oracle
        if self.hvp == "auto":
            exact = oracle.rounds and twice_differentiable(oracle, answer_cross_entropy, a)
            self.hvp = "exact" if exact else "finite"
        with self.precision(context):
            g_a, _ = oracle.gradient(answer_cross_entropy, a, purpose="fidelity")
            g_b, _ = oracle.gradient(answer_cross_entropy, b, purpose="fidelity")
        angle = Angle.between(g_a, g_b)
        if self.hvp == "exact":
            return {"cosine": angle.cosine}  # no difference: no step to choose, nothing to check
        angle.turn_(g_a, g_b)
        del g_b  # the check holds several buffers of its own
        check = fidelity(
            oracle,
            answer_cross_entropy,
            a,
            [(1.0, g_a)],
            steps=STEPS if self.epsilon == "auto" else (self.epsilon,),
            central=self.hvp == "central",
            exact=context.space.count <= _TOO_MANY_FOR_EXACT,
        )
        self.epsilon = check.step
        if not check.passed:
            warnings.warn(
                f"Hessian-vector products are rough: cosine {check.cosine:.3f}, norm ratio "
                f"{check.ratio:.3f} against {check.reference}",
                stacklevel=2,
            )
        return {
            "cosine": angle.cosine,
            "fd_fidelity": check.cosine,
            "fd_ratio": check.ratio,
            "fd_epsilon": check.step,
            "fd_moved": check.moved,
        }

    def precision(self, context: RunContext) -> AbstractContextManager[None]:
        """Return how g_a and g_b are to be taken: differences of them need true float32 (P3)."""
        return nullcontext() if self.hvp == "exact" else context.oracle.full_precision()

    def last_gradient(
        self, context: RunContext, b: Batch, *, purpose: str
    ) -> tuple[Gradient, float, Gradient]:
        """Return g_b, b's loss, and the graph that an exact product walks on from.

        Taken last, the graph waits through no other pass and costs no memory at the peak.
        """
        if self.hvp == "exact":
            return gradient_with_graph(context.oracle, answer_cross_entropy, b, purpose=purpose)
        return *context.oracle.gradient(answer_cross_entropy, b, purpose=purpose), []

    def add(
        self,
        context: RunContext,
        a: Batch,
        g_a: Gradient,
        b: Batch,
        g_b: Gradient,
        terms: dict[str, float],
        graph: Gradient | None = None,
    ) -> None:
        """Add beta * (H_a delta_a / ||g_a|| + H_b delta_b / ||g_b||) to ``.grad``.

        ``g_a``, ``g_b`` and its ``graph`` are used up: what is left in them is of no use.
        """
        angle = Angle.between(g_a, g_b)
        terms["cosine"] = angle.cosine
        terms["harmful_norm"], terms["benign_norm"] = angle.size_a, angle.size_b
        if angle.sine < _AT_OPTIMUM:
            terms["coupling_at_optimum"] = 1.0
            return
        epsilon = 0.0 if self.hvp == "exact" else self.epsilon
        if epsilon == "auto" or self.hvp == "auto":
            raise InactiveTermError("the coupling was not checked: prepare() was not called")
        length = epsilon * (angle.sine if self.fd_step == "released" else 1.0)
        sides = [
            (batch, gradient, self.weight * angle.sine / size)
            for batch, gradient, size in ((a, g_a, angle.size_a), (b, g_b, angle.size_b))
        ]
        if self.hvp == "finite":
            self._add_differences(context, angle, sides, length)
            return
        if self.hvp == "exact":
            self._add_products(context, angle, sides, graph)
            return
        angle.turn_(g_a, g_b)
        for batch, delta, coefficient in sides:
            add_finite(
                context.oracle,
                answer_cross_entropy,
                batch,
                [(1.0, delta)],
                step=length,
                coefficient=coefficient,
                purpose="coupling",
            )
            delta.clear()

    def _add_products(
        self,
        context: RunContext,
        angle: Angle,
        sides: Sequence[tuple[Batch, Gradient, float]],
        graph: Gradient | None,
    ) -> None:
        """Add both exact products; b's graph is free before a's is made."""
        (a, g_a, weight_a), (b, g_b, weight_b) = sides
        unit_a, unit_b = (1 / (angle.sine * size) for size in (angle.size_a, angle.size_b))
        delta_a = [(unit_b, g_b), (-angle.cosine * unit_a, g_a)]
        delta_b = [(unit_a, g_a), (-angle.cosine * unit_b, g_b)]
        for batch, delta, weight, kept in (
            (b, delta_b, weight_b, graph),
            (a, delta_a, weight_a, None),
        ):
            add_exact(
                context.oracle,
                answer_cross_entropy,
                batch,
                delta,
                coefficient=weight,
                purpose="coupling",
                graph=kept,
            )

    def _add_differences(
        self,
        context: RunContext,
        angle: Angle,
        sides: Sequence[tuple[Batch, Gradient, float]],
        length: float,
    ) -> None:
        """Add both forward differences; the gradients become the places of their far ends."""
        for _, near, coefficient in sides:
            torch._foreach_add_(context.space.gradient(), near, alpha=-coefficient / length)
        (_, g_a, _), (_, g_b, _) = sides
        angle.turn_(g_a, g_b, length)
        for batch, displacement, coefficient in sides:
            add_far_end(
                context.oracle,
                answer_cross_entropy,
                batch,
                displacement,
                coefficient=coefficient / length,
                purpose="coupling",
            )


@dataclass(frozen=True, slots=True)
class Angle:
    """The angle between two gradients; ``sine`` is the norm of both deltas."""

    cosine: float
    sine: float
    size_a: float
    size_b: float

    @classmethod
    def between(cls, a: Gradient, b: Gradient) -> Angle:
        """Measure it in float64 (P5)."""
        squared_a, product, squared_b = gram(a, b)
        size_a, size_b = math.sqrt(squared_a), math.sqrt(squared_b)
        if not size_a * size_b > 0:
            raise InactiveTermError("one of the gradients to be coupled is zero")
        cosine = product / (size_a * size_b)
        return cls(cosine, math.sqrt(max(0.0, 1 - cosine**2)), size_a, size_b)

    def turn_(self, a: Gradient, b: Gradient, length: float = 1.0) -> None:
        """Turn the gradients, in place, into delta_a and delta_b of this length."""
        unit_a, unit_b = (length / (self.sine * size) for size in (self.size_a, self.size_b))
        for x, y in zip(a, b, strict=True):
            before = x.clone()
            x.mul_(-self.cosine * unit_a).add_(y, alpha=unit_b)
            y.mul_(-self.cosine * unit_b).add_(before, alpha=unit_a)
