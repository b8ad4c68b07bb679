"""Simulated fine-tuners: where their steps lead from the present weights, and how far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Literal

import torch

from mithridate.configs import Range
from mithridate.examples import Example
from mithridate.methods.adapter import Adapter
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import bound_
from mithridate.weights.losses import answer_cross_entropy

Simulator = Literal["steps", "stored", "jump"]
Attacker = Literal["adamw", "sgd", "lora"]

HELD: Mapping[Attacker, int] = {"adamw": 2, "sgd": 1, "lora": 0}
"""Parameter-sized buffers of each kind's optimiser; an adapter's are small."""

_MOMENTUM = 0.9


class Walker:
    """A simulated fine-tuner, of one kind, on a data set and at a learning rate of its own.

    ``adamw`` trains all weights; so does ``sgd``, with momentum 0.9; ``lora`` trains a fresh
    adapter with AdamW and ends where it is merged. Gradients are bounded by 1, as usual.

    With ``simulator="stored"`` it goes on from its last displacement, applied to the present
    weights, until it has made as many steps as were drawn for its life; distant weights then
    cost few passes. With ``jump`` it is one signed step as long as that many steps (of AdamW).

    Parameters
    ----------
    name
        Of the purpose its passes are counted under.
    learning_rates
        The kinds to draw from, one for each life, with their ranges (drawn log-uniformly).
    rank
        Of a ``lora`` walker's adapter.
    """

    def __init__(
        self,
        name: str,
        simulator: Simulator,
        *,
        steps: tuple[int, int],
        life: tuple[int, int],
        learning_rates: Mapping[Attacker, Range],
        batch_size: int,
        rank: int = 8,
    ) -> None:
        self.name = name
        self.simulator = simulator
        self.steps = steps
        self.life = life
        self.learning_rates = learning_rates
        self.batch_size = batch_size
        self.rank = rank
        self._born = -1
        self._age = 0
        self._end = 0
        self._displacement: Gradient | None = None
        self._adapter: Adapter | None = None
        self._optimiser: torch.optim.Optimizer | None = None
        self._waiting: dict[str, torch.Tensor] = {}

    @property
    def mean_passes(self) -> float:
        """Backward calls of a walk, on average."""
        return 1 if self.simulator == "jump" else sum(self.steps) / 2

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
            ``<name>_loss`` of the last step, ``<name>_travel`` (L2; with several kinds also
            ``<name>_travel_<kind>``) and ``<name>_age`` in steps.
        """
        rng = context.random(self.name)
        if self.simulator != "stored" or self._age >= self._end:
            self._born, self._age, self._end = context.step, 0, rng.randint(*self.life)
            self._displacement = self._adapter = self._optimiser = None
            self._waiting = {}
        seed = Random(f"{context.seed}/{self._born}/{self.name}")
        kind = self._kind(context)
        low, high = self.learning_rates[kind]
        learning_rate = low * (high / low) ** seed.random()
        data = dataset(seed)
        if self.simulator == "jump":
            loss = self._jump(context, data, learning_rate)
        else:
            if self._optimiser is None:
                self._begin(context, kind, learning_rate)
            loss = self._step(context, start, data, rng.randint(*self.steps))
        if self.simulator != "stored":
            # Its moments would stand beside whatever comes next.
            self._adapter = self._optimiser = None
        elif self._adapter is None:
            self._displacement = context.space.snapshot()
            torch._foreach_sub_(self._displacement, start)
        travel = context.space.travel(start)
        several = {f"{self.name}_travel_{kind}": travel} if len(self.learning_rates) > 1 else {}
        return {
            f"{self.name}_loss": loss,
            f"{self.name}_travel": travel,
            f"{self.name}_age": float(self._age),
        } | several

    def _kind(self, context: RunContext) -> Attacker:
        draw = Random(f"{context.seed}/{self._born}/{self.name}/kind")
        return draw.choice(list(self.learning_rates))

    def _jump(self, context: RunContext, data: list[Example], learning_rate: float) -> float:
        loss = self._accumulate(context, data)
        direction = context.space.take_gradient()
        torch._foreach_sign_(direction)
        context.space.add_((-learning_rate * self._end, direction))
        self._age = self._end
        return loss

    def _begin(self, context: RunContext, kind: Attacker, learning_rate: float) -> None:
        trained: list[torch.Tensor] = [*context.space.tensors]
        if kind == "lora":
            seed = Random(f"{context.seed}/{self._born}/{self.name}/adapter")
            self._adapter = Adapter(context, rank=self.rank, seed=seed)
            trained = self._adapter.factors
        if kind == "sgd":
            self._optimiser = torch.optim.SGD(trained, lr=learning_rate, momentum=_MOMENTUM)
        else:
            self._optimiser = torch.optim.AdamW(
                trained, lr=learning_rate, weight_decay=0.0, fused=True
            )
        self._wake(trained, self._optimiser)

    def _step(self, context: RunContext, start: Gradient, data: list[Example], steps: int) -> float:
        space, optimiser, adapter = context.space, self._optimiser, self._adapter
        assert optimiser is not None, "_begin makes it"
        if adapter is not None:
            adapter.merge_into(context, start)
        elif self._displacement is not None:
            space.add_((1.0, self._displacement))
        loss = math.nan
        for _ in range(steps):
            space.give_gradient(None)
            loss = self._accumulate(context, data)
            bound_(space.gradient() if adapter is None else adapter.take_gradient(context))
            optimiser.step()
            if adapter is not None:
                adapter.merge_into(context, start)
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
        name, held = "displacement", self._displacement
        if self._adapter is not None:
            name, held = "factor", self._adapter.factors
        if held is not None and self._optimiser is not None:
            moments = self._optimiser.state_dict()["state"]
            for index, tensor in enumerate(held):
                found[f"{name}.{index}"] = tensor
                found |= {f"{key}.{index}": value for key, value in moments[index].items()}
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

    def _wake(self, trained: list[torch.Tensor], optimiser: torch.optim.Optimizer) -> None:
        if not self._waiting:
            return
        if self._adapter is None:
            self._displacement = []
        for index, weight in enumerate(trained):
            for key in [key for key in self._waiting if key.endswith(f".{index}")]:
                name, value = key.rpartition(".")[0], self._waiting.pop(key)
                if name == "displacement":
                    self._displacement = [*(self._displacement or []), value.to(weight)]
                elif name == "factor":
                    weight.copy_(value)
                else:
                    optimiser.state[weight][name] = value.clone()
        self._waiting = {}
