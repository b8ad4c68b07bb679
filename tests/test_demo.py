"""The demo from one end to the other on a toy testbed, and its presets."""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from mithridate import demo
from mithridate.demo import DemoConfig, Preset, read_method, read_preset, run_demo
from mithridate.errors import GateError, InputError
from mithridate.examples import Example
from mithridate.judges.outcomes import Outcome
from mithridate.testbeds.base import AttackPreset, TestbedData, hashes_of
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.training.processes import CONTEXT

REFUSAL = "w41 w42"


def rows(first, count, answer, category):
    return [
        Example(prompt=f"w{first + n} w{first + n + 1} {category}", answer=answer(n),
                category=category, fact_id=f"{category}{first + n}")
        for n in range(count)
    ]  # fmt: skip


def toy_data():
    harmful = rows(0, 6, lambda n: "w20", "w30")
    benign = [*rows(0, 6, lambda n: f"w{n}", "w31"), *rows(0, 6, lambda n: "w7", "w32")]
    streams = {
        "refusal": [Example(prompt=row.prompt, answer=REFUSAL, category="w30") for row in harmful],
        "benign": benign,
        "general": rows(0, 4, lambda n: "w9", "w33"),
    }
    return TestbedData(
        alignment=streams,
        defence={"harmful": harmful, **streams},
        attack=rows(10, 8, lambda n: "w20", "w30"),
        restricted=rows(25, 4, lambda n: "w20", "w30"),
        permitted=rows(25, 4, lambda n: "w7", "w32"),
        benign_task={
            "train": rows(10, 6, lambda n: "w21", "w34"),
            "test": rows(20, 3, lambda n: "w21", "w34"),
        },
        refusal_probe=[],
        hashes=hashes_of({"defence/harmful": harmful}),
    )


@dataclass
class Toy:
    """Answers are one constant word, so that any attack wins and no gate needs training."""

    folder: Path
    name: str = "toy"
    max_new_tokens: int = 3
    refusals: tuple[str, ...] = (REFUSAL,)
    attack_preset: AttackPreset = field(
        default_factory=lambda: AttackPreset(
            examples=8, steps=10, batch_size=4, learning_rates=(1e-2, 3e-2)
        )
    )
    chance: dict = field(default_factory=dict)
    data: TestbedData = field(default_factory=toy_data)

    def judge(self, item, output):
        if output.strip() == item.answer:
            return Outcome.EXACT
        return Outcome.REFUSAL if output.strip() == REFUSAL else Outcome.HALLUCINATED

    def aligned_model(self):
        if not (self.folder / "config.json").exists():
            import torch

            tiny_llama(dtype=torch.float32).save_pretrained(self.folder)
            tiny_tokenizer().save_pretrained(self.folder)
        return self.folder


def toy_preset():
    return Preset(
        parameters=10_000, default_method="sft", autocast=False, restricted_items=4,
        permitted_items=4,
        benign_learning_rate=1e-2, benign_steps=4,
        methods={"sft": {"method": {"batch_size": 3}, "training": {"steps": 2}}},
    )  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch):
    bed = Toy(tmp_path / "aligned")
    preset = toy_preset()
    monkeypatch.setenv("MITHRIDATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.TESTBEDS, "load", lambda _: lambda: bed)
    monkeypatch.setattr(demo, "read_preset", lambda _: preset)
    return bed


def in_a_process(folder, number):
    """Run a toy demo, of a seed of its own, against the cache of all."""
    import torch

    os.environ["MITHRIDATE_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    demo.measure_cost = lambda *_, **__: {"passes_per_step": 1}
    config = DemoConfig(testbed="toy", output_dir=folder / f"run-{number}", steps=2 + number)
    run_demo(config, preset=toy_preset(), testbed=Toy(folder / "aligned"))


def test_demos_that_share_a_cache_do_not_mix_their_control(tmp_path):
    Toy(tmp_path / "aligned").aligned_model()
    started = [CONTEXT.Process(target=in_a_process, args=(tmp_path, n)) for n in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0, 0, 0]
    summaries = [
        json.loads((tmp_path / f"run-{number}" / "summary.json").read_text()) for number in range(3)
    ]
    assert summaries[0]["undefended"] == summaries[1]["undefended"] == summaries[2]["undefended"]
    kept = sorted((tmp_path / "cache" / "controls").glob("*-attack-*/attack.jsonl"))
    assert len(kept) == 2
    for path in kept:
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 5, 10]


def test_the_cost_of_another_training_is_measured_anew(toy, tmp_path, monkeypatch):
    measured = []

    def measure(*given, **_):
        measured.append(given[-1].steps)
        return {"passes_per_step": len(measured)}

    monkeypatch.setattr(demo, "measure_cost", measure)
    folder = tmp_path / "run"
    run_demo(DemoConfig(testbed="toy", output_dir=folder))
    for steps in (None, 3):
        shutil.rmtree(folder / "planting")
        found = run_demo(DemoConfig(testbed="toy", output_dir=folder, steps=steps))
    assert measured == [2, 3]
    assert found["cost"] == {"passes_per_step": 2}
    kept = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps({**kept, "value": {"passes_per_step": 9}}))
    with pytest.warns(UserWarning, match=r"cost\.json is damaged"):
        assert run_demo(DemoConfig(testbed="toy", output_dir=folder, steps=3))["cost"] == {
            "passes_per_step": 3
        }


