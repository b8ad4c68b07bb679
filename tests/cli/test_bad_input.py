"""What a method cannot use: exit code 2 before any step, with cause and mend on one screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mithridate.cli import app
from tests.tiny import WORDS, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STREAMS = ("harmful", "refusal", "benign", "general")
SMALL = "min_refusal: 0, batch_size: 2, benign_rows: 2, prompt_length: 8, response_length: 4"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that go together and models that do not, and a file of each stream."""
    folder = tmp_path_factory.mktemp("world")
    models = {
        "model": (tiny_llama(dtype=torch.float32), tiny_tokenizer()),
        "wide": (tiny_llama(dtype=torch.float32, hidden=32), tiny_tokenizer()),
        "strange": (tiny_llama(dtype=torch.float32, seed=1), tiny_tokenizer(WORDS[::-1])),
    }
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for number, name in enumerate(STREAMS):
        start = 0 if name == "refusal" else number
        rows = [{"prompt": f"w{start} w{start + 5} w{n}", "answer": "w1 w2"} for n in range(10)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def immunise(
    world: Path, output_dir: Path, method: str, options: str, streams: tuple[str, ...] = STREAMS
) -> int:
    config = output_dir.with_suffix(".yaml")
    config.write_text(f"method: {{{options}}}".replace("WORLD", str(world)))
    arguments = ["immunise", "--model", str(world / "model"), "--method", method]
    for name in streams:
        arguments += [f"--{name}", str(world / f"{name}.jsonl")]
    arguments += ["--steps", "1", "--config", str(config), "--output-dir", str(output_dir)]
    return app._run(arguments, None)


@pytest.mark.parametrize(
    ("method", "options", "streams", "cause", "mend"),
    [
        ("tokenbuncher", "rollouts: 1", STREAMS, "rollouts: 1 is not 2 or more", "correct"),
        ("tokenbuncher", "noise_weight: 0", STREAMS, "noise_weight: 0 is not inside (0, 1)",
         "correct"),
        ("tokenbuncher", "noise_weight: 1", STREAMS, "noise_weight: 1 is not inside (0, 1)",
         "correct"),
        ("lox", "", (), "LoX needs the model before its alignment", "give base"),
        ("lox", "base: WORLD/wide", (), "is (50, 32) in the base model", "the very model"),
        ("lox", "base: WORLD/strange", (), "another id in the base model's", "the very model"),
        ("tokenbuncher", f"reference_model: WORLD/strange, {SMALL}", STREAMS,
         "has another tokenizer", "an earlier version of the same model"),
        ("seam", "", ("harmful", "refusal"), "benign not given", "add --benign FILE"),
        ("tokenbuncher", "", ("benign",), "prompts not given", "add --prompts FILE"),
        ("ctrap", "collapse_token: 50", STREAMS, "no token 50", "an id from 0 to 49"),
        ("seam", "unlearning_layers: 9", STREAMS, "9 inner layers", "unlearning: log"),
        ("tvaccine", "layers: 9", STREAMS, "layers 9: the model has 2", "draw fewer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_screen_and_no_step(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: str,
    streams: tuple[str, ...],
    cause: str,
    mend: str,
) -> None:
    assert immunise(world, tmp_path / "run", method, options, streams) == 2
    screen = capsys.readouterr().err
    lines = screen.splitlines()
    text = " ".join(line.strip("│ ") for line in lines)
    assert cause in text
    assert mend in text
    assert len(lines) < 24
    assert "Traceback" not in screen
    assert not (tmp_path / "run" / "history.jsonl").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_fault_that_only_preparation_finds_leaves_the_folder_usable(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert immunise(world, tmp_path / "run", "trajectory", "attack_steps: [1, 1]") == 2
    assert "one category" in capsys.readouterr().err
    options = "attack_steps: [1, 1], benign_weight: 0"
    assert immunise(world, tmp_path / "run", "trajectory", options) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
