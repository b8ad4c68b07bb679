"""The cost meter on a model small enough to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mithridate.errors import InputError
from mithridate.measures.cost import measure_cost
from mithridate.methods import METHODS, Method
from mithridate.training.config import TrainingConfig
from tests.tiny import tiny_examples, tiny_llama, tiny_tokenizer


def method(name: str) -> Method:
    kind = METHODS.load(name)
    rows = (
        {"harmful_rows": 4, "retain_rows": 4, "collapse_rows": 4}
        if name == "ctrap"
        else {"batch_size": 4}
    )
    made: Method = kind(kind.config_class(**rows))
    return made


def measured(name: str, **options: int) -> dict[str, Any]:
    return measure_cost(
        tiny_llama(dtype=torch.float32),
        tiny_tokenizer(),
        tiny_examples(),
        method(name),
        TrainingConfig(steps=4),
        **options,
    )


def test_sft_costs_what_sft_costs() -> None:
    found = measured("sft", warmup=1, pairs=3)
    assert found["passes_per_step"] == found["sft_passes_per_step"] == 1
    assert 0.2 < found["clock_ratio"] < 5
    assert found["parameter_buffers"] == 0
    assert found["pairs"] == 3


def test_passes_are_counted_and_buffers_declared() -> None:
    found = measured("ctrap", warmup=1, pairs=3)
    ctrap = method("ctrap")
    assert found["passes_per_step"] == ctrap.passes_per_step <= 3
    assert found["parameter_buffers"] == ctrap.parameter_buffers <= 1
    assert found["step_seconds"] > 0
    assert found["peak_memory_bytes"] > 0


def test_time_is_bounded_but_three_pairs_are_timed() -> None:
    assert measured("sft", warmup=0, pairs=20, seconds=0)["pairs"] == 3


def test_a_median_needs_pairs() -> None:
    with pytest.raises(InputError, match="too few"):
        measured("sft", pairs=2)
