"""What a seed may be is one thing, whichever command or file gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mithridate.attacks.finetune import FinetuneConfig
from mithridate.attacks.rl import RLConfig
from mithridate.audit.run import AuditConfig
from mithridate.cli import app
from mithridate.configs import LARGEST_SEED, from_mapping
from mithridate.demo import DemoConfig
from mithridate.economics import EconomicsPlan
from mithridate.errors import InputError
from mithridate.training import TrainingConfig

KINDS = [TrainingConfig, FinetuneConfig, RLConfig, AuditConfig]
COMMANDS = {
    "demo": [],
    "immunise": ["--model", "m", "--method", "sdd", "--output-dir", "r"],
    "attack": ["m", "--harmful", "h", "--eval", "e", "--output-dir", "r"],
    "audit": ["--output-dir", "r"],
    "economics": [],
}


def test_the_largest_seed_is_the_largest_that_numpy_takes():
    np.random.RandomState(LARGEST_SEED)
    with pytest.raises(ValueError, match="Seed must be between"):
        np.random.RandomState(LARGEST_SEED + 1)


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_in_a_file_is_checked(kind, seed):
    with pytest.raises(InputError, match=r"seed: .* is not (0 to 4294967295|int)"):
        from_mapping(kind, {"seed": seed}, where="run.yaml")
    assert from_mapping(kind, {"seed": LARGEST_SEED}, where="run.yaml").seed == LARGEST_SEED


@pytest.mark.parametrize("make", [*KINDS, EconomicsPlan, lambda **seed: DemoConfig(
    output_dir=Path("run"), **seed
)])  # fmt: skip
def test_a_seed_given_in_python_is_checked(make):
    with pytest.raises(InputError, match="seed: 4294967296 is not 0 to 4294967295"):
        make(seed=2**32)


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_seed_on_the_command_line_is_checked(command, seed, capsys):
    assert app._run([command, *COMMANDS[command], "--seed", seed], None) == 2
    assert "Invalid value for '--seed'" in capsys.readouterr().err
