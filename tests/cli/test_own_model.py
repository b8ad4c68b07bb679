"""`immunise`, `attack` and `report` on a user's own model and data, from files to page."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mithridate.attacking import AttackPlan, run_attack
from mithridate.errors import InputError
from mithridate.events import Event
from mithridate.immunisation import ImmunisationPlan, run_immunisation
from tests.cli.test_app import run
from tests.tiny import WORDS, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and the files of every stream."""
    import torch

    folder = tmp_path_factory.mktemp("world")
    tiny_llama(dtype=torch.float32).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for offset, name in enumerate(("harmful", "refusal", "benign", "eval", "permitted")):
        rows = [
            {"prompt": f"w{offset} w{offset + 5} w{n}", "answer": f"w{n % 9} w{offset}"}
            for n in range(10)
        ]
        if name == "refusal":
            rows = [{"prompt": row["prompt"], "answer": "error"} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def immunisation(world: Path, folder: Path, **changes: Any) -> ImmunisationPlan:
    values: dict[str, Any] = {
        "model": str(world / "model"),
        "method": "sft",
        "streams": {
            name: str(world / f"{name}.jsonl") for name in ("harmful", "refusal", "benign")
        },
        "steps": 3,
        "output_dir": folder,
    }
    return ImmunisationPlan(**{**values, **changes})


def attack(world: Path, folder: Path, **changes: Any) -> AttackPlan:
    values: dict[str, Any] = {
        "model": str(world / "model"),
        "harmful": str(world / "harmful.jsonl"),
        "evaluation": str(world / "eval.jsonl"),
        "learning_rates": (1e-3,),
        "steps": 2,
        "output_dir": folder,
    }
    return AttackPlan(**{**values, **changes})


@pytest.mark.filterwarnings("ignore:--general not given", "ignore:sft does not use")
def test_immunised_folder_loads_and_says_what_was_done(world: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    document = run_immunisation(immunisation(world, tmp_path), on_event=events.append)
    AutoModelForCausalLM.from_pretrained(document["model"])
    AutoTokenizer.from_pretrained(document["model"])
    assert not [*Path(document["model"]).rglob("*.bin"), *Path(document["model"]).rglob("*.pt")]
    assert document["substituted_streams"] == {"general": "benign"}
    assert events[-1].step == events[-1].total == 3
    assert "retain" in events[-1].metrics
    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert resolved["training"]["steps"] == 3


@pytest.mark.filterwarnings("ignore:--general not given", "ignore:sft does not use")
@pytest.mark.parametrize("chosen", [None, "float32"])
def test_a_release_has_the_type_of_its_source_or_the_one_that_is_asked_for(
    world: Path, tmp_path: Path, chosen: str | None
) -> None:
    source, config = tmp_path / "bf16", tmp_path / "run.yaml"
    AutoModelForCausalLM.from_pretrained(world / "model").bfloat16().save_pretrained(source)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(source)
    config.write_text(f"training: {{save_dtype: {chosen or 'null'}}}")
    plan = immunisation(world, tmp_path / "run", model=str(source), config=config)
    document = run_immunisation(plan)
    wanted = chosen or "bfloat16"
    released = AutoModelForCausalLM.from_pretrained(document["model"], dtype="auto")
    assert {str(p.dtype) for p in released.parameters()} == {f"torch.{wanted}"}
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["training"]["save_dtype"] == wanted
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["dtype"] == wanted
    assert (manifest["rounding_difference"] > 0) == (chosen is None)


def test_streams_that_serve_nobody_or_stand_in_are_said(world: Path, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="stream benign serves as general"),
        pytest.warns(UserWarning, match="does not use the stream harmful"),
    ):
        run_immunisation(immunisation(world, tmp_path))


@pytest.mark.filterwarnings("ignore:--general not given", "ignore:sft does not use")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "seem"}, "did you mean 'seam'"),
        ({"streams": {}}, "refusal, benign, general not given"),
        ({"model": "no/such/place"}, "no such model folder"),
    ],
)
def test_plans_that_cannot_run_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_immunisation(immunisation(world, tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metod: {}", "unknown section 'metod'"),
        ("method: 3", "not a mapping"),
        ("method: {name: seam}", "for the method 'seam'"),
        ("method: {batch_sise: 3}", "did you mean 'batch_size'"),
        ("training: {learning_rate: -1}", "not a positive number"),
        ("training: {stepz: 1, lerning_rate: 2}", "stepz.*lerning_rate"),
    ],
)
def test_bad_configuration_is_refused(world: Path, tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=message):
        run_immunisation(immunisation(world, tmp_path / "out", config=config))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:--prompts not given", "ignore:--general not given")
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tokenbuncher", "reference_model: FOREIGN", "has another tokenizer"),
        ("lox", "base: FOREIGN", "another id in the base model's vocabulary"),
        ("lox+tokenbuncher", "parts: {lox: {base: BASE}, tokenbuncher: {reference_model: FOREIGN}}",
         "has another tokenizer"),
        ("tokenbuncher", "reference_model: no/such/place", "no such model folder"),
    ],
)  # fmt: skip
def test_foreign_models_are_refused_before_the_run_folder_is_begun(
    world: Path, tmp_path: Path, method: str, options: str, message: str
) -> None:
    foreign, config = tmp_path / "foreign", tmp_path / "run.yaml"
    AutoModelForCausalLM.from_pretrained(world / "model").save_pretrained(foreign)
    tiny_tokenizer(WORDS[::-1]).save_pretrained(foreign)
    options = options.replace("FOREIGN", str(foreign)).replace("BASE", str(world / "model"))
    config.write_text(f"method: {{{options}}}")
    names = () if method == "lox" else ("harmful", "benign")
    streams = {name: str(world / f"{name}.jsonl") for name in names}
    plan = immunisation(
        world, tmp_path / "out", method=method, config=config, streams=streams, steps=None
    )
    with pytest.raises(InputError, match=message):
        run_immunisation(plan)
    assert not (tmp_path / "out").exists()


