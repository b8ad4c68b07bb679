"""The gradient one method's step leaves on one family, whatever the micro-batch or processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mithridate.chat import ChatFormat
from mithridate.examples import Example
from mithridate.methods import METHODS, RunContext
from mithridate.training.lora import attach_lora
from mithridate.training.streams import StreamSampler
from mithridate.weights import GradientOracle
from tests.compat.runs import OPTIONS, stream_rows
from tests.compat.zoo import zoo_model, zoo_tokenizer

STEPPING = tuple(name for name in OPTIONS if name != "lox")
"""Methods with a step; LoX's work is done once, without data."""


def step_gradient(
    family: str, method: str, space: str, *, micro_batch_size: int | None, output_dir: Path
) -> list[torch.Tensor]:
    """Return the combined gradient of one step in float64, a tensor per trainable weight."""
    model = zoo_model(family).double()
    # The grouped kernel of experts knows no float64.
    model.set_experts_implementation("eager")
    if space == "lora":
        torch.manual_seed(2)
        model = attach_lora(model, rank=2, seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad and "lora_B" in name:
                    weight.normal_(std=0.1)  # at its zero start an adapter has half a gradient
    chat = ChatFormat(zoo_tokenizer())
    examples = {name: [Example(**row) for row in rows] for name, rows in stream_rows().items()}
    samplers = {
        name: StreamSampler([chat.encode(row) for row in rows], chat.collate, seed=0, name=name)
        for name, rows in examples.items()
    }
    context = RunContext(
        oracle=GradientOracle(model, micro_batch_size=micro_batch_size, autocast=False),
        draw=lambda name, rows: samplers[name].draw(rows),
        total_steps=4,
        seed=0,
        chat=chat,
        examples=examples,
        step=1,
        learning_rate=1e-3,
        output_dir=output_dir,
    )
    made = METHODS.load(method)
    options = OPTIONS[method]
    if method == "tokenbuncher":
        options = options | {"min_group_std": 0.0}  # random models answer all prompts alike
    defence = made(made.config_class(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defence.check(model)
        defence.prepare(context)
        defence.step(context)
    return [tensor.clone() for tensor in context.space.gradient()]
