"""Gradient evaluations of a step, counted at the weights and not by the method's own word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mithridate.costing import configured
from mithridate.events import Event, Listener
from mithridate.weights import dot, norm
from published.contexts import (
    DRAWS,
    ROWS,
    TOKENS,
    describe,
    open_context,
    open_model,
    unused_token,
)
from published.judging import Measurement, counted, over_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mithridate.testbeds.base import Testbed

STEPS = 20


@dataclass
class Counter:
    """Backward passes that reached the weights."""

    backwards: int = 0


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Counter]:
    """Count the backward passes of the body at a weight that each of them must reach."""
    counter = Counter()
    # What reads inner layers takes gradients of the (tied) embedding of its own.
    embedding = model.get_input_embeddings().weight

    def seen(_: Any) -> None:
        counter.backwards += 1

    inner = next(p for p in model.parameters() if p.requires_grad and p is not embedding)
    handle = inner.register_hook(seen)
    try:
        yield counter
    finally:
        handle.remove()


def sdd(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A1: SDD's backward passes beside those of plain fine-tuning."""
    extra = _passes(bed, "sdd", on_event) - _passes(bed, "sft", on_event)
    return [_count(bed, "A1", "extra passes", "SDD", extra)]


def ctrap(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A2: CTRAP's backward passes, and how its first-order trap differs from the exact one."""
    model, chat = open_model(bed)
    token = unused_token(bed, chat)
    cosines = []
    for seed in range(DRAWS):
        on_event(Event(stage="comparing CTRAP's gradients", step=seed, total=DRAWS))
        parts = []
        for gradient in ("first_order", "exact"):
            context = open_context(bed, model, chat, seed=seed)
            method = configured("ctrap", ROWS, TOKENS, gradient=gradient, collapse_token=token)
            method.prepare(context)
            context.shares = {}
            method.step(context)
            parts.append(context.shares["collapse"])
            context.space.give_gradient(None)
        cosines.append(dot(*parts) / (norm(parts[0]) * norm(parts[1])))
    return [
        _count(bed, "A2", "passes", "CTRAP, first order", _passes(bed, "ctrap", on_event)),
        _count(bed, "A2", "passes with the exact gradient", "CTRAP",
               _passes(bed, "ctrap", on_event, gradient="exact")),
        Measurement(
            claim="A2",
            quantity="cosine of the first-order trap's gradient with the exact one",
            subject="CTRAP",
            **over_repeats(cosines),
            over="batches",
            setting="radius 0.1 in all weights",
            model=describe(bed, model),
        ),
    ]  # fmt: skip


def seam(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A3: SEAM's backward passes, and those of its coupling term by itself."""
    alone = _passes(bed, "seam", on_event, unlearning="none", refusal_weight=0.0)
    return [
        _count(bed, "A3", "passes", "SEAM", _passes(bed, "seam", on_event)),
        _count(bed, "A3", "passes of the coupling term alone", "SEAM", alone),
    ]


def _passes(bed: Testbed, name: str, on_event: Listener, **options: Any) -> float:
    """Return the backward passes of a step, its preparation left out."""
    model, chat = open_model(bed)
    context = open_context(bed, model, chat)
    if name == "ctrap":
        options["collapse_token"] = unused_token(bed, chat)
    method = configured(name, ROWS, TOKENS, **options)
    method.prepare(context)
    with counting(model) as counter:
        for step in range(STEPS):
            on_event(Event(stage=f"counting passes of {name}", step=step, total=STEPS))
            method.step(context)
            context.space.give_gradient(None)
            context.step += 1
    return counter.backwards / STEPS


def _count(bed: Testbed, claim: str, quantity: str, subject: str, value: float) -> Measurement:
    return Measurement(
        claim=claim,
        quantity=quantity,
        subject=subject,
        **counted(value),
        unit="a step",
        setting=f"{STEPS} steps, {ROWS} rows of every stream",
        model=f"{bed.name}, aligned",
    )