def test_overlapping_streams_are_refused(world: Path, tmp_path: Path) -> None:
    path = str(world / "harmful.jsonl")
    streams = {"refusal": str(world / "refusal.jsonl"), "benign": path, "general": path}
    with pytest.raises(InputError, match=r"harmful.jsonl, line 1 = .*harmful.jsonl, line 1"):
        run_immunisation(immunisation(world, tmp_path, streams=streams))
    with pytest.raises(InputError, match=r"harmful.jsonl, line 1 = .*harmful.jsonl, line 1"):
        run_attack(attack(world, tmp_path, evaluation=path))


def test_attack_with_a_control_makes_a_run_folder(world: Path, tmp_path: Path) -> None:
    plan = attack(
        world,
        tmp_path,
        undefended=str(world / "model"),
        permitted=str(world / "permitted.jsonl"),
        keep_answers=True,
    )
    summary = run_attack(plan)
    assert summary["undefended"]["after"] == summary["defended"]["after"], "same model, same attack"
    rows = [json.loads(line) for line in (tmp_path / "trajectory.jsonl").read_text().splitlines()]
    assert [(row["target"], row["step"]) for row in rows] == [
        ("undefended", 0),
        ("undefended", 2),
        ("defended", 0),
        ("defended", 2),
    ]
    assert all(abs(sum(row["outcomes"].values()) - 1) < 1e-9 for row in rows)
    assert rows[1]["answer_loss"] != rows[0]["answer_loss"]
    assert stat.S_IMODE((tmp_path / "samples.json").stat().st_mode) == 0o600
    assert not list(tmp_path.rglob("*.safetensors")), "attacked weights are not kept"


def test_texts_stay_out_of_the_folder_unless_asked_for(world: Path, tmp_path: Path) -> None:
    run_attack(attack(world, tmp_path))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert "w0 w5" not in path.read_text(), path
    assert not (tmp_path / "samples.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attack: {learning_rate: 1}", "given on the command line"),
        ("attacks: {}", "something else"),
        ("attack: {optimiser: adamm}", "unknown optimiser"),
        ("attack: {optimiser: galore_adamw}", "galore.*cannot be made"),
        ("attack: {schedule: cosine_with_min_lr}", "cosine_with_min_lr.*cannot be made"),
    ],
)
def test_bad_attack_configuration_is_refused(
    world: Path, tmp_path: Path, text: str, message: str
) -> None:
    config = tmp_path / "attack.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=message):
        run_attack(attack(world, tmp_path, config=config))


def test_the_three_commands_follow_each_other(world: Path, tmp_path: Path) -> None:
    model, planted = str(world / "model"), str(tmp_path / "planted")
    files = {name: str(world / f"{name}.jsonl") for name in ("harmful", "refusal", "benign")}
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    document = json.loads(
        run(
            "immunise", "--model", model, "--method", "sft", *given,
            "--steps", "2", "--output-dir", planted, "--json",
        ).stdout
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "planted/model/README.md")
    assert card.data.tags == ["mithridate", "sft"]
    assert card.data.base_model is None, "a path of this machine is left out"
    assert "optimiser steps" in card.text
    assert model not in card.content
    attacked = str(tmp_path / "attacked")
    summary = json.loads(
        run(
            "attack", "--model", document["model"], "--undefended", model,
            "--harmful", files["harmful"], "--eval", str(world / "eval.jsonl"),
            "--permitted", str(world / "permitted.jsonl"), "--learning-rate", "1e-3",
            "--steps", "2", "--output-dir", attacked, "--json",
        ).stdout
    )  # fmt: skip
    assert {"undefended", "defended", "attack", "seed"} <= set(summary)
    assert json.loads(run("report", attacked, "--json").stdout)["bytes"] > 10_000


