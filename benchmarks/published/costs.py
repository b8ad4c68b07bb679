"""Clock and memory of a step beside plain fine-tuning, on random weights in the testbed's shape."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mithridate.costing import CostPlan, configured, run_cost
from mithridate.errors import RunStoppedError
from mithridate.events import Event, Listener
from mithridate.measures.shapes import SHAPES
from published.contexts import ROWS, TOKENS, open_context, open_model
from published.judging import Measurement, counted, over_repeats

if TYPE_CHECKING:
    from mithridate.methods import RunContext
    from mithridate.testbeds.base import Testbed

RUNS = 5
SECONDS = 8.0
"""Timed in each run; at least three steps of each method whatever it takes."""
CELLS = ((2, 8), (2, 32), (4, 8), (4, 16), (8, 8), (8, 32))
"""Rollouts and longest answer of TokenBuncher, the largest last."""
_METHODS = {"sdd": "SDD", "ctrap": "CTRAP", "seam": "SEAM", "tokenbuncher": "TokenBuncher, K = 4"}
_ATLAS = "smollm2-135m"


def steps(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A1, A5, A6, A7: what a step costs, in full weights and, for CTRAP, in an adapter."""
    plan = CostPlan(shape=_shape(bed), methods=tuple(_METHODS), seconds=SECONDS)
    runs = _repeated(plan, RUNS, on_event)
    small = CostPlan(shape=_shape(bed), methods=("ctrap",), space="lora", seconds=0.0)
    # Its bytes are counted, so that once is enough.
    (adapted,) = _repeated(small, 1, on_event)
    found = [
        _of(runs, name, claim, *which, subject=_METHODS[name])
        for claim, name, which in (
            ("A1", "sdd", ("clock_ratio", "clock ratio")),
            ("A1", "sdd", ("peak_memory_ratio", "memory ratio")),
            ("A5", "ctrap", ("peak_memory_ratio", "memory ratio")),
            ("A5", "ctrap", ("memory_time_ratio", "memory x time ratio")),
            ("A6", "ctrap", ("clock_ratio", "clock ratio")),
            ("A6", "ctrap", ("cpu_ratio", "processor time ratio")),
            *(("A7", name, ("clock_ratio", "clock ratio")) for name in _METHODS),
        )
    ]
    subject = "CTRAP in an adapter of rank 32"
    once = _of([adapted], "ctrap", "A5", "peak_memory_ratio", "memory ratio", subject=subject)
    found.append(replace(once, **counted(once.estimate)))
    return found


def rollouts(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A4: whether TokenBuncher's step grows in proportion to what it samples."""
    aligned, chat = open_model(bed)
    # Random weights seldom end an answer, so that it is as long as it may be.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(aligned.config, dtype=torch.float32)
    context = open_context(bed, model, chat)
    cells = [
        configured("tokenbuncher", ROWS, TOKENS, rollouts=count, response_length=length)
        for count, length in CELLS
    ]
    for method in cells:
        method.prepare(context)
    ratios: list[float] = []
    sampled = 0.0
    for number in range(-1, RUNS):  # the first is warm-up
        on_event(Event(stage="timing rollouts", step=max(number, 0), total=RUNS))
        tokens, seconds = [], []
        for method in cells:
            before = _generated(context)
            started = time.process_time()
            method.step(context)
            seconds.append(time.process_time() - started)
            tokens.append(_generated(context) - before)
            context.space.give_gradient(None)
        if number >= 0:
            ratios.append(beyond_line(tokens, [count for count, _ in CELLS], seconds))
        sampled = tokens[-1]
        context.step += 1
    return [
        Measurement(
            claim="A4",
            quantity="time of the largest step over its linear prediction",
            subject="TokenBuncher",
            **over_repeats(ratios),
            over="runs",
            setting="processor time; K x length of "
            + ", ".join(f"{count} x {length}" for count, length in CELLS)
            + f"; the last samples {sampled:.0f} tokens",
            model=f"{bed.name}, random weights, {model.num_parameters():,} parameters",
        )
    ]


def _generated(context: RunContext) -> float:
    return float(sum(count.generated for count in context.oracle.ledger.values()))


def beyond_line(
    tokens: Sequence[float], rollouts: Sequence[float], seconds: Sequence[float]
) -> float:
    """Return the last step's seconds over what a line through the others predicts.

    The line has a slope over sampled tokens, one over rollouts (their prompts are read again) and
    a constant.
    """
    terms = np.column_stack([tokens, rollouts, np.ones(len(tokens))])
    fitted = np.linalg.lstsq(terms[:-1], np.asarray(seconds[:-1]), rcond=None)[0]
    return float(seconds[-1] / (terms[-1] @ fitted))


def _shape(bed: Testbed) -> str:
    return bed.name if bed.name in SHAPES else _ATLAS


def _repeated(plan: CostPlan, times: int, on_event: Listener) -> list[dict[str, Any]]:
    found = []
    for number in range(times):
        on_event(Event(stage=f"timing steps, {plan.space}", step=number, total=times))
        found.append(run_cost(plan))
        for name, row in found[-1]["methods"].items():
            if "not_timed" in row:
                raise RunStoppedError(f"{name} cannot be timed: {row['not_timed']}")
    return found


def _of(
    runs: Sequence[Mapping[str, Any]],
    name: str,
    claim: str,
    key: str,
    quantity: str,
    *,
    subject: str,
) -> Measurement:
    first = runs[0]
    return Measurement(
        claim=claim,
        quantity=quantity,
        subject=subject,
        **over_repeats([run["methods"][name][key] for run in runs]),
        over="runs",
        unit="x plain fine-tuning",
        setting=f"{first['batch_size']} rows of {first['length']} tokens, {first['space']} weights,"
        f" {first['machine']['device']}, {first['machine']['threads']} threads",
        model=f"{first['shape']}, random weights, {first['parameters']:,} parameters",
    )
