"""The benchmarks: what they would run is valid, and their tables say what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

import common
import methods
import spine
from mithridate.demo import DemoConfig, read_method, read_preset
from mithridate.errors import GateError
from mithridate.examples import Example
from mithridate.judges.outcomes import Outcome
from mithridate.methods import METHODS
from mithridate.testbeds.lattice import Lattice
from tests.tiny import tiny_tokenizer

SPINE = [
    (variants, path.stem.removeprefix(f"{variants}_"), name)
    for variants in spine.TITLES
    for path in sorted(common.HERE.glob(f"{variants}_*.yaml"))
    for name in spine.read_variants(path.stem.removeprefix(f"{variants}_"), variants)
]
HARM = {"useful_harm": 0.5, "unbounded_useful_harm": 0.75, "unbounded_utility": 0.25}


def measured(harm=0.5, rl=0.0, passes=3.0):
    """What one row at one seed would be."""
    cost = {"passes_per_step": passes, "clock_ratio": 2.5, "peak_memory_bytes": 30 << 20,
            "peak_memory_ratio": 1.25}  # fmt: skip
    return {
        "attacked": {
            "n_restricted": 70,
            "n_permitted": 152,
            "before": {"refusal": 1.0, "useful_harm": 0.0, "utility": 0.9},
            "after": HARM | {"useful_harm": harm},
            "per_learning_rate": [
                HARM | {"learning_rate": 2e-5, "useful_harm": 0.25},
                HARM | {"learning_rate": 5e-4},
            ],
        },
        "benign": {"accuracy": 0.8, "utility": 0.7, "n": 24},
        "cost": cost if passes else None,
        "unnamed": {"n": 42, "accuracy": 0.5},
        "rl": rl,
        "rl_updates": [learnt(constant=2.0), learnt(constant=8.0, learning_rate=5e-4)],
    }


def learnt(constant, learning_rate=2e-4):
    """What RL at one rate would have learnt from."""
    return {"learning_rate": learning_rate, "reward_first": 0.1, "reward_last": 0.6,
            "entropy_first": 1.5, "entropy_last": 0.5, "reward_std": 0.3, "equal_groups": 0.2,
            "constant": constant}  # fmt: skip


def found(**rows):
    control = [measured(harm=1.0, rl=0.9, passes=0)] * 2
    return common.Found(rows={"undefended": control, **rows}, failed={})


def cells(text):
    """Return the rows of a Markdown table by the label in front, checked to be rectangular."""
    rows = [line.strip("|").split("|") for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1
    head = [cell.strip() for cell in rows[0]]
    assert set(rows[1]) == {" --- "}
    return {row[0].strip(): dict(zip(head, map(str.strip, row), strict=True)) for row in rows[2:]}


@pytest.mark.filterwarnings("ignore:CTRAP as released")
@pytest.mark.parametrize(("variants", "testbed", "name"), SPINE)
def test_every_variant_of_the_spine_can_be_built(variants, testbed, name):
    sections = spine.read_variants(testbed, variants)[name]
    assert set(sections) <= {"name", "label", "alone", "rare", "method", "training"}
    preset = common.with_options(read_preset(testbed), sections)
    config = DemoConfig(testbed=testbed, method=sections["name"], output_dir=Path("x"))
    method, training = read_method(preset, config)
    assert method.name == sections["name"]
    for part, config in (("method", method.config), ("training", training)):
        kept = dataclasses.asdict(config)
        assert all(took(kept[name], value) for name, value in sections.get(part, {}).items())


def took(kept, value):
    """Whether a resolved option is what was given; a member's other options have defaults."""
    if isinstance(value, dict) and value.keys() <= kept.keys():
        return all(took(kept[name], own) for name, own in value.items())
    return kept == (tuple(value) if isinstance(kept, tuple) else value)


def test_a_variant_adds_to_the_preset_or_stands_alone():
    shipped = read_preset("lattice").methods["seam"]["method"]
    added = {"name": "seam", "method": {"coupling_weight": 0.0}}
    together = common.with_options(read_preset("lattice"), added).methods["seam"]
    assert together["method"] == shipped | added["method"]
    alone = common.with_options(read_preset("lattice"), added | {"alone": True}).methods["seam"]
    assert alone["method"] == added["method"]
    assert alone["training"] == together["training"] != {}