@pytest.fixture
def short(world: Path, tmp_path: Path) -> Path:
    """A model of 16 learnt positions: one token more is an error, not a guess."""
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer()), n_positions=16, n_embd=8, n_layer=1, n_head=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def rows_of(path: Path, prompt: str) -> str:
    rows = [{"prompt": f"{prompt} w{n}", "answer": "w2 w3", "category": "c"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.filterwarnings("ignore:--general not given")
def test_rows_longer_than_the_model_s_positions_lose_their_beginning(
    world: Path, short: Path, tmp_path: Path
) -> None:
    long = rows_of(tmp_path / "long.jsonl", "w1 " * 40)
    streams = {"refusal": str(world / "refusal.jsonl"), "benign": long}
    run_immunisation(immunisation(world, tmp_path / "o", model=str(short), streams=streams))
    found = run_attack(attack(world, tmp_path / "a", model=str(short), harmful=long))
    assert "defended" in found


def test_a_question_that_leaves_no_room_for_an_answer_is_refused(
    world: Path, short: Path, tmp_path: Path
) -> None:
    long = rows_of(tmp_path / "long.jsonl", "w1 " * 40)
    with pytest.raises(
        InputError, match=r"eval: 4 \(.*, line 1: a question of 44 tokens for 16 pos"
    ):
        run_attack(attack(world, tmp_path / "a", model=str(short), evaluation=long))
    assert not (tmp_path / "a" / "attacks").exists()


@pytest.mark.filterwarnings("ignore:--general not given", "ignore:sft does not use")
def test_an_attack_leaves_an_immunisation_s_folder_alone(world: Path, tmp_path: Path) -> None:
    run_immunisation(immunisation(world, tmp_path))
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="another command's run"):
        run_attack(attack(world, tmp_path))
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_attack_by_rl_is_judged_and_kept_like_the_other(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed (pip install 'mithridate[trl]')")
    config = tmp_path / "attack.yaml"
    config.write_text("attack: {batch_size: 2, rollouts: 2, response_length: 4}")
    plan = attack(world, tmp_path / "run", kind="rl", config=config)
    summary = run_attack(plan)
    assert summary["attack"]["kind"] == "rl"
    text = (tmp_path / "run/trajectory.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["target"], row["step"]) for row in rows] == [("defended", 0), ("defended", 2)]
    assert {"reward", "reward_std", "entropy", "useful_harm", "answer_loss"} <= set(rows[1])
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["kind"] == "rl"
    assert resolved["attack"]["rollouts"] == 2
    assert run_attack(plan)["defended"] == summary["defended"], "finished work is kept"


def test_options_of_rl_are_unknown_to_fine_tuning(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "attack.yaml"
    config.write_text("attack: {rollouts: 4}")
    with pytest.raises(InputError, match="unknown key 'rollouts'"):
        run_attack(attack(world, tmp_path, config=config))
    config.write_text("attack: {rollouts: 1}")
    with pytest.raises(InputError, match="no spread"):
        run_attack(attack(world, tmp_path, config=config, kind="rl"))


def test_an_attack_keeps_the_day_that_a_template_was_told(world: Path, tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(world / "model")
    shutil.copytree(world / "model", model)
    tokenizer.chat_template = "{{ 'w' ~ strftime_now('%d') | int ~ ' ' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    config = tmp_path / "attack.yaml"
    config.write_text("attack: {template_date: 2026-03-07}")
    run_attack(attack(world, tmp_path / "run", model=str(model), config=config))
    folder = tmp_path / "run" / "attacks" / "defended-0.001"
    record = (folder / "attack.json").read_bytes()
    run_attack(attack(world, tmp_path / "run", model=str(model)))
    assert (folder / "attack.json").read_bytes() == record, "finished, today as on that day"
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["attack"]["template_date"] == "2026-03-07"
    config.write_text("attack: {template_date: 2026-03-08}")
    run_attack(attack(world, tmp_path / "run", model=str(model), config=config))
    assert (folder / "attack.json").read_bytes() != record
