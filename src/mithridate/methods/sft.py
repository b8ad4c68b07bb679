"""Plain supervised fine-tuning on refusals and retained answers: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mithridate.configs import Count, require
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.weights.losses import answer_cross_entropy


@dataclass(frozen=True, kw_only=True)
class SFTConfig(MethodConfig):
    """Options of plain SFT.

    Parameters
    ----------
    batch_size
        Rows per step, shared evenly among ``retain``.
    retain
        Streams to train on.
    """

    batch_size: Count = 8
    retain: tuple[str, ...] = ("refusal", "benign", "general")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size >= len(self.retain) >= 1,
            f"batch_size {self.batch_size} gives some of the {len(self.retain)} streams no row",
            "raise batch_size or name fewer streams in retain",
        )


class SFT(Method):
    """min l(weights; refusal + benign + general)."""

    name = "sft"
    paper = "-"
    summary = "Plain supervised fine-tuning on refusals and permitted answers (the control)."
    defends = "nothing: it is what every defence is compared with"
    limits = "a few harmful steps undo it"
    config_class: ClassVar[type[MethodConfig]] = SFTConfig
    passes_per_step = 1
    parameter_buffers = 0

    def __init__(self, config: SFTConfig) -> None:
        self.config = config

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.retain)

    @property
    def active_terms(self) -> tuple[str, ...]:
        return ("retain",)

    def step(self, context: RunContext) -> dict[str, float]:
        batch = context.draw_joined(self.config.retain, self.config.batch_size)
        retain = context.oracle.accumulate(answer_cross_entropy, batch, purpose="retain")
        return {"retain": retain}
