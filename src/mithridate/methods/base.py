"""What every defence is: a rule that turns gradients into one update."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from mithridate.chat import Batch, ChatFormat
from mithridate.examples import Example
from mithridate.weights import GradientOracle, WeightSpace


@dataclass
class RunContext:
    """What a method may use during one immunisation run.

    Attributes
    ----------
    oracle
        Runs and counts every pass.
    draw
        ``draw(stream, rows)`` returns the next collated batch of a stream; its position is saved
        with the checkpoints.
    step
        Optimiser steps done so far.
    total_steps
        Optimiser steps of the whole run.
    seed
        Seed of the run.
    chat
        Formats examples for this tokenizer.
    examples
        The streams' examples (for preparation such as SDD's pairing).
    learning_rate
        The outer optimiser's learning rate at this step.
    output_dir
        The run folder, for what a method's preparation leaves behind; never texts.
    """

    oracle: GradientOracle
    draw: Callable[[str, int], Batch]
    total_steps: int
    seed: int
    chat: ChatFormat
    examples: dict[str, list[Example]] = field(default_factory=dict)
    step: int = 0
    learning_rate: float = 0.0
    output_dir: Path | None = None

    @property
    def space(self) -> WeightSpace:
        """The trainable weights."""
        return self.oracle.space

    def random(self, what: str) -> random.Random:
        """Return a generator seeded by (seed, step, what): equal on all ranks (D3)."""
        return random.Random(f"{self.seed}/{self.step}/{what}")

    def rows_of_step(self, count: int, rows: int, what: str) -> list[int]:
        """Return which of ``count`` rows a method's own stream gives at this step.

        Epochs are permutations seeded by (seed, what, epoch), so the step is the whole state.
        """
        chosen = []
        for position in range(self.step * rows, (self.step + 1) * rows):
            epoch, place = divmod(position, count)
            order = list(range(count))
            random.Random(f"{self.seed}/{what}/{epoch}").shuffle(order)
            chosen.append(order[place])
        return chosen

    def draw_joined(self, streams: tuple[str, ...], rows: int) -> Batch:
        """Draw ``rows`` rows in all, shared evenly among ``streams``, as one batch."""
        shares = [rows // len(streams) + (i < rows % len(streams)) for i in range(len(streams))]
        return join([self.draw(name, n) for name, n in zip(streams, shares, strict=True) if n])


def join(batches: list[Batch]) -> Batch:
    """Stack right-padded batches into one."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.input_ids.shape[1] for batch in batches)

    def stack(name: str, fill: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(
                    getattr(batch, name), (0, length - batch.input_ids.shape[1]), value=fill
                )
                for batch in batches
            ]
        )

    return Batch(
        input_ids=stack("input_ids", 0),
        attention_mask=stack("attention_mask", 0),
        labels=stack("labels", -100),
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method. ``streams`` are drawn in rows per step."""


class Method(ABC):
    """A defence.

    Class attributes describe it to `mithridate methods` and to the cost meter.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    defends: ClassVar[str]
    limits: ClassVar[str]
    spaces: ClassVar[tuple[str, ...]] = ("full", "lora")
    config_class: ClassVar[type[MethodConfig]]
    config: Any

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """The streams that `step` draws from."""

    @property
    @abstractmethod
    def passes_per_step(self) -> float:
        """Backward calls of one optimiser step at one micro-batch (its mean where it varies)."""

    @property
    @abstractmethod
    def parameter_buffers(self) -> int:
        """Parameter-sized buffers beyond weights, gradient and optimiser state."""

    @property
    def active_terms(self) -> tuple[str, ...]:
        """Names among `step`'s results that stop the run when they stay zero (H1)."""
        return ()

    def prepare(self, context: RunContext) -> dict[str, float]:  # noqa: ARG002
        """Work before the first step (pairing, fidelity checks); returns what to log."""
        return {}

    @abstractmethod
    def step(self, context: RunContext) -> dict[str, float]:
        """Leave one combined gradient in ``.grad`` and return the terms to log."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors that a checkpoint must hold for a bit-exact resume."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Restore what `state` returned."""
