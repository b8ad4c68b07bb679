"""The cost meter on a model small enough to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mithridate.errors import InactiveTermError, InputError, RunStoppedError
from mithridate.measures.cost import _Operations, measure_cost, measure_costs
from mithridate.methods import METHODS, Method, RunContext
from mithridate.training.config import TrainingConfig
from tests.tiny import mean_loss, tiny_batch, tiny_examples, tiny_llama, tiny_tokenizer

ROWS = 4


def method(name: str, **options: Any) -> Method:
    kind = METHODS.load(name)
    rows = {"harmful_rows": ROWS, "retain_rows": ROWS, "collapse_rows": ROWS}
    own = rows | {"lookahead_radius": 0.1} if name == "ctrap" else {"batch_size": ROWS}
    made: Method = kind(kind.config_class(**own | options))
    return made


def measured(name: str, **options: Any) -> dict[str, Any]:
    return measure_cost(
        tiny_llama(dtype=torch.float32),
        tiny_tokenizer(),
        tiny_examples(),
        method(name),
        TrainingConfig(steps=4),
        **{"warmup": 3, "pairs": 3, **options},
    )


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    sft = METHODS.load("sft")

    class Failing(sft):  # type: ignore[misc, valid-type]
        def step(self, context: RunContext) -> dict[str, float]:
            if context.step >= self.after:
                raise InactiveTermError("nothing left to do\nand more")
            return super().step(context)  # type: ignore[no-any-return]

    late, early = (Failing(sft.config_class(batch_size=ROWS)) for _ in range(2))
    early.after, late.after = 1, 4
    methods = {
        "ctrap": method("ctrap"),
        "seam": method("seam", epsilon=1e-3),
        "log": method("seam", unlearning="log", epsilon=1e-3),
        "late": late,
        "early": early,
    }
    return measure_costs(
        tiny_llama(dtype=torch.float32, hidden=128),
        tiny_tokenizer(),
        tiny_examples(),
        methods,
        TrainingConfig(learning_rate=1e-8),
        rows=ROWS,
        warmup=3,
        rounds=3,
    )


def test_passes_and_batch_equivalents_are_those_of_the_papers(
    found: dict[str, dict[str, Any]],
) -> None:
    for name, passes, equivalents in (
        ("sft", 1, 1),
        ("ctrap", 3, 3),
        ("seam", 5, 17 / 3),
        ("log", 5, 5),
    ):
        row = found[name]
        assert row["passes_per_step"] == passes
        assert row["extra_passes"] == passes - 1
        assert row["batch_equivalents"] == pytest.approx(equivalents)
        assert row["rounds"] == 3
    assert found["sft"]["clock_ratio"] == found["sft"]["memory_time_ratio"] == 1


def test_memory_is_the_declared_buffers_and_little_else(found: dict[str, dict[str, Any]]) -> None:
    for name in ("ctrap", "seam", "log"):
        row = found[name]
        assert row["parameter_buffers"] <= row["extra_buffers"] < row["parameter_buffers"] + 0.7
        assert row["extra_bytes"] == sum(row["extra_bytes_per_device"].values())
        assert row["memory_time_ratio"] == row["peak_memory_ratio"] * row["clock_ratio"]
    # Weights, two moments and a gradient at least.
    weights = 4 * sum(p.numel() for p in tiny_llama(hidden=128).parameters())
    assert 4 * weights <= found["sft"]["peak_memory_bytes"] < 5 * weights


def test_operations_are_near_six_for_each_weight_and_token(
    found: dict[str, dict[str, Any]],
) -> None:
    for name in ("sft", "log"):
        assert found[name]["flops"] == pytest.approx(found[name]["flops_6nd"], rel=0.3)
    assert found["seam"]["flops"] > found["log"]["flops"]


def test_operations_are_those_of_the_library_s_own_counter() -> None:
    model, batch = tiny_llama(dtype=torch.float32), tiny_batch(3)

    def work() -> None:
        mean_loss(model, batch).backward()
        with torch.no_grad():
            mean_loss(model, batch)

    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        work()
    with _Operations() as ours, sdpa_kernel(SDPBackend.MATH):
        work()
    assert ours.total == theirs.get_total_flops() > 0


def test_intervals_hold_their_medians(found: dict[str, dict[str, Any]]) -> None:
    for name in ("ctrap", "seam", "log"):
        low, high = found[name]["clock_ratio_interval"]
        assert low <= found[name]["clock_ratio"] <= high


@pytest.mark.parametrize("name", ["early", "late"])
def test_a_method_that_stops_is_a_row_with_its_reason(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    assert found[name] == {"not_timed": "nothing left to do"}


def test_what_a_method_keeps_from_step_to_step_counts() -> None:
    """AdamDirection keeps a second moment beside the saved weights."""
    found = measure_costs(
        tiny_llama(dtype=torch.float32, hidden=128),
        tiny_tokenizer(),
        tiny_examples(),
        {name: method("ctrap", lookahead_direction=name) for name in ("gradient", "adam")},
        TrainingConfig(learning_rate=1e-8),
        rows=ROWS,
        warmup=3,
        rounds=3,
    )
    more = found["adam"]["extra_buffers"] - found["gradient"]["extra_buffers"]
    assert more == pytest.approx(1, abs=0.2)


def test_sft_costs_what_sft_costs() -> None:
    found = measured("sft")
    assert found["passes_per_step"] == found["sft_passes_per_step"] == 1
    assert 0.2 < found["clock_ratio"] < 5
    assert found["parameter_buffers"] == 0
    assert found["peak_memory_ratio"] == pytest.approx(1, abs=0.05)
    assert found["pairs"] == 3


def test_a_method_whose_steps_change_along_a_run_is_timed_in_all_of_its_phases() -> None:
    sft = METHODS.load("sft")
    seen: list[tuple[int, int]] = []

    class Watched(sft):  # type: ignore[misc, valid-type]
        def step(self, context: RunContext) -> dict[str, float]:
            seen.append((context.step, context.total_steps))
            return super().step(context)  # type: ignore[no-any-return]

    measure_costs(
        tiny_llama(dtype=torch.float32), tiny_tokenizer(), tiny_examples(),
        {"watched": Watched(sft.config_class(batch_size=ROWS))}, TrainingConfig(steps=200),
        rows=ROWS, warmup=3, rounds=5, seconds=60.0,
    )  # fmt: skip
    assert seen == [(step, 8) for step in range(8)]
    # TokenBuncher's noise begins after an eighth of the run: within what is timed.
    noisy = [METHODS.load("tokenbuncher").adds_noise(method("tokenbuncher"), *one) for one in seen]
    assert any(noisy[3:])
    assert not all(noisy[3:])


def test_time_is_bounded_but_three_pairs_are_timed() -> None:
    assert measured("sft", pairs=20, seconds=0)["pairs"] == 3


def test_a_median_needs_pairs() -> None:
    with pytest.raises(InputError, match="too few"):
        measured("sft", pairs=2)


def test_one_method_that_cannot_be_timed_stops() -> None:
    with pytest.raises(RunStoppedError, match="ctrap cannot be timed: needs the streams"):
        measure_cost(
            tiny_llama(dtype=torch.float32),
            tiny_tokenizer(),
            {name: rows for name, rows in tiny_examples().items() if name != "harmful"},
            method("ctrap"),
            TrainingConfig(),
        )
