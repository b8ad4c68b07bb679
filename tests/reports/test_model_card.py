"""The model card names what is public, and claims nothing that was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from mithridate.reports.model_card import write_model_card


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    settings = {
        "method": {"name": "ctrap+sft", "parts": [{"encoder": str(tmp_path / "minilm")}]},
        "training": {"lora_rank": 4, "seed": 7, "steps": 30, "save_dtype": "bfloat16"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "model").mkdir()
    return tmp_path


def test_a_public_base_is_named_with_its_revision(run_dir: Path) -> None:
    card = ModelCard.load(write_model_card(run_dir, base="owner/name", revision="abc123"))
    assert card.data.base_model == "owner/name"
    assert card.data.base_model_relation == "finetune"
    assert "revision: abc123" in card.text
    assert "seed 7, 30 optimiser steps; the weights are stored in bfloat16" in card.text
    assert "a LoRA adapter, since merged" in card.text
    assert "Nothing here says that it holds" in card.text


def test_a_folder_of_this_machine_is_not_named(run_dir: Path) -> None:
    card = ModelCard.load(write_model_card(run_dir, base=str(run_dir), revision="abc123"))
    assert card.data.base_model is None
    assert str(run_dir) not in card.content
    assert "encoder: minilm" in card.text
    assert "abc123" not in card.content
