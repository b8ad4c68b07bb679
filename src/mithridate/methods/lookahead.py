"""Where an attacker's next step would lead: directions and radii of a look-ahead.

Radii are L2 lengths over all trainable weights; where an adapter is trained, over the weights that
it merges into, since a length in its factors leads as far as alpha / rank says. The bare gradient
is a poor guess of the path: 20 AdamW steps at 2e-5 have cosine 0.18 with it and 0.74 with its sign
(`methods.md` §4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Annotated, Any, Literal

import torch

from mithridate.chat import Batch
from mithridate.configs import Limit, Positive, require
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient, GradientOracle, dot, norm
from mithridate.weights.losses import Loss, answer_cross_entropy
from mithridate.weights.merged import Merged

Direction = Literal["gradient", "sign", "adam", "unrolled", "random"]
Interval = Annotated[
    dict[str, float],
    Limit(
        "{low: , high: } with 0 < low <= high",
        lambda ends: set(ends) == {"low", "high"} and 0 < ends["low"] <= ends["high"] < math.inf,
    ),
]
Radius = Positive | Interval | Literal["auto"] | None
RadiusIn = Literal["merged", "factors"]

RELEASED_RADIUS = 0.1
"""Over the factors of `RELEASED_ADAPTER`, in the code of CTRAP and Booster."""

RELEASED_ADAPTER: dict[str, Any] = {
    "lora_rank": 32,
    "lora_alpha": 4,
    "lora_targets": ("q_proj", "k_proj", "v_proj"),
}

_DECAY = 0.999
_CHANGE, _COSINE = 0.1, 0.99
_ATTACK_STEPS = 20


def turn_by_sign_(gradient: Gradient) -> float:
    """Replace ``gradient`` by its sign; return 1/sqrt(N), which makes it a unit direction.

    A radius of lr * sqrt(N) is one AdamW step from a fresh optimiser state. Weights without a
    gradient stay where they are, as in AdamW, so that the length is then a little less.
    """
    torch._foreach_sign_(gradient)
    return 1 / math.sqrt(sum(tensor.numel() for tensor in gradient))


def turn_at_random_(gradient: Gradient, seed: int) -> float:
    """Replace ``gradient`` by Gaussian noise; return the factor that makes it a unit direction."""
    for number, tensor in enumerate(gradient):
        generator = torch.Generator(tensor.device).manual_seed(seed + number)
        tensor.normal_(generator=generator)
    return 1 / norm(gradient)


class AdamDirection:
    """g / (sqrt(v) + 1e-8), with v a bias-corrected running second moment (one buffer)."""

    def __init__(self) -> None:
        self.second_moment: Gradient = []
        self.count = 0

    def turn_(self, gradient: Gradient) -> float:
        """Replace ``gradient`` by the direction; return the factor that makes it a unit one."""
        if not self.second_moment:
            self.second_moment = [torch.zeros_like(tensor) for tensor in gradient]
        self.count += 1
        torch._foreach_mul_(self.second_moment, _DECAY)
        torch._foreach_addcmul_(self.second_moment, gradient, gradient, value=1 - _DECAY)
        for tensor, moment in zip(gradient, self.second_moment, strict=True):
            tensor.div_((moment / (1 - _DECAY**self.count)).sqrt_().add_(1e-8))
        return 1 / norm(gradient)

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors for a checkpoint."""
        saved = {f"second_moment.{i}": tensor for i, tensor in enumerate(self.second_moment)}
        return saved | {"second_moment.count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self.count = int(state["second_moment.count"])
        tensors = sum(key.startswith("second_moment.") for key in state) - 1
        self.second_moment = [state[f"second_moment.{i}"].clone() for i in range(tensors)]


def adamw_steps(
    oracle: GradientOracle, batches: Iterable[Batch], *, learning_rate: float, purpose: str
) -> Iterator[float]:
    """Take one AdamW step of plain SFT per batch, in place; yield each loss before its step.

    Two parameter-sized buffers; ``.grad`` is used and left empty.
    """
    optimiser = torch.optim.AdamW(
        oracle.space.tensors, lr=learning_rate, weight_decay=0.0, fused=True
    )
    for batch in batches:
        oracle.space.give_gradient(None)
        loss = oracle.accumulate(answer_cross_entropy, batch, purpose=purpose)
        optimiser.step()
        yield loss
    oracle.space.give_gradient(None)


def attack_travel(
    context: RunContext,
    *,
    learning_rate: float,
    rows: int,
    travel: Callable[[Gradient], float],
) -> tuple[float, float]:
    """Return how far 1 and 20 AdamW steps of the attack travel; the weights are restored.

    Parameters
    ----------
    travel
        Measures the distance of the present weights from those given.

    Raises
    ------
    InputError
        If the run has no harmful examples.
    """
    examples = context.examples.get("harmful", [])
    if not examples:
        raise InputError(
            "an automatic look-ahead radius needs harmful examples",
            where="lookahead_radius",
            mend="give the stream harmful, or a number for the radius",
        )
    rng = context.random("attack travel")
    batches = (context.chat.batch(rng.choices(examples, k=rows)) for _ in range(_ATTACK_STEPS))
    travelled: list[float] = []
    with context.space.kept() as start:
        for _ in adamw_steps(
            context.oracle, batches, learning_rate=learning_rate, purpose="radius"
        ):
            travelled.append(travel(start))
    # The first and last step may come out in either order when the path turns back.
    return min(travelled[0], travelled[-1]), max(travelled[0], travelled[-1])


@dataclass
class LookAhead:
    """The shift from the weights to where an attacker would be.

    Parameters
    ----------
    direction
        ``gradient``; ``sign``; ``adam`` (one buffer more); ``unrolled``: real AdamW steps on fresh
        batches (two buffers more), which need no radius; ``random``: Gaussian, an ablation.
    radius
        Its L2 length: a number, ``{low, high}`` drawn log-uniformly each step, or ``auto``: the
        travel of 1 to 20 AdamW steps of the attack. ``None``: ``auto``.
    radius_in
        Where an adapter is trained, what is that long: the ``merged`` weights' move, or that of
        the ``factors``.
    raw
        The radius, a number, multiplies the gradient itself instead of its unit vector.
    rows
        Harmful rows per batch.
    learning_rate, steps
        The attacker's, for ``auto`` and ``unrolled``.
    """

    direction: Direction = "gradient"
    radius: Radius = None
    radius_in: RadiusIn = "merged"
    raw: bool = False
    rows: int = 10
    learning_rate: float = 2e-5
    steps: int = 4
    _range: tuple[float, float] | None = None
    _merged: Merged | None = None
    _adam: AdamDirection = field(default_factory=AdamDirection)

    def __post_init__(self) -> None:
        require(
            self.direction != "unrolled" or self.radius is None,
            "an unrolled look-ahead is as long as its steps are: it has no radius",
            "leave lookahead_radius out, and set attack_learning_rate and unrolled_steps",
        )
        require(
            self.direction == "gradient" or not self.raw,
            f"lookahead_direction {self.direction!r} has no raw form",
            "use lookahead: normalised",
        )
        require(
            not (self.raw and self.radius in (None, "auto")),
            "the raw form multiplies the gradient itself: a measured travel is no factor",
            "give lookahead_radius a number",
        )

    @property
    def backwards(self) -> int:
        """Backward calls per step."""
        return self.steps if self.direction == "unrolled" else 1

    @property
    def buffers(self) -> int:
        """Parameter-sized buffers, the saved weights among them."""
        return {"gradient": 1, "sign": 1, "adam": 2, "unrolled": 3, "random": 1}[self.direction]

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Fix the range of radii; returns it."""
        if any("lora_" in name for name in context.space.names):
            self._merged = Merged(context.oracle.model, context.space)
        if self.direction == "unrolled":
            return {}
        if isinstance(self.radius, dict):
            self._range = self.radius["low"], self.radius["high"]
        elif isinstance(self.radius, (int, float)):
            self._range = self.radius, self.radius
        else:
            self._range = attack_travel(
                context,
                learning_rate=self.learning_rate,
                rows=self.rows,
                travel=lambda start: self._travel(context, start),
            )
        return {"radius_low": self._range[0], "radius_high": self._range[1]}

    def _travel(self, context: RunContext, start: Gradient) -> float:
        """Return the distance from ``start`` where a radius is measured."""
        if self._merged is None or self.radius_in == "factors":
            return context.space.travel(start)
        return self._merged.travel(start)

    def check_autocast(
        self, context: RunContext, loss: Loss, batch: Batch, harmful: Batch
    ) -> dict[str, float]:
        """Check that bfloat16 passes see the shift: it may be too small for them (F2).

        Parameters
        ----------
        loss, batch
            Whose gradient is taken at the look-ahead.
        harmful
            Decides the shift, at the smallest radius.

        Returns
        -------
        dict
            ``autocast_change``: how much of the harmful loss's change from here to the look-ahead
            autocast finds, a ratio; ``autocast_cosine``: of the two gradients there.

        Raises
        ------
        InputError
            If the ratio is not within 10 % of 1, or the cosine below 0.99.
        """
        oracle = context.oracle
        if not oracle.autocast:
            raise InputError(
                "shifted passes are to run under autocast, and the run does not",
                where="shifted_precision",
                mend="set training.autocast: true, or shifted_precision: float32",
            )
        probe = replace(self, _adam=AdamDirection())
        if self._range is not None:
            probe._range = self._range[0], self._range[0]

        def harm() -> tuple[float, float]:
            with oracle.full_precision():
                true = oracle.loss(answer_cross_entropy, harmful, purpose="fidelity")
            return true, oracle.loss(answer_cross_entropy, harmful, purpose="fidelity")

        here = harm()
        with probe.shifted(replace(context, draw=lambda *_: harmful), {}):
            there = harm()
            with oracle.full_precision():
                true, _ = oracle.gradient(loss, batch, purpose="fidelity")
            rounded, _ = oracle.gradient(loss, batch, purpose="fidelity")
        context.space.give_gradient(None)
        change, seen = (after - before for before, after in zip(here, there, strict=True))
        ratio = seen / change if change else math.inf
        cosine = dot(true, rounded) / (norm(true) * norm(rounded))
        if not (abs(ratio - 1) <= _CHANGE and cosine >= _COSINE):
            raise InputError(
                f"autocast rounds the look-ahead away: the harmful loss changes {ratio:.2f} times "
                f"as much as in float32, and the cosine of the gradients there is {cosine:.3f}",
                where="shifted_precision",
                mend="use shifted_precision: float32, or a larger radius",
            )
        return {"autocast_change": ratio, "autocast_cosine": cosine}

    def gradient(self, context: RunContext, terms: dict[str, float]) -> Batch:
        """Draw a harmful batch and add its gradient to ``.grad``; returns the batch."""
        harmful = context.draw("harmful", self.rows)
        terms["harmful"] = context.oracle.accumulate(
            answer_cross_entropy, harmful, purpose="look-ahead"
        )
        return harmful

    def step_along(self, context: RunContext, gradient: Gradient, terms: dict[str, float]) -> float:
        """Return the t for which the look-ahead is -t times the harmful gradient.

        Logs that gradient's norm, the radius, and in an adapter the length in factors, or in merged
        weights where the radius is in factors. The length counts as a constant.
        """
        self._draw(context, gradient, terms)
        return self._factor(gradient, 1 / terms["harmful_norm"], terms)

    def _draw(self, context: RunContext, gradient: Gradient, terms: dict[str, float]) -> None:
        """Log the norm of g_h and this step's radius (equal on all ranks, D3)."""
        if self._range is None:
            raise InactiveTermError("the look-ahead has no radius: prepare() was not called")
        terms["harmful_norm"] = size = norm(gradient)
        if size == 0:
            raise InactiveTermError("the harmful gradient is zero: there is no step to look ahead")
        low, high = (math.log(bound) for bound in self._range)
        terms["radius"] = math.exp(context.random("radius").uniform(low, high))
        if low == high:
            terms["radius"] = self._range[0]
        if self.raw:
            terms["radius"] *= size

    def _factor(self, direction: Gradient, unit: float, terms: dict[str, float]) -> float:
        """Return what ``direction`` is to be multiplied by; ``unit`` makes it a unit vector."""
        factor = terms["radius"] * unit
        if self._merged is None:
            return factor
        if self.raw or self.radius_in == "factors":
            terms["radius_merged"] = self._merged.distance(direction, factor)
            return factor
        factor = self._merged.reach(direction, terms["radius"])
        terms["radius_factors"] = factor / unit
        return factor

    @contextmanager
    def shifted(self, context: RunContext, terms: dict[str, float]) -> Iterator[Batch]:
        """Run the body at the look-ahead, with ``.grad`` empty; restore the weights bit for bit.

        Yields
        ------
        Batch
            The harmful batch that decided the (first) step.
        """
        space = context.space
        if self.direction == "unrolled":
            with space.kept() as start:
                harmful = self._unroll(context, terms)
                terms["radius"] = self._travel(context, start)
                yield harmful
            return
        space.give_gradient(None)
        harmful = self.gradient(context, terms)
        direction = space.gradient()
        self._draw(context, direction, terms)
        unit = 1 / terms["harmful_norm"]
        if self.direction == "sign":
            unit = turn_by_sign_(direction)
        elif self.direction == "adam":
            unit = self._adam.turn_(direction)
        elif self.direction == "random":
            unit = turn_at_random_(direction, context.random("direction").getrandbits(63))
        with space.shifted((-self._factor(direction, unit, terms), direction)):
            # The weights have moved: the gradient makes room for the next pass's activations.
            space.give_gradient(None)
            del direction
            yield harmful

    def _unroll(self, context: RunContext, terms: dict[str, float]) -> Batch:
        harmful = context.draw("harmful", self.rows)
        fresh = (context.draw("harmful", self.rows) for _ in range(self.steps - 1))
        losses = adamw_steps(
            context.oracle,
            chain([harmful], fresh),
            learning_rate=self.learning_rate,
            purpose="look-ahead",
        )
        terms["harmful"], *_ = losses
        return harmful

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors for a checkpoint."""
        return self._adam.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self._adam.load_state(state)
