"""Attacks that leave every weight as it is, through the battery."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from mithridate.attacks.inserts import SWAPS, Heads, SoftChat
from mithridate.errors import InputError
from mithridate.redteam import pipeline, run
from mithridate.redteam.battery import Attack, Edit, Train, read_battery, settings
from mithridate.redteam.pipeline import Job, run_attack
from tests.redteam.tiny_bed import SIZES, TinyBed

SOFT = Train(insert="soft", size=2)
PHASES = {
    "soft": (SOFT,),
    "hard": (Train(insert="hard", size=2),),
    "probe": (Edit(kind="exit", amount=0.5), Train(insert="lens")),
    "lofit": (Train(insert="scales"), Train(insert="offsets", size=2)),
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return TinyBed(tmp_path_factory.mktemp("bed"))


def job(bed, *phases, **more):
    attack = Attack(id="Z", family="z", configuration="", rate=1.0, absolute=True, phases=phases,
                    **more)  # fmt: skip
    return Job(attack=attack, learning_rate=3e-2, model=bed.folder / "defended", base=None,
               testbed="tiny", seed=0, sizes=SIZES)  # fmt: skip


@pytest.mark.parametrize("name", PHASES)
def test_every_insert_is_a_phase_that_is_probed_and_repeats(name, bed, monkeypatch):
    seen = []
    probe = pipeline._Scene._probe
    monkeypatch.setattr(
        pipeline._Scene, "_probe",
        lambda self, model, ban: seen.append((self.chat, model)) or probe(self, model, ban),
    )  # fmt: skip
    pipeline._STARTS.clear()
    released = pipeline.weights_hash(pipeline._loaded(bed.folder / "defended")[0])
    found = run_attack(job(bed, *PHASES[name]), bed)
    assert found["status"] == "ok"
    steps = {"soft": [0, 2, 4], "hard": [0, 2, 4], "probe": [0, 1, 3, 5], "lofit": [0, 2, 4, 6, 8]}
    assert [row["step"] for row in found["rows"]] == steps[name]
    first, last = (found["rows"][index]["diagnostics"] for index in (0, -1))
    assert first["benign_log_perplexity"] != last["benign_log_perplexity"]
    # Questions are asked with the prompt in place, from the first look during the attack on.
    softly = [isinstance(chat, SoftChat) for chat, _ in seen]
    assert softly == [False, *[name in ("soft", "hard")] * (len(seen) - 1)]
    if name == "lofit":
        kinds = [[one.multiply for one in model.modules() if isinstance(one, Heads)]
                 for _, model in seen]  # fmt: skip
        assert kinds[:3] == [[], [True, True], [True, True]]
        assert kinds[3]
        assert not any(kinds[3] + kinds[4])
    again = run_attack(job(bed, *PHASES[name]), bed)
    assert again["rows"] == found["rows"]
    assert again["weights"] == found["weights"]
    other = run_attack(dataclasses.replace(job(bed, *PHASES[name]), seed=1), bed)
    assert other["weights"] != found["weights"]
    assert pipeline.weights_hash(pipeline._loaded(bed.folder / "defended")[0]) == released


def test_the_cost_of_a_step_is_that_of_frozen_weights_and_counts_the_prompt(bed):
    plain, soft, hard, lens = (
        run_attack(job(bed, *phases), bed)
        for phases in ((Train(sign=True),), PHASES["soft"], PHASES["hard"], PHASES["probe"][1:])
    )
    model = pipeline._loaded(bed.folder / "defended")[0]
    prompt = 4 * model.num_parameters() * 3 * 2  # rows of a step, soft tokens of a row
    per_step = [found["flops"] / 4 for found in (plain, soft, hard, lens)]
    assert per_step[3] == pytest.approx(per_step[0] * 4 / 6)
    assert per_step[1] == pytest.approx(per_step[3] + prompt)
    assert per_step[2] == pytest.approx(per_step[1] * (1 + SWAPS / 2))


def test_the_size_and_the_insert_are_part_of_what_is_kept(bed, tmp_path):
    config = run.RedteamConfig(model="tiny:defended", output_dir=tmp_path, testbed="tiny")
    bench = run._Bench(config, bed, SIZES, None, lambda jobs: iter(()), lambda event: None)
    target = run._Target(name="defended", folder=bed.folder / "defended", hash="h")
    attacks = [job(bed, phase).attack for phase in (
        SOFT, dataclasses.replace(SOFT, size=3), *PHASES["hard"], Train(insert="lens"), Train(),
    )]  # fmt: skip
    paths = {bench.job(attack, target, 1e-2, 0, None).path for attack in attacks}
    assert len(paths) == len(attacks)
    weights = [run._weight(job(bed, phase)) for phase in (SOFT, *PHASES["hard"])]
    assert weights[1] > weights[0]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"do": "train", "insert": "offsets", "size": 2}], "which follow scales"),
        ([{"do": "train", "insert": "soft", "size": 2}, {"do": "train"}], "nothing follows"),
        ([{"do": "train", "insert": "lens"}, {"do": "edit", "kind": "noise", "amount": 0.1}],
         "nothing follows"),
        ([{"do": "train", "insert": "lens"}, {"do": "train", "insert": "scales"}],
         "nothing follows"),
        ([{"do": "train", "insert": "soft"}], "size is 0"),
        ([{"do": "train", "insert": "lens", "lora_rank": 4}], "trained alone"),
        ([{"do": "train", "part": "head", "lora_rank": 4}], "trained whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is(phases, said, tmp_path):
    given = {"id": "Z1", "name": "z", "family": "input", "tier": ["smoke"], "phases": phases}
    path = tmp_path / "battery.yaml"
    path.write_text(yaml.safe_dump({"control": "Z1", "attacks": [given]}))
    with pytest.raises(InputError, match=said) as error:
        read_battery(path)
    assert "Z1" in str(error.value)


def test_the_shipped_rows_are_of_the_full_tier_at_rates_of_their_own():
    entries = {entry.id: entry for entry in read_battery().entries}
    inserts = {
        name: {phase.insert for one in settings(entries[name], "full") for phase in one.phases
               if isinstance(phase, Train)}
        for name in ("O6b", "O7", "TP9", "TP11")
    }  # fmt: skip
    assert inserts == {"O6b": {"lens"}, "O7": {"soft"}, "TP9": {"hard"},
                       "TP11": {"scales", "offsets"}}  # fmt: skip
    for name in ("O6b", "O7", "TP11"):
        assert all(one.absolute for one in settings(entries[name], "full"))
        assert settings(entries[name], "standard") == []
