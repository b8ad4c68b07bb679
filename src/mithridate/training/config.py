"""How a method is trained."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.integrations.integration_utils import get_available_reporting_integrations

from mithridate.configs import Seed, check_values, require
from mithridate.templates import day


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a method is trained. Batch sizes belong to the method.

    Parameters
    ----------
    steps
        Optimiser steps.
    learning_rate
        Peak learning rate of AdamW.
    schedule
        Of the learning rate, after ``warmup_steps`` of linear warm-up, whose first step is one part
        of the peak and whose last is all of it.
    weight_decay
        AdamW's; not on norms and biases.
    max_grad_norm
        Clipping bound on the combined gradient's L2 norm; 0 turns clipping off.
    seed
        Of every random choice.
    micro_batch_size
        Rows per pass; ``None`` takes a batch at once. Changes memory and time, not results.
    autocast
        Run passes in bfloat16 autocast; weights stay float32.
    gradient_checkpointing
        Make activations again in the backward pass: less memory, about a third more time, the
        same results.
    max_length
        Most tokens of a row; of a longer one the prompt is cut. ``None`` follows the data, up to
        what the model takes.
    balanced
        Streams of which every category is drawn equally often, however few rows it has.
    reworded
        Streams that also hold every prompt twice with its words in a random order, among words that
        all these streams use: a defence must not hang on wordings that an attacker will not use.
        The answers stay: not for streams whose answers hang on the order, unless the method only
        holds on to what the model says there (TokenBuncher's ``benign``).
    shuffled
        Streams of which every prompt gets the answer to another prompt of its category: a control
        without the knowledge, for ablations.
    cosines_every
        Steps between rows that hold the norm of each term's gradient and its cosine with the
        whole (H2); 0 leaves them out. Such a step holds one gradient more per term; results do
        not change.
    save_every
        Steps between checkpoints; 0 saves only the final model.
    log_every
        Steps between rows of the history.
    report_to
        Trackers, by the Trainer's names (``wandb``, ``tensorboard``, ``trackio``).
    lora_rank
        Plant in a LoRA adapter of this rank; ``None`` plants in all weights.
    lora_alpha
        The adapter's scaling numerator; ``None`` takes twice the rank.
    lora_targets
        Modules to adapt; empty adapts every linear layer except the head.
    save_dtype
        Type of the released weights; ``None`` is that of the weights that were given: those in the
        model's files where a run names a folder or Hub id, the model's own in Python.
    template_arguments
        Given to the chat template (``enable_thinking``, ...); ``chat_template`` names one of
        several.
    template_date
        Day that a chat template is told that asks for it; ``None`` takes that of the first start.
    """

    steps: int = 200
    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: Seed = 0
    micro_batch_size: int | None = None
    autocast: bool = False
    gradient_checkpointing: bool = False
    max_length: int | None = None
    balanced: tuple[str, ...] = ()
    reworded: tuple[str, ...] = ()
    shuffled: tuple[str, ...] = ()
    cosines_every: int = 50
    save_every: int = 100
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_targets: tuple[str, ...] = ()
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    template_date: str | datetime.date | None = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.template_date is not None:
            object.__setattr__(self, "template_date", day(self.template_date).isoformat())
        for name in ("steps", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", f"raise {name}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "cosines_every",
                     "save_every"):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} is negative", f"make {name} 0 or more")
        require(
            0 < self.learning_rate < math.inf,
            f"learning_rate {self.learning_rate} is not a positive number",
            "1e-5 to 1e-3 are usual",
        )
        require(
            self.warmup_steps < self.steps,
            f"warmup_steps {self.warmup_steps} leaves none of the {self.steps} steps",
            "lower warmup_steps or raise steps",
        )
        for name in ("micro_batch_size", "max_length", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1", "or null")
        require(
            self.lora_rank is not None or (self.lora_alpha is None and not self.lora_targets),
            "lora_alpha and lora_targets say nothing without lora_rank",
            "give lora_rank too, or leave them out to train all weights",
        )
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        require(
            not missing,
            f"report_to names trackers that are not installed: {', '.join(sorted(missing))}",
            f"pip install {' '.join(sorted(missing))}",
        )

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate at a step, counted from 0; never 0 in a run.

        The stock schedules start a warm-up at 0, which throws a whole step of a method away.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
