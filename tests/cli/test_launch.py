"""The command line really started by `accelerate launch`, on processors, with gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.cli.test_own_model import world

__all__ = ["world"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch build has no gloo",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the launch would take the GPUs"),
]
ROOT = Path(__file__).parents[2]


def start(
    world: Path, folder: Path, *launcher: str, steps: int = 3
) -> subprocess.CompletedProcess[str]:
    streams = [
        part
        for name in ("harmful", "refusal", "benign")
        for part in (f"--{name}", str(world / f"{name}.jsonl"))
    ]
    command = [
        sys.executable, *launcher, "-m", "mithridate", "immunise",
        "--model", str(world / "model"), "--method", "ctrap", *streams,
        "--config", str(world / "ctrap.yaml"), "--steps", str(steps),
        "--output-dir", str(folder), "--json",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def accelerate(*options: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return ["-m", "accelerate.commands.launch", *options, "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", port]  # fmt: skip


@pytest.fixture(scope="module")
def configured(world: Path) -> Path:
    (world / "ctrap.yaml").write_text(
        "method: {lookahead_radius: 0.1, collapse_token: 9}\ntraining: {learning_rate: 1e-3}\n"
    )
    return world


def tokens(folder: Path) -> int:
    ledger = json.loads((folder / "manifest.json").read_text())["ledger"]
    return sum(count["tokens"] for count in ledger.values())


def test_two_launched_processes_do_what_one_does(configured: Path, tmp_path: Path) -> None:
    alone = start(configured, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    shared = start(configured, tmp_path / "two", *accelerate("--multi_gpu"))
    assert shared.returncode == 0, shared.stderr
    # One document although two processes ran; each did about half of the work.
    document = json.loads(shared.stdout)
    assert document["steps"] == 3
    assert 0.3 < tokens(tmp_path / "two") / tokens(tmp_path / "one") < 0.7
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("one", "two")
    )
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_launch_that_starts_fewer_processes_than_asked_for_is_refused(
    configured: Path, tmp_path: Path
) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one without a word."""
    done = start(configured, tmp_path / "run", *accelerate("--cpu"))
    assert done.returncode != 0
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert "started only this one" in done.stderr
    assert not (tmp_path / "run" / "model").exists()