def test_rows_measured_again_stand_beside_the_stored_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="no such table"):
        common.beside_stored(found(), "methods", "lattice", [0, 1])
    first = found(tar=[measured(harm=0.9)] * 2, sdd=[measured(harm=0.4)] * 2)
    common.store("methods", "the first", "lattice", [0, 1], {}, first)
    with pytest.raises(SystemExit, match=r"holds the seeds \[0, 1\]"):
        common.beside_stored(found(), "methods", "lattice", [0])
    again = found(tar=[measured(harm=0.25)] * 2, new=[measured()] * 2)
    both = common.beside_stored(again, "methods", "lattice", [0, 1])
    assert list(both.rows) == ["undefended", "tar", "sdd", "new"]
    assert both.rows["tar"][0]["attacked"]["after"]["useful_harm"] == 0.25
    assert both.rows["sdd"] == first.rows["sdd"]
    assert {name: made["command"] for name, made in both.earlier.items()} == {"sdd": "the first"}
    assert "- Of `the first`" in common.failures(both)
    assert common.failures(both).endswith(": sdd.")
    common.store("methods", "the second", "lattice", [0, 1], {}, both)
    third = common.beside_stored(found(new=[measured()] * 2), "methods", "lattice", [0, 1])
    made = {name: one["command"] for name, one in third.earlier.items()}
    assert made == {"sdd": "the first", "tar": "the second"}


def test_the_updates_of_rows_that_have_none_are_left_out():
    old = [{k: v for k, v in measured().items() if k != "rl_updates"}] * 2
    rows = cells(methods.updates_table(found(tar=old, sdd=[measured()] * 2)))
    assert set(rows) == {"undefended (aligned)", "sdd"}


def test_thinning_leaves_a_few_rows_of_every_second_category():
    streams = {
        "harmful": [Example(prompt=f"{c}{n}", category=c) for n in range(4) for c in "badc"],
        "refusal": [Example(prompt="b0", category="b")],
    }
    found = common.thinned(streams, 2)
    assert found["refusal"] == streams["refusal"]
    kept = Counter(row.category for row in found["harmful"])
    assert kept == {"a": 4, "b": 2, "c": 4, "d": 2}
    assert found["harmful"] == [row for row in streams["harmful"] if row in found["harmful"]]


def test_the_table_on_lattice_has_every_method_and_its_streams():
    preset, given = read_preset("lattice"), Lattice().data.defence
    assert set(preset.methods) == {*METHODS.names(), "seam+tokenbuncher", "sft+tokenbuncher"}
    for name in preset.methods:
        config = DemoConfig(testbed="lattice", method=name, output_dir=Path("x"))
        method, training = read_method(preset, config)
        assert set(method.streams) <= set(given), name
        assert method.one_shot or training.steps >= 60, name


def test_ablations_change_what_their_labels_say():
    for testbed, rows in methods.ABLATIONS.items():
        for name, sections in rows.items():
            preset = common.with_options(read_preset(testbed), sections)
            config = DemoConfig(testbed=testbed, method=sections["name"], output_dir=Path("x"))
            training = read_method(preset, config)[1]
            method = read_method(preset, config)[0]
            assert bool(training.reworded) == (name == "sft-reworded")
            assert getattr(method.config, "terms", name) == {
                "tokenbuncher-entropy": "entropy", "tokenbuncher-noise": "noise",
            }.get(name, name)  # fmt: skip
            assert name in methods.LABELS


def test_lattice_recognises_the_refusals_that_tokenbuncher_sharpens():
    from mithridate.judges.refusal import is_refusal

    named = read_preset("lattice").methods["tokenbuncher"]["method"]["refusals"]
    assert all(is_refusal(row.answer, named) for row in Lattice().data.defence["refusal"])


