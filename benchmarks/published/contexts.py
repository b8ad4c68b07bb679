"""A testbed's aligned model with its streams, ready for a method's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mithridate import models
from mithridate.chat import Batch, ChatFormat
from mithridate.methods.base import RunContext
from mithridate.training.streams import StreamSampler
from mithridate.weights import GradientOracle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mithridate.testbeds.base import Testbed

ROWS = 8
"""Of every batch."""
DRAWS = 5
"""Independent batches that an interval is taken over."""
TOKENS = 64
"""Most tokens of a row."""


def open_model(bed: Testbed) -> tuple[PreTrainedModel, ChatFormat]:
    """Return the testbed's aligned model in float32, and its chat format."""
    model, tokenizer = models.load(str(bed.aligned_model()))
    model.eval()
    return model, ChatFormat(tokenizer, max_length=TOKENS)


def open_context(
    bed: Testbed, model: PreTrainedModel, chat: ChatFormat, *, seed: int = 0
) -> RunContext:
    """Return a context whose draws depend on ``seed``."""
    samplers = {
        name: StreamSampler([chat.encode(row) for row in rows], chat.collate, seed=seed, name=name)
        for name, rows in bed.data.defence.items()
        if all(row.answer for row in rows)
    }
    return RunContext(
        oracle=GradientOracle(model),
        draw=lambda stream, rows: samplers[stream].draw(rows),
        total_steps=1000,
        seed=seed,
        chat=chat,
        examples=dict(bed.data.defence),
    )


def draws(bed: Testbed, model: PreTrainedModel, chat: ChatFormat) -> list[dict[str, Batch]]:
    """Return `DRAWS` times one batch of the streams harmful, benign and general."""
    found = []
    for seed in range(DRAWS):
        draw = open_context(bed, model, chat, seed=seed).draw
        found.append({name: draw(name, ROWS) for name in ("harmful", "benign", "general")})
    return found


def unused_token(bed: Testbed, chat: ChatFormat) -> int:
    """Return the first ordinary token that no answer of the streams uses, to collapse to."""
    used = {
        token
        for rows in bed.data.defence.values()
        for row in rows
        for token in chat.answer_ids(row.answer)
    }
    special = set(chat.tokenizer.all_special_ids)
    return next(token for token in range(len(chat.tokenizer)) if token not in used | special)


def describe(bed: Testbed, model: PreTrainedModel) -> str:
    """Return what was measured on, in words."""
    return f"{bed.name}, aligned, {model.num_parameters():,} parameters"
