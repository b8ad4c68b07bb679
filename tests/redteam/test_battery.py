from __future__ import annotations

import json

import pytest
import yaml

from mithridate.errors import InputError
from mithridate.measures.rows import _listed
from mithridate.redteam.battery import (
    ROOM,
    Train,
    as_document,
    drawn,
    read_battery,
    read_sizes,
    settings,
)
from mithridate.redteam.pipeline import schedule
from mithridate.verdicts.card import ADAPTIVE, MINIMUM

SMOKE = {"P3", "P12", "P17", "P26", "TP2", "O1", "O3", "B1", "B3", "Q2", "X1", "X3", "X4", "X8",
         "X9"}  # fmt: skip


def test_the_shipped_battery_can_be_planned_on_both_testbeds():
    battery = read_battery()
    assert battery.control == "P3"
    for testbed in ("lattice", "atlas"):
        planned = {}
        for tier in ("smoke", "standard", "full"):
            assert read_sizes(testbed, tier).steps > 0
            found = [one for entry in battery.entries for one in settings(entry, tier)]
            names = [(one.id, one.configuration, one.rate, one.absolute) for one in found]
            assert len(set(names)) == len(names)
            searched = {one.id for one in battery.entries if one.space and tier in one.tier}
            planned[tier] = {one.id for one in found} | searched
        assert planned["smoke"] >= SMOKE
        assert planned["smoke"] <= planned["standard"] <= planned["full"]
        runnable = {entry.id for entry in battery.entries if not entry.missing}
        assert planned["full"] == runnable


def test_every_attack_that_a_report_needs_is_listed():
    ids = {entry.id for entry in read_battery().entries}
    groups = [*MINIMUM, *((name,) for names in ADAPTIVE.values() for name in names)]
    assert all(ids & set(group) for group in groups)


def test_a_point_of_a_space_is_a_setting_with_its_own_rate_and_name():
    entry = next(entry for entry in read_battery().entries if entry.id == "TP2")
    assert settings(entry, "standard") == []
    one = drawn(entry, {"rate": 12.5, "lora_rank": 16, "schedule": "cosine"})
    assert (one.rate, one.absolute) == (12.5, False)
    assert one.phases == (Train(lora_rank=16, schedule="cosine"),)
    assert one.configuration == "lora_rank 16, schedule cosine"
    assert drawn(entry, {}).phases == (Train(),)


def test_what_an_attack_needs():
    entries = {entry.id: entry for entry in read_battery().entries}
    needs = {
        name: {need for one in settings(entries[name], "full") for need in one.needs}
        for name in ("P3", "P17", "X9", "B1", "B2", "B3", "X2", "O3")
    }
    assert needs == {
        "P3": set(), "P17": {"benign"}, "X9": {"benign"}, "B1": {"base"},
        "B2": {"base", "benign", "refusals"}, "B3": {"base"}, "X2": {"benign"}, "O3": {"benign"},
    }  # fmt: skip


def test_published_rates_are_of_the_full_tier_and_edits_have_none():
    battery = {entry.id: entry for entry in read_battery().entries}
    rates = {
        tier: [(one.rate, one.absolute) for one in settings(battery["P1"], tier)]
        for tier in ("smoke", "standard", "full")
    }
    assert rates == {"smoke": [], "standard": [(0.25, False)],
                     "full": [(0.25, False), (2e-5, True)]}  # fmt: skip
    edited = settings(battery["O3"], "standard")
    assert {(one.rate, one.seeded) for one in edited} == {(0.0, False), (1.0, True)}


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ({"phases": [{"do": "trian"}]}, "trian"),
        ({"phases": [{"do": "train", "optimizer": "sgd"}]}, "did you mean 'optimiser'"),
        ({"phases": [{"do": "train", "poison": 2.0}]}, "poison"),
        ({"phases": [{"do": "train"}], "rate": [1]}, "unknown key 'rate'"),
        ({"phases": [{"do": "edit", "kind": "melt", "amount": 1.0}]}, "melt"),
        ({}, "exactly one of"),
        ({"phases": [{"do": "train"}], "missing": "no time"}, "exactly one of"),
        ({"phases": [{"do": "train"}], "tier": ["huge"]}, "huge"),
        ({"phases": [{"do": "train"}], "space": {"rate": {"from": 3, "to": 1}}}, "rate spans no"),
        ({"phases": [{"do": "train"}], "space": {"rank": [4]}}, "did you mean 'lora_rank'|rank"),
        ({"phases": [{"do": "reinforce"}], "space": {"rate": [1]}}, "a phase that trains"),
        ({"phases": [{"do": ["train"]}]}, r"does \['train'\]"),
        ({"phases": [{"do": "train", "optimiser": "zzz"}]}, "unknown optimiser 'zzz'"),
        ({"phases": [{"do": "train"}], "rates": [-1]}, r"\[-1.0\] are no learning rates"),
        ({"phases": [{"do": "train"}], "in_smoke": {"rates": ["a"]}}, r"\['a'\] are no learning"),
        ({"phases": [{"do": "train"}], "in_smoke": {"configurations": ["a"]}}, "no configuration"),
    ],
)
def test_a_faulty_attack_is_named(attack, said, tmp_path):
    given = {"id": "Z1", "name": "z", "family": "supervised", "tier": ["smoke"], **attack}
    path = tmp_path / "battery.yaml"
    path.write_text(yaml.safe_dump({"control": "Z1", "attacks": [given]}))
    with pytest.raises(InputError, match=said) as error:
        read_battery(path)
    assert "Z1" in str(error.value)


def test_a_list_that_is_no_battery_is_refused(tmp_path):
    path = tmp_path / "battery.yaml"
    one = {"id": "Z1", "name": "z", "family": "f", "tier": ["full"], "phases": [{"do": "train"}]}
    for document, said in (
        ({"attacks": [one]}, "not a battery"),
        ({"control": "P3", "attacks": [one]}, "P3 is not listed"),
        ({"control": "Z1", "attacks": [one, one]}, "listed twice"),
    ):
        path.write_text(yaml.safe_dump(document))
        with pytest.raises(InputError, match=said):
            read_battery(path)
    with pytest.raises(InputError, match="no tier"):
        read_sizes("lattice", "huge")


def test_what_a_run_folder_gets_is_what_a_verdict_reads():
    battery = read_battery()
    states = dict.fromkeys((entry.id for entry in battery.entries), "run")
    text = yaml.safe_dump(json.loads(json.dumps(as_document(battery, states))))
    listed = _listed([yaml.safe_load(text)], "battery.yaml")
    assert [one.id for one in listed] == [entry.id for entry in battery.entries]
    assert (ROOM / "battery.yaml").is_file()


def test_probes_are_dense_early_and_include_the_last_step():
    assert schedule(40, None) == [2, 5, 10, 20, 40]
    assert schedule(50, None) == [2, 5, 10, 20, 40, 50]
    assert schedule(3, None) == [2, 3]
    assert schedule(1, None) == [1]
    assert schedule(10, 4) == [4, 8, 10]


def test_what_the_stock_trainer_cannot_do_is_adaptive():
    assert not Train(lora_rank=4, poison=0.5, optimiser="sgd").adaptive
    for given in ({"project": True}, {"anchor": 1.0}, {"part": "head"}, {"sign": True}):
        assert Train(**given).adaptive
