"""A battery in TamperBench's form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mithridate.measures.rows import read_measured
from mithridate.reports.tamperbench import heat_map
from tests.verdicts.make_battery import row, rows, write

ONCE = {None: (0, 1)}


def battery() -> list[dict]:
    benign = {"lora_rank None, times 1": 0.1, "times 1, lora_rank 8": 0.0}
    found = []
    for target, harm in (("undefended", 0.8), ("defended", 0.2)):
        found += rows("P3", target, (1.0, 0.9), splits=ONCE)
        found += rows("TP1", target, (harm, 0.9), rates=(1e-4,), splits=ONCE)
        # Twice the harm at a rate that leaves nothing of the model: no attacker wants it.
        found += rows("TP1", target, (1.0, 0.0), rates=(1e-2,), splits=ONCE)
        for name, most in benign.items():
            found += rows("TP3", target, (most, 0.9), splits=ONCE, configuration=name)
    return found


def test_the_attacker_s_best_of_every_search_on_every_model(tmp_path: Path) -> None:
    found = heat_map(read_measured(write(tmp_path / "run", battery(), summary={"method": "ours"})))
    assert found is not None
    assert found["models"] == ["undefended", "defended"]
    assert found["attacks"] == [
        "no_weight_modification", "full_parameter_finetune",
        "benign_full_parameter_finetune", "benign_lora_finetune",
    ]  # fmt: skip
    expected = [[0.0, 0.8, 0.1, 0.0], [0.0, 0.2, 0.1, 0.0]]
    assert np.array(found["safety_raw"]) == pytest.approx(np.array(expected))
    assert np.array(found["safety_delta"]) == pytest.approx(np.array(expected))
    assert np.array(found["utility_raw"])[:, 0] == pytest.approx([0.9, 0.9])
    assert np.array(found["utility_delta"]) == pytest.approx(np.zeros((2, 4)))
    assert found["metadata"]["defense"] == "ours"
    own = [one for one in found["trials"] if one["model"] == "defended"]
    assert [(one["attack"], one["trial"]) for one in own] == [
        ("full_parameter_finetune", 0), ("full_parameter_finetune", 1),
        ("benign_full_parameter_finetune", 0), ("benign_lora_finetune", 0),
    ]  # fmt: skip
    assert own[0]["hyperparameters"] == {"learning_rate": 1e-4, "steps": 40, "configuration": ""}
    assert (own[0]["safety"], own[0]["seeds"]) == (pytest.approx(0.2), [0, 1])


def test_a_model_that_one_attack_never_met_is_left_out(tmp_path: Path) -> None:
    given = [one for one in battery() if (one["attack"], one["target"]) != ("TP3", "defended")]
    found = heat_map(read_measured(write(tmp_path / "run", given)))
    assert found is not None
    assert found["models"] == ["undefended"]
    assert {one["model"] for one in found["trials"]} == {"undefended"}


def test_a_run_without_such_attacks_has_no_heat_map(tmp_path: Path) -> None:
    plain = [one for one in battery() if one["attack"] == "P3"]
    assert heat_map(read_measured(write(tmp_path / "a", plain))) is None
    unjudged = [row("TP1", "defended", 0, 1e-4, step, 0.5, 0.9, None, 80) for step in (0, 2)]
    for one in unjudged:
        del one["utility"]
    assert heat_map(read_measured(write(tmp_path / "b", unjudged))) is None
