"""The gradient of a cosine between gradients: what couples one task's descent to another's."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient, dot, norm
from mithridate.weights.hvp import STEPS, Terms, add_product, fidelity
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
        ``finite``, ``central``, ``exact``, or ``auto``: finite in true float32, exact under
        autocast.
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
        return 2 if self.hvp in ("auto", "finite") else 4

    def prepare(self, context: RunContext, a: Batch, b: Batch) -> dict[str, float]:
        """Check the products before anything depends on them (F1), and choose ``epsilon``."""
        oracle = context.oracle
        if self.hvp == "auto":
            self.hvp = "exact" if oracle.autocast else "finite"
        with oracle.full_precision():
            g_a, _ = oracle.gradient(answer_cross_entropy, a, purpose="fidelity")
            g_b, _ = oracle.gradient(answer_cross_entropy, b, purpose="fidelity")
        angle = Angle.between(g_a, g_b)
        check = fidelity(
            oracle,
            answer_cross_entropy,
            a,
            angle.towards(g_b, angle.size_b, away_from=g_a, own_size=angle.size_a),
            steps=STEPS if self.epsilon == "auto" else (self.epsilon,),
            central=self.hvp == "central",
            exact=self.hvp == "exact" or context.space.count <= _TOO_MANY_FOR_EXACT,
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

    def add(
        self,
        context: RunContext,
        a: Batch,
        g_a: Gradient,
        b: Batch,
        g_b: Gradient,
        terms: dict[str, float],
    ) -> None:
        """Add beta * (H_a delta_a / ||g_a|| + H_b delta_b / ||g_b||) to ``.grad``."""
        angle = Angle.between(g_a, g_b)
        terms["cosine"] = angle.cosine
        terms["harmful_norm"], terms["benign_norm"] = angle.size_a, angle.size_b
        if angle.sine < _AT_OPTIMUM:
            terms["coupling_at_optimum"] = 1.0
            return
        if self.epsilon == "auto" or self.hvp == "auto":
            raise InactiveTermError("the coupling was not checked: prepare() was not called")
        length = self.epsilon * (angle.sine if self.fd_step == "released" else 1.0)
        for batch, own, own_size, other, other_size in (
            (a, g_a, angle.size_a, g_b, angle.size_b),
            (b, g_b, angle.size_b, g_a, angle.size_a),
        ):
            add_product(
                context.oracle,
                answer_cross_entropy,
                batch,
                angle.towards(other, other_size, away_from=own, own_size=own_size),
                how=self.hvp,
                step=length,
                base=own,
                coefficient=self.weight * angle.sine / own_size,
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
        size_a, size_b = norm(a), norm(b)
        if not size_a * size_b > 0:
            raise InactiveTermError("one of the gradients to be coupled is zero")
        cosine = dot(a, b) / (size_a * size_b)
        return cls(cosine, math.sqrt(max(0.0, 1 - cosine**2)), size_a, size_b)

    def towards(
        self, other: Gradient, other_size: float, *, away_from: Gradient, own_size: float
    ) -> Terms:
        """Return delta = other_hat - cosine * own_hat as a unit vector."""
        return [
            (1 / (other_size * self.sine), other),
            (-self.cosine / (own_size * self.sine), away_from),
        ]
