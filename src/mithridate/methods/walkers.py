"""Simulated fine-tuners: where their steps lead from the present weights, and how far."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Literal

import torch

from mithridate.examples import Example
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient, WeightSpace
from mithridate.weights.arithmetic import bound_
from mithridate.weights.losses import answer_cross_entropy

Simulator = Literal["steps", "stored", "jump"]


class Walker:
    """A simulated fine-tuner: AdamW on a data set of its own, at a learning rate of its own.

    With ``simulator="stored"`` it goes on from its last displacement, applied to the present
    weights, until it has made as many steps as were drawn for its life; distant weights then
    cost few passes. With ``jump`` it is one signed step as long as that many steps.

    Parameters
    ----------
    name
        Of the purpose its passes are counted under.
    """

    def __init__(
        self,
        name: str,
        simulator: Simulator,
        *,
        steps: tuple[int, int],
        life: tuple[int, int],
        learning_rate: tuple[float, float],
        batch_size: int,
    ) -> None:
        self.name = name
        self.simulator = simulator
        self.steps = steps
        self.life = life
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self._born = -1
        self._age = 0
        self._end = 0
        self._displacement: Gradient | None = None
        self._optimiser: torch.optim.AdamW | None = None
        self._waiting: dict[str, torch.Tensor] = {}

    def walk(
        self,
        context: RunContext,
        start: Gradient,
        dataset: Callable[[Random], list[Example]],
    ) -> dict[str, float]:
        """Leave the weights where the simulation ends.

        Parameters
        ----------
        start
            The weights to start from (their present value).
        dataset
            Draws the simulation's data set; asked with the same seed for its whole life.

        Returns
        -------
        dict
            ``<name>_loss`` of the last step, ``<name>_travel`` (L2) and ``<name>_age`` in steps.
        """
        rng = context.random(self.name)
        if self.simulator != "stored" or self._age >= self._end:
            self._born, self._age, self._end = context.step, 0, rng.randint(*self.life)
            self._displacement = self._optimiser = None
        seed = Random(f"{context.seed}/{self._born}/{self.name}")
        low, high = self.learning_rate
        learning_rate = low * (high / low) ** seed.random()
        data = dataset(seed)
        if self.simulator == "jump":
            loss = self._jump(context, data, learning_rate)
        else:
            loss = self._step(context, data, learning_rate, rng.randint(*self.steps))
        if self.simulator == "stored":
            self._displacement = context.space.snapshot()
            torch._foreach_sub_(self._displacement, start)
        return {
            f"{self.name}_loss": loss,
            f"{self.name}_travel": context.space.travel(start),
            f"{self.name}_age": float(self._age),
        }

    def _jump(self, context: RunContext, data: list[Example], learning_rate: float) -> float:
        loss = self._accumulate(context, data)
        direction = context.space.take_gradient()
        torch._foreach_sign_(direction)
        context.space.add_((-learning_rate * self._end, direction))
        self._age = self._end
        return loss

    def _step(
        self, context: RunContext, data: list[Example], learning_rate: float, steps: int
    ) -> float:
        space = context.space
        if self._optimiser is None:
            self._optimiser = torch.optim.AdamW(
                space.tensors, lr=learning_rate, weight_decay=0.0, fused=True
            )
            self._wake(space, self._optimiser)
        if self._displacement is not None:
            space.add_((1.0, self._displacement))
        loss = math.nan
        for _ in range(steps):
            space.give_gradient(None)
            loss = self._accumulate(context, data)
            bound_(space.gradient())
            self._optimiser.step()
            self._age += 1
        space.give_gradient(None)
        return loss

    def _accumulate(self, context: RunContext, data: list[Example]) -> float:
        draw = Random(f"{context.seed}/{self._born}/{self.name}/{self._age}")
        rows = draw.sample(data, min(self.batch_size, len(data)))
        return context.oracle.accumulate(
            answer_cross_entropy, context.chat.batch(rows), purpose=self.name
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a bit-exact resume needs."""
        found = {"counters": torch.tensor([self._born, self._age, self._end])}
        if self._displacement is not None and self._optimiser is not None:
            moments = self._optimiser.state_dict()["state"]
            for index, tensor in enumerate(self._displacement):
                found[f"displacement.{index}"] = tensor
                found |= {f"{key}.{index}": held for key, held in moments[index].items()}
        return {f"{self.name}.{key}": tensor for key, tensor in found.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; tensors find their place at the next walk."""
        own = {
            key.removeprefix(f"{self.name}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"{self.name}.")
        }
        self._born, self._age, self._end = map(int, own.pop("counters"))
        self._waiting = own

    def _wake(self, space: WeightSpace, optimiser: torch.optim.AdamW) -> None:
        if not self._waiting:
            return
        self._displacement = []
        for index, weight in enumerate(space.tensors):
            self._displacement.append(self._waiting[f"displacement.{index}"].to(weight))
            optimiser.state[weight] = {
                key: self._waiting[f"{key}.{index}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self._waiting = {}