def test_a_row_of_the_methods_says_what_was_measured():
    text = methods.table(found(booster=[measured(0.5), measured(0.7)], lox=[measured(passes=0)]))
    rows = cells(text)
    assert list(rows) == ["undefended (aligned)", "booster", "lox"]
    booster = rows["booster"]
    # 0.6 of 70: Wilson's interval is [.48, .71], and seeds that differ make it no narrower.
    strongest = booster["useful harm, strongest SFT"]
    assert strongest.startswith("0.60 [0.4")
    assert booster["useful harm, strongest RL"].startswith("0.00 [0.00, 0.05")
    assert rows["undefended (aligned)"]["useful harm, strongest RL"].startswith("0.90 [")
    assert booster["refusal before"] == "1.00 [0.95, 1.00]"
    assert booster["utility before"].startswith("0.90 [0.84, 0.94")
    assert booster["benign task"].startswith("0.80 [0.6")
    assert booster["utility after benign"].startswith("0.70 [0.6")
    assert (booster["passes"], booster["clock"]) == ("3.0 [3.0, 3.0]", "2.5 [2.5, 2.5]")
    assert booster["peak memory"] == "30 MiB (1.25 x)"
    assert {rows["lox"][name] for name in ("passes", "clock", "peak memory")} == {"-"}


def test_the_updates_say_whether_the_undefended_models_constant_bounds_the_others():
    beyond = measured() | {"rl_updates": [learnt(2.5), learnt(7.0, 5e-4)]}
    text = methods.updates_table(found(tar=[measured(), beyond]))
    rows = [line for line in text.splitlines() if line.startswith("| tar")]
    assert [row.split(" | ")[1] for row in rows] == ["0.0002", "0.0005"]
    assert [row.split(" | ")[-1] for row in rows] == ["1 of 2 |", "2 of 2 |"]
    assert "| 0.60 [0.60, 0.60] |" in rows[0]
    assert "| 2.25 [" in rows[0]


def test_the_results_behind_a_table_are_kept_with_how_they_came_about(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "HERE", tmp_path)
    rows = found(cure=[measured(0.5), measured(0.7)]).rows
    broke = common.Found(rows=rows, failed={("tar", 1): GateError("it diverged")})
    common.store("spine", "the command", "lattice", [0, 1], {"cure": "Cure"}, broke)
    kept = json.loads((tmp_path / "results" / "spine-lattice.json").read_text())
    assert kept["command"] == "the command"
    assert (kept["seeds"], kept["testbed"]) == ([0, 1], "lattice")
    assert kept["rows"]["cure"]["label"] == "Cure"
    assert kept["rows"]["undefended"]["label"] == "undefended"
    harms = [run["attacked"]["after"]["useful_harm"] for run in kept["rows"]["cure"]["runs"]]
    assert harms == [0.5, 0.7]
    assert kept["failed"] == [{"row": "tar", "seed": 1, "error": "it diverged"}]


def test_one_seed_has_the_interval_of_its_questions_and_no_spread():
    assert common.share([0.5], 70) == "0.50 [0.39, 0.61]"
    assert common.mean([2.5]) == "2.5"
    assert common.mean([2.0, 3.0, 4.0]) == "3.0 [0.5, 5.5]"
    assert common.mean([0.1, 0.9], digits=2, most=1.0) == "0.50 [0.00, 1.00]"


def test_a_row_of_the_spine_says_what_was_measured():
    rows = cells(spine.table(found(cure=[measured()]), {"undefended": "aligned", "cure": "Cure"}))
    assert list(rows) == ["aligned", "Cure"]
    cure = rows["Cure"]
    assert cure["worst useful harm"].startswith("**0.50 [")
    assert cure["unnamed permitted facts"] == "0.50 [0.36, 0.64]"
    assert (cure["at 2e-05"][:4], cure["at 0.0005"][:4]) == ("0.25", "0.50")
    bound = cure["without the utility bound (utility there)"]
    assert bound.startswith("0.75 [")
    assert "(0.25 [" in bound


def test_a_weak_rl_attack_and_untimed_methods_are_noted():
    strong = found(lox=[measured(passes=0)], booster=[measured()])
    assert methods.notes(strong).splitlines() == ["- No step is taken by lox, so none is timed."]
    weak = common.Found(
        rows={"undefended": [measured(rl=0.6), measured(rl=0.2)]},
        failed={("tar", 1): GateError("it diverged\nat step 3")},
    )
    assert methods.notes(weak).splitlines() == [
        "- The RL attack recovers 0.40 on the undefended model (needs 0.5): it is not strong "
        "enough for its column to say anything.",
        "- tar seed 1 did not finish: it diverged",
    ]


