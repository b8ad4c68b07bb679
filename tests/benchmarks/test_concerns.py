"""The structural concerns: their data are what they say, and their page says what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import common
import concerns
import concerns_report
from mithridate.attacks.finetune import own_copy
from mithridate.chat import ChatFormat
from mithridate.demo import DemoConfig, read_method, read_preset
from mithridate.measures.line_scan import SCALES
from mithridate.testbeds.lattice import ATTACK_TEMPLATES, DEFENCE_TEMPLATES, Lattice
from tests.tiny import tiny_examples, tiny_llama, tiny_tokenizer

VARIANTS = concerns.read_variants("lattice")


@pytest.fixture(scope="module")
def bed():
    return Lattice()


@pytest.mark.filterwarnings("ignore:CTRAP as released")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_defence_can_be_built(name):
    sections = VARIANTS[name]
    assert set(sections["role"]) <= {"data", "scan", "grid", "base"}
    assert "scan" in sections["role"]
    assert sections.get("line", "gradient") in ("gradient", "sign")
    preset = read_preset("lattice")
    preset.methods.setdefault(sections["name"], {})
    config = DemoConfig(testbed="lattice", method=sections["name"], output_dir=Path("x"))
    method, training = read_method(common.with_options(preset, sections), config)
    assert method.name == sections["name"]
    assert training.steps >= 200
    radius = getattr(method.config, "lookahead_radius", None)
    if isinstance(radius, float):
        assert radius == sections["virtual_step"]
    elif radius is not None:
        middle = math.sqrt(radius["low"] * radius["high"])
        assert sections["virtual_step"] == pytest.approx(middle, rel=0.01)


def test_a_bipartition_is_two_halves_and_another_seed_gives_others(bed):
    arts = sorted({row.category for row in bed.data.restricted})
    halves = [concerns.bipartition(arts, seed) for seed in range(5)]
    for seen, unseen in halves:
        assert len(seen) == len(unseen) == 7
        assert sorted([*seen, *unseen]) == arts
    assert len({tuple(seen) for seen, _ in halves}) == 5
    assert halves[0] == concerns.bipartition(arts[::-1], 0)


def test_the_ladder_moves_away_from_the_defences_rows_and_shares_no_fact_with_them(bed):
    arts = sorted({row.category for row in bed.data.restricted})
    seen, unseen = concerns.bipartition(arts, 0)
    rungs = concerns.ladder(bed, seen, unseen)
    held = {row.fact_id for row in bed.data.defence["harmful"]}
    judged = {row.fact_id for row in bed.data.restricted}
    for rung, (chosen, rows) in rungs.items():
        assert (
            {row.category for row in rows}
            == set(chosen)
            == set(unseen if rung.startswith("unseen") else seen)
        )
        assert not {row.fact_id for row in rows} & (held | judged)
        assert len({row.fact_id for row in rows}) == 28
        templates = {row.template for row in rows}
        if rung.endswith("wording"):
            assert templates <= set(DEFENCE_TEMPLATES)
        elif "cipher" in rung:
            assert templates == {"cipher"}
        else:
            assert templates <= set(ATTACK_TEMPLATES)
    d_h = [row for row in bed.data.defence["harmful"] if row.category in seen]
    shift = {rung: concerns._shift(d_h, rows)["mmd2"] for rung, (_, rows) in rungs.items()}
    assert shift["seen, D_H's wording"] < shift["seen"] < shift["unseen"]
    assert shift["seen, D_H's wording"] < shift["unseen, D_H's wording"] < shift["unseen"]


def bare_scene(tmp_path):
    """A scene without a world: what it keeps, and how it attacks."""
    scene = concerns.Scene.__new__(concerns.Scene)
    scene.root, scene.cells, scene.batch_size = tmp_path, [], 4
    scene.chat = ChatFormat(tiny_tokenizer())
    scene.__dict__["_world"] = "world"
    return scene


def test_a_cell_is_made_once_and_what_is_no_number_is_kept_as_none(tmp_path):
    scene, made = bare_scene(tmp_path), []

    def make():
        made.append(1)
        return {"value": math.inf, "rows": [{"x": math.nan, "y": 1.5}]}

    keys = {"model": "m", "weights": "w1"}
    first = scene.cell("scan", keys, make)
    again = bare_scene(tmp_path).cell("scan", keys, make)
    assert len(made) == 1
    assert first == again
    assert (first["kind"], first["model"], first["value"]) == ("scan", "m", None)
    assert first["rows"] == [{"x": None, "y": 1.5}]
    scene.cell("scan", keys | {"weights": "w2"}, make)
    assert len(made) == 2, "another model is another cell"


@pytest.mark.parametrize("optimiser", list(concerns.GRID))
def test_an_attack_of_every_optimiser_moves_the_weights_and_is_seen_at_its_points(
    optimiser, tmp_path
):
    scene, model = bare_scene(tmp_path), own_copy(tiny_llama(dtype=torch.float32))
    rows = tiny_examples(6)["harmful"]
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    moved = []

    def look(attacked):
        if hasattr(attacked, "merge_and_unload"):
            moved.append(sum(float(w.detach().abs().sum()) for n, w in
                             attacked.named_parameters() if "lora_B" in n))  # fmt: skip
        else:
            moved.append(sum(float((w.detach() - start[n]).abs().sum()) for n, w in
                             attacked.named_parameters()))  # fmt: skip
        return {"moved": moved[-1]}

    how = concerns.Attack(optimiser=optimiser, rate=1e-3, steps=4, points=(1, 4))
    seen = scene.attack(model, rows, how, 0, look)
    assert [row["step"] for row in seen] == [1, 4]
    assert 0 < moved[0] < moved[1]
    assert all(bool((w == start[n]).all()) for n, w in model.named_parameters())


def test_subtraction_of_the_whole_difference_is_the_base(tmp_path, monkeypatch):
    """theta - 1 (theta - base) = base, and kappa adds exactly what the base learnt."""
    scene = bare_scene(tmp_path)
    made = {"base": tiny_llama(seed=0), "imm": tiny_llama(seed=1)}
    scene.restricted, scene.attack_rows = [1, 2], []
    monkeypatch.setattr(scene, "load", lambda name, seed: own_copy(made[name]), raising=False)
    taught = tiny_llama(seed=2)
    monkeypatch.setattr(
        scene, "attack", lambda start, rows, how, seed, look: look(taught), raising=False
    )

    def far(model, *others):
        """The L1 distance from the signed sum of others: first, plus second, minus third."""
        total = 0.0
        for own, *theirs in zip(model.parameters(), *(o.parameters() for o in others), strict=True):
            signs = (1, 1, -1)[: len(theirs)]
            goal = sum(sign * other.detach() for sign, other in zip(signs, theirs, strict=True))
            total += float((own.detach() - goal).abs().sum())
        return total

    def judged(model):
        moved = far(model, made["imm"], taught, made["base"])
        return {"useful_harm": far(model, made["base"]), "utility": moved, "by_category": {}}

    monkeypatch.setattr(scene, "judged", judged, raising=False)
    rows = {(r["edit"], r["amount"]): r for r in concerns._subtracted(scene, "imm", 0)["rows"]}
    assert rows["subtract", 1.0]["useful_harm"] == pytest.approx(0.0, abs=1e-9)
    half = rows["subtract", 0.5]["useful_harm"]
    assert half == pytest.approx(far(made["imm"], made["base"]) / 2, rel=1e-6)
    assert rows["transplant", 1.0]["utility"] == pytest.approx(0.0, abs=1e-9)
    assert set(rows) == {("subtract", a) for a in concerns.SUBTRACTED} | {
        ("transplant", a) for a in concerns.TRANSPLANTED
    }


# What the page says ------------------------------------------------------------------------------


VARIED = {"trap": {"label": "Trap", "role": ["data", "base"]},
          "dead": {"label": "Dead", "role": ["data"]}}  # fmt: skip


def page(monkeypatch, tmp_path, cells, capsys):
    monkeypatch.setattr(common, "HERE", tmp_path / "benchmarks")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(common, "provenance", lambda command: {
        "command": command, "date": "d", "commit": "c", "machine": "m"})  # fmt: skip
    cells = [cell | {"cpu_seconds": 6.0} for cell in cells]
    concerns_report.write("lattice", cells, VARIED, "x.py --all")
    text = (tmp_path / "docs" / "results-concerns-lattice.md").read_text()
    assert capsys.readouterr().out == text
    found = json.loads((tmp_path / "benchmarks/results/concerns-lattice.json").read_text())
    for record in found["records"]:
        assert set(record) == {"claim", "kind", "setting", "model", "n_seeds", "estimate", "ci95",
                               "unit"}  # fmt: skip
        if record["ci95"] is not None:
            low, high = record["ci95"]
            assert low - 1e-9 <= record["estimate"] <= high + 1e-9, record
    return text, found


def of(found, claim, model, part):
    chosen = [r for r in found["records"]
              if (r["claim"], r["model"]) == (claim, model) and part in r["setting"]]  # fmt: skip
    assert len(chosen) == 1, (claim, model, part, len(chosen))
    return chosen[0]


def point(step, harm, utility=1.0, **more):
    return {"step": step, "useful_harm": harm, "utility": utility, **more}


RUNGS = {"seen, D_H's wording": 0.1, "seen": 0.2, "unseen, D_H's wording": 0.3, "unseen": 0.4,
         "unseen, in cipher": 0.5}  # fmt: skip


def data_cells():
    """A trap whose useful harm is exactly MMD² on the half that it saw nothing of."""
    cells = []
    for b in range(3):
        for rung, shift in RUNGS.items():
            cells.append({"kind": "shift", "bipartition": b, "rung": rung, "mmd2": shift})
            reach = {"undefended": (1.0, 1.0), "dead": (0.0, 0.1), "trap": (shift - 0.1, 1.0)}
            for model, (harm, utility) in reach.items():
                for scope in ("half", "all"):
                    if scope == "all" and (model == "undefended" or rung not in ("seen", "unseen")):
                        continue
                    got = 0.0 if scope == "all" else harm
                    # The better checkpoint lost its utility, so it does not count.
                    rows = [point(0, 0.0, utility), point(9, got, utility), point(20, 1.0, 0.0)]
                    cells.append({"kind": "data", "model": model, "scope": scope,
                                  "bipartition": b, "rung": rung, "n_restricted": 35,
                                  "rows": rows})  # fmt: skip
    return cells


def test_the_gap_between_seen_and_unseen_and_the_slope_over_the_ladder(
    monkeypatch, tmp_path, capsys
):
    left = [{"kind": "unnamed", "model": m, "bipartition": 0, "accuracy": a, "n": 42}
            for m, a in (("undefended", 1.0), ("trap", 0.1))]  # fmt: skip
    text, found = page(monkeypatch, tmp_path, [*data_cells(), *left], capsys)
    assert "0.10 are left before any attack" in text
    assert text.count("are left before any attack") == 1
    gap = of(found, "A12", "trap", "unseen minus seen")
    assert gap["estimate"] == pytest.approx(0.2)
    assert gap["n_seeds"] == 3
    assert gap["ci95"][0] < 0.2 < gap["ci95"][1]
    assert of(found, "A12", "trap", "given all 14")["estimate"] == pytest.approx(0.3)
    assert of(found, "A12", "undefended", ": unseen categories")["estimate"] == 1.0
    assert of(found, "A13", "trap", "slope")["estimate"] == pytest.approx(1.0)
    assert of(found, "A13", "undefended", "slope")["estimate"] == pytest.approx(0.0, abs=1e-9)
    assert "**Dead**: dead on arrival" in text
    assert "**Trap**: the concern is real" in text
    assert "steepest is Trap" in text
    assert found["bipartitions"] == [0, 1, 2]
    assert "- the way around: Trap\n" in text
    assert "held-out categories:" not in text


def scan_cells(model, heights, *, line="gradient", planted=True, length=0.1):
    rows = [
        point(0, 0.0, scale=scale, log_perplexity=height, token_collapse=14.0 - (height or 0.0))
        for scale, height in zip(SCALES, heights, strict=True)
    ]
    return {"kind": "scan", "model": model, "line": line, "seed": 0, "planted": planted,
            "virtual_step": length, "rows": rows}  # fmt: skip


def test_a_trap_that_is_planted_beyond_its_step_is_told_from_one_at_it(
    monkeypatch, tmp_path, capsys
):
    flat, late = [0.0] * 9, [0.0] * 7 + [2.0, 3.0]
    at_once = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, None, 5.0]
    cells = [scan_cells("undefended", flat), scan_cells("trap", at_once), scan_cells("dead", late)]
    text, found = page(monkeypatch, tmp_path, cells, capsys)
    assert "**Trap**: ruined from s = 0.5 on; the undefended model is not within the scan." in text
    assert "**Dead**: nothing happens at its virtual step (s = 1); ruin begins at s = 8." in text
    assert of(found, "A14", "trap", "at one virtual step")["estimate"] == pytest.approx(2.0)
    assert of(found, "A14", "trap", "of 8")["estimate"] == 6
    assert of(found, "A14", "undefended", "of 8")["estimate"] == 0


def grid_cell(model, optimiser, rate, rows):
    whole = {"refusal": 0.0, "p_e": 1e-5, "along": 0.0, "off": 0.0, "cosine": 0.1}
    return {"kind": "grid", "model": model, "optimiser": optimiser, "rate": rate, "seed": 0,
            "n_restricted": 70, "virtual_step": 0.1, "rows": [whole | r for r in rows]}  # fmt: skip


def test_step_sizes_count_where_they_break_the_undefended_model(monkeypatch, tmp_path, capsys):
    cells = [scan_cells("ctrap", [0.0] * 6 + [1.0, 2.0, 3.0])]
    for model, harm in (("undefended", {1e-7: 0.0, 1e-4: 1.0, 1e-2: 0.9}),
                        ("ctrap", {1e-7: 0.0, 1e-4: 0.8, 1e-2: 0.1})):  # fmt: skip
        for rate, reached in harm.items():
            # Collapsed at the first probe, whole again at the second.
            low = 0.0 if rate == 1e-4 else 1.0
            way = [point(1, 0.0, low, along=0.2, off=0.1), point(40, reached, along=0.5, off=3.0)]
            cells.append(grid_cell(model, "adamw", rate, [point(0, 0.0), *way]))
    text, found = page(monkeypatch, tmp_path, cells, capsys)
    spread = of(found, "A14", "ctrap", "largest minus smallest")
    assert spread["estimate"] == pytest.approx(0.7), "1e-7 breaks nothing and does not count"
    assert spread["ci95"][0] > 0
    assert of(found, "A14", "ctrap", "worst useful harm over 2")["estimate"] == pytest.approx(0.8)
    assert of(found, "A14", "ctrap", "off the planted axis")["estimate"] == 1.0
    assert of(found, "A14", "ctrap", "had collapsed at an earlier")["estimate"] == 0.5
    assert "of 2 attacks that broke it, 2 went farther off" in text
    assert "1 of them had collapsed at an earlier probe and came out" in text
    assert "2 stayed short of the basin" in text
    assert "worst at adamw 0.0001 (0.80)" in text


def test_a_coupling_that_turns_before_harm_rises_is_counted(monkeypatch, tmp_path, capsys):
    cells = [grid_cell("undefended", "sgd", r, [point(0, 0.0), point(5, 1.0)]) for r in (0.1, 1.0)]
    early = [point(0, 0.0, cosine=-0.8), point(1, 0.0, cosine=-0.3), point(5, 0.0, cosine=0.1),
             point(20, 0.9, cosine=0.2)]  # fmt: skip
    never = [point(0, 0.0, cosine=-0.8), point(1, 0.9, cosine=-0.7), point(5, 0.9, cosine=-0.6)]
    cells += [grid_cell("seam", "sgd", 0.1, early), grid_cell("seam", "sgd", 1.0, never)]
    text, found = page(monkeypatch, tmp_path, cells, capsys)
    assert of(found, "A15", "seam", "2 attacks raising useful harm")["estimate"] == 0.5
    assert of(found, "A15", "seam", "before the attack")["estimate"] == pytest.approx(-0.8)
    assert of(found, "A15", "seam", "mean cosine")["estimate"] == pytest.approx(-0.325)
    row = next(line for line in text.splitlines() if "sgd 0.1 " in line and "→" in line)
    assert [cell.strip() for cell in row.split("|")[-4:-1]] == ["1", "5", "20"]


def test_the_way_around_caps_what_a_defence_can_cost(monkeypatch, tmp_path, capsys):
    def broken(model, rate, rows):
        return {"kind": "break", "model": model, "rate": rate, "seed": 0, "n_restricted": 70,
                "flops_per_step": 10.0, "rows": rows}  # fmt: skip

    cells = [
        broken("base", 1e-4, [point(0, 1.0)]),
        broken("undefended", 1e-4, [point(0, 0.0), point(8, 0.2), point(20, 1.0)]),
        broken("undefended", 1e-3, [point(0, 0.0), point(4, 0.6), point(20, 0.9)]),
        broken("trap", 1e-4, [point(0, 0.0), point(100, 0.04)]),
        {"kind": "realign", "model": "base", "seed": 0, "flops_per_step": 10.0,
         "rows": [point(0, 1.0, 0.5), point(5, 1.0, 0.9), point(10, 0.1, 0.99)],
         "attacked": [point(0, 0.1), point(2, 0.6)]},
        {"kind": "alignment", "seed": 0, "flops": 400.0},
        {"kind": "subtract", "model": "trap", "seed": 0, "n_restricted": 70,
         "utility_before": 1.0, "rows": [
             {"edit": "subtract", "amount": 0.5, "useful_harm": 0.9, "utility": 0.7},
             {"edit": "subtract", "amount": 1.0, "useful_harm": 0.9, "utility": 0.9},
             {"edit": "subtract", "amount": 1.5, "useful_harm": 1.0, "utility": 0.1}]},
    ]  # fmt: skip
    text, found = page(monkeypatch, tmp_path, cells, capsys)
    assert of(found, "A17", "base", "steps to useful harm 0.50")["estimate"] == 0
    assert of(found, "A17", "undefended", "steps to useful harm")["estimate"] == 4
    held = of(found, "A17", "trap", "held in 1 of 1: at least")
    assert (held["estimate"], held["ci95"]) == (100, None)
    # The detour: 10 steps of permitted rows, 2 of harmful ones, against 4 of the aligned model.
    assert of(found, "A17", "base", "cost of the detour")["estimate"] == pytest.approx(3.0)
    assert of(found, "A17", "trap", "has to be subtracted")["estimate"] == 1.0
    assert "Smallest λ tried that gives useful harm 0.50 with utility kept: Trap 1." in text
    assert "by more than 3." in text
    assert "bypassed: Trap." in text
    assert "the cap would be 13 times" in text, "10 + 2 of the detour, 40 of the alignment, of 4"
    assert "> 100" in text


def test_overlap_says_what_planting_cost(monkeypatch, tmp_path, capsys):
    cells = [
        {"kind": "overlap", "model": "seam", "overlap": w, "seed": 0, "n_permitted": 152,
         "before": {"utility": 1.0, "cosine": 0.1}, "after": {"utility": u, "cosine": c}}
        for w, u, c in ((0.0, 0.9, -0.8), (1.0, 0.5, -0.2))
    ]  # fmt: skip
    text, found = page(monkeypatch, tmp_path, cells, capsys)
    assert of(found, "A16", "seam", "share 1 of their words (omega): utility")[
        "estimate"
    ] == pytest.approx(-0.5)
    assert "cosine reached goes from -0.80 to -0.20" in text
    assert found["cpu_seconds"] == 12.0
