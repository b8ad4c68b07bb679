"""F11: which way CTRAP's collapse loss goes while a model collapses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mithridate.chat import Batch
from mithridate.events import Event, Listener
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy, token_collapse
from published.contexts import (
    DRAWS,
    ROWS,
    describe,
    draws,
    open_context,
    open_model,
    unused_token,
)
from published.judging import Measurement, over_repeats

if TYPE_CHECKING:
    from mithridate.testbeds.base import Testbed

STEPS = 20
RATE = 1e-3


def direction(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """Walk into the collapse, and set benign log perplexity against the collapse loss."""
    model, chat = open_model(bed)
    oracle = GradientOracle(model)
    loss = token_collapse(unused_token(bed, chat))
    slopes, falls, rises = [], [], []
    for seed, batches in enumerate(draws(bed, model, chat)):
        on_event(Event(stage="walking into the collapse", step=seed, total=DRAWS))

        def look(batches: dict[str, Batch] = batches) -> tuple[float, float]:
            return (
                oracle.loss(loss, batches["general"], purpose="F11"),
                oracle.loss(answer_cross_entropy, batches["benign"], purpose="F11"),
            )

        draw = open_context(bed, model, chat, seed=seed).draw
        with oracle.space.kept():
            before = look()
            optimiser = torch.optim.AdamW(oracle.space.tensors, lr=RATE, weight_decay=0.0)
            for _ in range(STEPS):
                oracle.space.give_gradient(None)
                oracle.accumulate(loss, draw("general", ROWS), purpose="F11")
                optimiser.step()
            oracle.space.give_gradient(None)
            after = look()
        falls.append(after[0] - before[0])
        rises.append(after[1] - before[1])
        slopes.append(rises[-1] / falls[-1])
    return [
        Measurement(
            claim="F11",
            quantity=quantity,
            subject="aligned model",
            **over_repeats(values),
            over="batches",
            unit=unit,
            setting=f"{STEPS} AdamW steps at {RATE:g} down the collapse loss",
            model=describe(bed, model),
        )
        for quantity, values, unit in (
            ("change of log perplexity per change of collapse loss", slopes, ""),
            ("change of collapse loss", falls, "nats"),
            ("change of benign log perplexity", rises, "nats"),
        )
    ]