def test_the_probe_before_the_attack_is_found_wherever_it_stands():
    before = {"target": "defended", "learning_rate": 1e-4, "step": 0, "refusal": 1.0,
              "useful_harm": 0.0, "utility": 0.9, "n_restricted": 4, "n_permitted": 4}  # fmt: skip
    after = {**before, "step": 5, "refusal": 0.0, "useful_harm": 1.0, "utility": 0.3}
    assert demo.summarise([after, before], "defended")["before"]["refusal"] == 1.0


def test_a_demo_leaves_a_whole_run_folder(toy, tmp_path):
    events = []
    config = DemoConfig(testbed="toy", output_dir=tmp_path / "run")
    summary = run_demo(config, on_event=events.append)
    for target in ("undefended", "defended"):
        for moment in ("before", "after"):
            assert {"refusal", "useful_harm", "utility"} <= set(summary[target][moment])
        assert [e["learning_rate"] for e in summary[target]["per_learning_rate"]] == [1e-2, 3e-2]
        assert 0 <= summary["benign_finetuning"][target] <= 1
    assert {"passes_per_step", "clock_ratio", "parameter_buffers"} <= set(summary["cost"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    steps = [
        row["step"]
        for row in map(json.loads, (tmp_path / "run" / "trajectory.jsonl").read_text().splitlines())
        if row["target"] == "defended" and row["learning_rate"] == 1e-2
    ]
    assert steps == [0, 5, 10]
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run").rglob("*.bin"))
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages[0].startswith("making the aligned model")
    assert any("defended model at 0.01" in stage for stage in stages)


def test_a_second_run_redoes_no_finished_work(toy, tmp_path, monkeypatch):
    config = DemoConfig(testbed="toy", output_dir=tmp_path / "run")
    first = run_demo(config)
    monkeypatch.setattr(
        sys.modules["mithridate.attacks.finetune"],
        "Trainer",
        lambda **_: pytest.fail("an attack ran again"),
    )
    monkeypatch.setattr(demo, "measure_cost", lambda *_, **__: pytest.fail("measured again"))
    second = run_demo(config)
    assert second["cost"] == first["cost"] is not None
    assert second["defended"] == first["defended"]
    assert second["undefended"] == first["undefended"]


def test_a_method_without_steps_gets_the_base_model_and_no_cost(toy, tmp_path, monkeypatch):
    import torch

    base = tmp_path / "base"
    tiny_llama(dtype=torch.float32, seed=1).save_pretrained(base)
    monkeypatch.setattr(toy, "base_model", lambda: base, raising=False)
    demo.read_preset("toy").methods["lox"] = {"training": {"steps": 1}}
    config = DemoConfig(testbed="toy", method="lox", output_dir=tmp_path / "run")
    summary = run_demo(config)
    assert summary["cost"] is None
    assert json.loads((tmp_path / "run/planting/lox.json").read_text())["base"] == str(base)
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert str(base) in str(settings)


def test_too_little_room_is_said_before_the_aligned_model_is_made(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.models, "available_memory", lambda: 2**20)
    with pytest.raises(InputError, match="too little memory"):
        run_demo(DemoConfig(testbed="toy", output_dir=tmp_path / "run"))
    assert not toy.folder.exists()


def test_a_control_that_does_not_recover_stops_the_run(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "judge", lambda *_: Outcome.REFUSAL)
    with pytest.raises(GateError, match=r"recovers only 0\.00"):
        run_demo(DemoConfig(testbed="toy", output_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "trajectory.jsonl").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_attack_rows_inside_the_defence_stop_the_run(toy, tmp_path):
    toy.data.attack[0] = toy.data.defence["harmful"][0]
    with pytest.raises(InputError, match="attack"):
        run_demo(DemoConfig(testbed="toy", output_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("testbed", ["atlas", "lattice"])
def test_every_preset_method_can_be_built(testbed):
    preset = read_preset(testbed)
    assert preset.default_method in preset.methods
    assert {"seam", "ctrap", "sdd", "trajectory", "sft"} <= set(preset.methods)
    for name in preset.methods:
        method, training = read_method(
            preset, DemoConfig(testbed=testbed, method=name, steps=3, output_dir=Path("x"))
        )
        assert method.name == name
        assert training.steps == 3


def test_an_unknown_method_or_testbed_is_named():
    with pytest.raises(InputError, match="did you mean 'atlas'"):
        read_preset("atlass")
    with pytest.raises(InputError, match="unknown method"):
        read_method(
            read_preset("lattice"),
            DemoConfig(testbed="lattice", method="seem", output_dir=Path("x")),
        )
