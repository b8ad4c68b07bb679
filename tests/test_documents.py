"""What the documents tell a reader to type, exists; what they link to, is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mithridate.attacks import FinetuneConfig
from mithridate.attacks.rl import RLConfig
from mithridate.configs import from_mapping
from mithridate.training import TrainingConfig
from tests.cli.test_app import COMMANDS, run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_in_the_documents_exists(command: str) -> None:
    options = set(re.findall(r"--[a-z][a-z-]*", run(command, "--help").stdout))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(rf"mithridate {command}([^`\n|]*)", text):
            assert set(re.findall(r"--[a-z][a-z-]*", line)) <= options, (document.name, line)


def test_every_command_in_the_documents_exists() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|\$ )mithridate ([a-z]+)", text)
        assert set(named) <= set(COMMANDS), document.name


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"(?:`|\$ )make ([a-z-]+)", document.read_text(encoding="utf-8"))
        assert set(named) <= targets, document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("config", [TrainingConfig, FinetuneConfig, RLConfig])
def test_every_key_of_a_configuration_file_is_documented(config: type) -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text)) | {"learning_rate"}
    assert {field.name for field in dataclasses.fields(config)} <= named


def test_the_configuration_files_in_the_documents_are_taken() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    run_yaml, attack_yaml = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    del run_yaml["training"]["report_to"]  # not every machine has the tracker
    assert from_mapping(TrainingConfig, run_yaml["training"], where="document").lora_rank == 16
    assert from_mapping(FinetuneConfig, attack_yaml["attack"], where="document").lora_rank == 8