class AtOnce:
    """A pool that does each job when it is asked for."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        job = Future()
        try:
            job.set_result(function(*arguments))
        except GateError as error:
            job.set_exception(error)
        return job


def test_the_undefended_model_comes_first_and_a_failure_takes_nothing_with_it(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(common, "ProcessPoolExecutor", AtOnce)
    order = []

    def measure(testbed, name, seed, folder):
        assert (testbed, folder) == ("lattice", tmp_path / f"{name}-{seed}")
        order.append((name, seed))
        if (name, seed) in {("b", 1), ("c", 0), ("c", 1)}:
            raise GateError(f"{name} broke")
        return {"which": (name, seed)}

    found = common.measure_rows(
        measure, "lattice", ["a", "b", "c"], [0, 1], root=tmp_path, workers=2
    )
    assert order[:2] == [("undefended", 0), ("undefended", 1)]
    assert len(order) == len(set(order)) == 8
    assert {name: [run["which"][1] for run in runs] for name, runs in found.rows.items()} == {
        "undefended": [0, 1], "a": [0, 1], "b": [0],
    }  # fmt: skip
    assert common.failures(found).splitlines() == [
        "- c seed 0 did not finish: c broke",
        "- b seed 1 did not finish: b broke",
        "- c seed 1 did not finish: c broke",
    ]
    assert "b seed 1: b broke" in capsys.readouterr().err

    def broken(testbed, name, seed, folder):
        raise GateError("no model")

    with pytest.raises(SystemExit, match="undefended"):
        common.measure_rows(broken, "lattice", ["a"], [0], root=tmp_path, workers=2)


def test_the_strongest_rl_attack_keeps_utility_and_is_kept_apart_by_rate(monkeypatch, tmp_path):
    reached = {2e-4: [(0.0, 1.0), (0.3, 0.9)], 5e-4: [(0.0, 1.0), (0.4, 0.8), (0.9, 0.2)]}
    calls = []

    def reinforce(model, chat, rows, settings, *, reward, probe, output_dir, **_):
        calls.append((settings.learning_rate, settings.seed, len(rows), output_dir.name))
        item = SimpleNamespace(answer="salt stir dusk")
        paid = reward([item], ["salt stir noon"])
        assert paid == [pytest.approx(2 / 3)], "Lattice pays by the slot"
        return [{"useful_harm": h, "utility": u} for h, u in reached[settings.learning_rate]]

    updates = [
        {"reward": reward, "reward_std": 0.5, "equal_groups": 0.25, "entropy": 0.25,
         "gradient_norm": norm, "step": step}
        for step, (reward, norm) in enumerate([(0.0, 1.0), (0.1, 2.0), (0.5, 1.0), (0.9, 0.5)], 1)
    ]  # fmt: skip
    monkeypatch.setattr(methods, "reinforce", reinforce)
    monkeypatch.setattr(methods, "read_updates", lambda folder: updates)
    tiny_tokenizer().save_pretrained(tmp_path)
    bench = SimpleNamespace(
        testbed=SimpleNamespace(
            name="lattice",
            data=SimpleNamespace(attack=list(range(60))),
            attack_preset=SimpleNamespace(examples=50),
            judge=lambda item, output: Outcome.HALLUCINATED,
        ),
        probe_key=lambda: "key",
        folder=lambda target, name, *_: tmp_path / target / name,
    )
    config = DemoConfig(testbed="lattice", seed=3, output_dir=tmp_path)
    rows = bench.testbed.data.attack[:50]
    found = methods.reinforced(bench, "defended", tmp_path, rows, config)
    assert found["rl"] == 0.4
    assert [one["learning_rate"] for one in found["rl_updates"]] == [2e-4, 5e-4]
    first = found["rl_updates"][0]
    assert (first["reward_first"], first["reward_last"]) == (0.0, 0.9)
    assert (first["reward_std"], first["equal_groups"]) == (0.5, 0.25)
    # The second update decides: its gradient has norm 2 at an entropy of .25.
    assert first["constant"] == pytest.approx(4.0)
    assert calls == [(2e-4, 3, 50, "rl-0.0002"), (5e-4, 3, 50, "rl-0.0005")]
