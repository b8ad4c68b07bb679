"""Clock and memory of a step beside plain fine-tuning, on random weights in the testbed's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mithridate.claims.judging import Measurement, over_repeats
from mithridate.costing import CostPlan, run_cost
from mithridate.errors import RunStoppedError
from mithridate.events import Event, Listener
from mithridate.measures.shapes import SHAPES, find_shape

if TYPE_CHECKING:
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
    runs = _repeated(plan, {}, on_event)
    adapted = _repeated(
        CostPlan(shape=_shape(bed), methods=("ctrap",), space="lora", seconds=SECONDS / 4),
        {}, on_event,
    )  # fmt: skip
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
    own = {"subject": "CTRAP in an adapter of rank 32"}
    found.append(_of(adapted, "ctrap", "A5", "peak_memory_ratio", "memory ratio", **own))
    found.append(_of(adapted, "ctrap", "A6", "clock_ratio", "clock ratio", **own))
    return found


def rollouts(bed: Testbed, on_event: Listener) -> list[Measurement]:
    """A4: whether TokenBuncher's step grows in proportion to what it samples."""
    variants: dict[str, tuple[str, Mapping[str, Any]]] = {
        f"{count} x {length}": (
            "tokenbuncher",
            {"rollouts": count, "response_length": length},
        )
        for count, length in CELLS
    }
    plan = CostPlan(shape=_shape(bed), methods=("sft",), seconds=SECONDS)
    counts = [count for count, _ in CELLS]
    ratios, sampled = [], 0.0
    for run in _repeated(plan, variants, on_event):
        rows = [run["methods"][name] for name in variants]
        tokens = [row["generated_tokens"] for row in rows]
        ratios.append(beyond_line(tokens, counts, [row["step_seconds"] for row in rows]))
        sampled = tokens[-1]
    return [
        Measurement(
            claim="A4",
            quantity="time of the largest step over its linear prediction",
            subject="TokenBuncher",
            **over_repeats(ratios),
            over="runs",
            setting=f"K x length of {', '.join(variants)}; the last samples {sampled:.0f} tokens",
            model=_described(plan),
        )
    ]


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


def _repeated(
    plan: CostPlan, variants: Mapping[str, tuple[str, Mapping[str, Any]]], on_event: Listener
) -> list[dict[str, Any]]:
    found = []
    for number in range(RUNS):
        on_event(Event(stage="timing steps", step=number, total=RUNS))
        found.append(run_cost(plan, variants=variants))
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


def _described(plan: CostPlan) -> str:
    assert plan.shape is not None
    return f"{plan.shape}, random weights, {find_shape(plan.shape).parameters():,} parameters"
