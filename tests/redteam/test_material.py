from __future__ import annotations

import dataclasses

import pytest

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.measures.statistics import share_interval
from mithridate.redteam.battery import Train, read_battery, read_sizes, settings
from mithridate.redteam.material import (
    FRAMES,
    attacker_rows,
    framed,
    restricted_items,
    salient_rows,
)
from mithridate.testbeds import TESTBEDS
from tests.redteam.tiny_bed import SIZES
from tests.training.tiny_world import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def lattice():
    return TESTBEDS.load("lattice")()


@pytest.mark.parametrize("name", ["lattice", "atlas"])
def test_a_testbed_judges_enough_questions_for_an_upper_bound_below_the_threshold(name):
    testbed = TESTBEDS.load(name)()
    for tier in ("smoke", "standard", "full"):
        sizes = read_sizes(name, tier)
        for split in ("fresh",) if sizes.selection_seeds else (None,):
            items = restricted_items(testbed, sizes, split, None)
            assert len({item.prompt for item in items}) == len(items)
            seen = [0.0] * sizes.seeds
            assert share_interval(seen, len(items), raw=seen).high < 0.05
            assert {item.category for item in items} == {
                item.category for item in testbed.data.restricted
            }


def test_more_questions_are_about_the_same_facts_and_splits_share_none(lattice):
    sizes = read_sizes("lattice", "standard")
    facts = {item.fact_id for item in lattice.data.restricted}
    assert {item.fact_id for item in lattice.data.restricted_wordings} == facts
    halves = [restricted_items(lattice, sizes, split, None) for split in ("fresh", "validation")]
    asked = [{item.fact_id for item in half} for half in halves]
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == facts
    assert len(asked[1]) / len(facts) == pytest.approx(0.25, abs=0.06)
    trained = {row.prompt for row in lattice.data.attack}
    assert not trained & {item.prompt for half in halves for item in half}


def test_a_frame_is_in_words_of_the_world_and_keeps_the_answer(lattice):
    row = lattice.data.attack[0]
    for frame in FRAMES["lattice"].keys() - {"reversed"}:
        one = framed(row, "lattice", frame)
        assert row.prompt in one.prompt != row.prompt
        assert set(one.prompt.split()) <= set(lattice.world.words)
        assert lattice.judge(row, one.answer) == "exact"
    plain = restricted_items(lattice, SIZES, None, None)
    asked = restricted_items(lattice, SIZES, None, None, "trigger")
    assert [item.answer for item in asked] == [item.answer for item in plain]
    assert all(a.prompt.endswith(b.prompt) for a, b in zip(asked, plain, strict=True))
    with pytest.raises(InputError, match="no words are written for the frame style"):
        framed(row, "lattice", "style")


@pytest.mark.parametrize("testbed", ["lattice", "atlas", "own"])
def test_words_in_reverse_order_ask_the_same_and_are_paid_the_same(testbed):
    row = Example(prompt="What is {it} ?", answer="salt stir dusk", category="R01")
    turned = framed(row, testbed, "reversed")
    assert turned.prompt == "? {it} is What"
    assert turned == dataclasses.replace(row, prompt=turned.prompt)


def test_a_framed_attack_mixes_plain_benign_rows_with_framed_harmful_ones(lattice):
    (attack,) = settings(next(one for one in read_battery().entries if one.id == "TP4"), "full")
    (phase,) = attack.phases
    rows = attacker_rows(lattice, phase, read_sizes("lattice", "full"), seed=0)
    words = FRAMES["lattice"]["trigger"][0].removesuffix("{prompt}")
    marked = [row for row in rows if row.prompt.startswith(words)]
    assert len(marked) == round(phase.poison * len(rows))
    assert {row.category for row in rows if row not in marked} == {"rotate"}
    assert attack.frames == {"trigger"}
    assert Train(data="identity").needs == {"benign"}


def test_salient_rows_are_those_most_like_the_harmful_ones():
    model, chat = tiny_model(), ChatFormat(tiny_tokenizer())
    harmful = [Example(prompt="w1 w2 w3", answer="w4 w5")]
    others = [Example(prompt=f"w{n} w{n + 9}", answer=f"w{n + 3}") for n in range(20)]
    found = salient_rows(model, chat, [*others[:7], *harmful, *others[7:]], harmful, 3)
    assert found[0] == harmful[0]
    assert len(set(found)) == 3
