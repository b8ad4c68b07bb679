"""The formulas against numbers worked out by hand, and the constants' draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mithridate.economics.attacker import (
    AVAILABILITIES,
    AttackCosts,
    asymmetry,
    multiplier,
)
from mithridate.economics.constants import Constant, Constants, read_constants
from mithridate.economics.developer import (
    alignment_cost,
    alignment_flops,
    break_even,
    dollars,
    per_query_costs,
    seconds,
    tokenbuncher_flops,
    training_flops,
)
from mithridate.errors import InputError

N = 6.74e9
NOTHING = np.zeros(1)


@pytest.fixture(scope="module")
def constants() -> Constants:
    return read_constants()


def test_the_worked_example_of_a_seven_billion_model(constants: Constants) -> None:
    values = constants.changed(lifetime__re_immunisations_per_year=0).defaults()
    plain = alignment_flops(N, values)
    assert plain == pytest.approx(8.3e16, rel=0.05)
    assert seconds(plain, values) == pytest.approx(3.5 * 60, rel=0.05)
    assert dollars(plain, values) == pytest.approx(0.15, rel=0.05)
    ctrap = alignment_cost("ctrap", N, values, source="measured", ratio=np.array([2.8]))
    seam = alignment_cost("seam", N, values, source="modelled", ratio=np.array([6.0]))
    assert ctrap.compute == pytest.approx(0.41, rel=0.05)
    assert seam.compute / seam.gpus == pytest.approx(0.87, rel=0.05)
    assert seam.compute == pytest.approx(3.5, rel=0.05)
    watching = per_query_costs(N, values)
    assert watching["monitor_listed"] == pytest.approx(2.0e-5, rel=0.05)
    assert watching["monitor"] == pytest.approx(2.8e-5, rel=0.05)
    base = dollars(plain, values)

    def queries(extra: np.ndarray) -> float:
        found = break_even(extra, NOTHING, watching["monitor_listed"], values, utility_loss=0.0)
        return float(found[0])

    assert queries(ctrap.compute - base) == pytest.approx(1.3e4, rel=0.05)
    assert queries(seam.compute - base) == pytest.approx(1.7e5, rel=0.05)
    assert queries(ctrap.compute - base + 50) == pytest.approx(2.5e6, rel=0.05)
    assert queries(ctrap.compute - base + 500) == pytest.approx(2.5e7, rel=0.05)


def test_the_worked_example_of_the_attacker(constants: Constants) -> None:
    values = constants.defaults()
    attack = training_flops(N, np.array([250 * 4 * 256.0]))
    assert attack == pytest.approx(1.0e16, rel=0.05)
    assert seconds(attack, values) == pytest.approx(26, rel=0.05)
    assert dollars(attack, values) == pytest.approx(0.018, rel=0.05)
    realign = training_flops(N, np.array([1000 * 600.0]), 15)
    assert realign == pytest.approx(3.6e17, rel=0.05)
    assert dollars(realign, values) == pytest.approx(0.64, rel=0.05)
    assert realign / attack == pytest.approx(36, rel=0.05)
    large = training_flops(N, np.array([52e3 * 256]), 3)
    assert dollars(large, values) == pytest.approx(2.8, rel=0.05)
    assert large / attack == pytest.approx(156, rel=0.05)
    pretraining = training_flops(N, values["pretraining.tokens"])
    assert pretraining == pytest.approx(8e22, rel=0.05)
    assert seconds(pretraining, values) / 3600 == pytest.approx(57e3, rel=0.05)


def test_tokenbuncher_by_hand(constants: Constants) -> None:
    values = constants.changed(
        tokenbuncher__queries=1,
        tokenbuncher__rollouts=2,
        tokenbuncher__prompt_tokens=3,
        tokenbuncher__response_tokens=5,
        gpu__decode_efficiency=0.25,
    ).defaults()
    # Two rollouts of five tokens at a quarter of the efficiency; 16 tokens read at 6N + 2 x 2N.
    assert tokenbuncher_flops(10.0, values) == pytest.approx(10 * (2 * 2 * 5 / 0.25 + 10 * 16))


def test_break_even_is_never_where_the_defence_costs_more_per_query(constants: Constants) -> None:
    values = constants.changed(query__utility_value=1e-3).defaults()
    price = np.array([2e-5])
    paid = np.array([10.0])
    assert break_even(paid, NOTHING, price, values, utility_loss=0.02) == np.inf  # exactly equal
    assert break_even(paid, NOTHING, price, values, utility_loss=0.5) == np.inf
    found = break_even(paid, NOTHING, price, values, utility_loss=0.01)
    assert found == pytest.approx(10.0 / 1e-5)


def test_break_even_counts_every_re_immunisation(constants: Constants) -> None:
    values = constants.changed(lifetime__re_immunisations_per_year=3, lifetime__years=2).defaults()
    found = break_even(np.array([10.0]), np.array([5.0]), np.array([0.1]), values, utility_loss=0)
    assert found == pytest.approx((10 + 3 * 2 * 5) / 0.1)


def test_dearer_gpus_and_more_drift_never_bring_break_even_nearer(constants: Constants) -> None:
    def queries(changed: Constants) -> np.ndarray:
        values = changed.draw(500, seed=1)
        cost = alignment_cost("seam", N, values, source="modelled", ratio=values["passes.seam"])
        listed = per_query_costs(N, values)["monitor_listed"]
        return break_even(cost.total, cost.again, listed, values, utility_loss=0)

    few = queries(constants.changed(lifetime__re_immunisations_per_year=0.5))
    many = queries(constants.changed(lifetime__re_immunisations_per_year=2))
    assert (many > few).all()
    dear = queries(constants.changed(gpu__price_per_hour=3))
    cheap = queries(constants.changed(gpu__price_per_hour=2))
    assert (dear > cheap).all()


def costs(undefended: float, immunised: float, **changes: float) -> AttackCosts:
    values = {
        "undefended": undefended,
        "immunised": immunised,
        "immunised_at_least": min(immunised, 60.0),
        "search": 0.0,
        "base": 0.0,
        "realigned": 36.0,
        "pretraining": 1e6,
        "edit": 0.5,
        **changes,
    }
    return AttackCosts(**{name: np.array([value]) for name, value in values.items()})


ONE = np.ones(1)


@pytest.mark.parametrize("available", AVAILABILITIES)
def test_identical_models_have_no_asymmetry(available: str) -> None:
    for steps in (1.0, 50.0, 1e7):
        same = costs(steps, steps, immunised_at_least=steps)
        assert [float(one[0]) for one in asymmetry(same, available, ONE)] == [0.0, 0.0]


@pytest.mark.parametrize("available", AVAILABILITIES)
@pytest.mark.parametrize("immunised", [0.5, 2.0, 1e3, np.inf])
def test_the_multiplier_never_exceeds_its_cap(available: str, immunised: float) -> None:
    times, bound, cap = multiplier(costs(1.0, immunised), available)
    assert bound <= times <= cap


def test_what_is_public_bounds_what_immunisation_can_do() -> None:
    held = costs(1.0, np.inf)
    assert multiplier(held, "base")[0] == 36.0
    assert multiplier(held, "none")[0] == 1e6
    assert multiplier(held, "none")[1] == 60.0, "no more than was tried is claimed"
    assert asymmetry(held, "base", ONE)[0] == pytest.approx(np.log10(36))
    assert asymmetry(held, "sibling", ONE)[0] == 0.0
    assert asymmetry(held, "base", np.array([10.0]))[0] == pytest.approx(np.log10(3.6))


def test_a_model_that_answers_before_the_attack_has_the_worst_index() -> None:
    assert asymmetry(costs(1.0, 0.0, immunised_at_least=0.0), "none", ONE)[0] == -np.inf


def test_an_edit_counts_where_what_it_needs_is_public() -> None:
    ways = {"immunised_merged": np.array([0.25]), "immunised_edited": np.array([np.inf])}
    held = replace(costs(1.0, np.inf), shortcuts=ways)
    assert multiplier(held, "base")[1] == 0.25
    assert multiplier(held, "none")[1] == 60.0
    assert multiplier(held, "sibling")[1] == 0.5, "merging needs the base model, not a sibling"
    both = replace(held, shortcuts={**ways, "undefended_merged": np.array([0.25])})
    assert asymmetry(both, "base", ONE)[0] == 0.0
    edited = replace(held, shortcuts={"immunised_edited": np.array([0.75])})
    assert [multiplier(edited, name)[1] for name in AVAILABILITIES] == [0.75, 0.5, 0.75]


def test_draws_keep_their_median_their_interval_and_their_range() -> None:
    rng = np.random.default_rng(0)
    drawn = Constant(value=3.0, unit="", source="").draw(200_000, rng)
    assert np.median(drawn) == pytest.approx(3.0, rel=0.01)
    inside = np.mean((drawn > 1.5) & (drawn < 6.0))
    assert inside == pytest.approx(0.95, abs=0.003)
    bounded = Constant(value=3.0, low=2.5, high=3.2, unit="", source="").draw(1000, rng)
    assert bounded.min() >= 2.5
    assert bounded.max() <= 3.2
    assert set(Constant(value=0.0, unit="", source="").draw(5, rng)) == {0.0}
    assert set(Constant(value=2.0, spread=1, unit="", source="").draw(5, rng)) == {2.0}


def test_a_constant_draws_the_same_whatever_the_others_are(constants: Constants) -> None:
    before = constants.draw(50, seed=3)
    after = constants.changed(gpu__mfu_train=0.3, cost__battery=1).draw(50, seed=3)
    assert np.array_equal(before["cost.review"], after["cost.review"])
    assert not np.array_equal(before["cost.battery"], after["cost.battery"])
    assert not np.array_equal(before["cost.review"], constants.draw(50, seed=4)["cost.review"])


def test_every_constant_has_a_source_that_says_what_it_is_worth(constants: Constants) -> None:
    for key, constant in constants.items():
        assert constant.source.startswith(
            ("published", "released", "assumed", "derived", "vendor's data sheet, from memory")
        ), key
        assert constant.unit, key


def test_constants_are_overridden_by_number_or_in_full(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "gpu:\n  mfu_train: 0.3\n  price_per_hour: {value: 9, high: 12, source: my bill}\n"
        "moderation: {price_per_thousand_records: 0}\n"
    )
    changed = read_constants(path)
    assert changed["gpu.mfu_train"].value == 0.3
    assert changed["gpu.mfu_train"].high == 0.55
    assert changed["gpu.price_per_hour"].source == "my bill"
    assert changed.overridden == {
        "gpu.mfu_train", "gpu.price_per_hour", "moderation.price_per_thousand_records",
    }  # fmt: skip
    assert not read_constants().overridden


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {mfu_trian: 0.3}", "did you mean 'gpu.mfu_train'"),
        ("gpu: {mfu_train: 0.9}", "outside its range"),
        ("gpu: {mfu_train: -1}", "not a number from 0 up"),
        ("gpu: {mfu_train: much}", "is not float"),
        ("gpu: {mfu_train: {value: 0.3, sprad: 2}}", "gpu.mfu_train: unknown key 'sprad'"),
        ("gpu: 3", "unknown constant 'gpu'"),
        ("gpu: {flops_bf16: 0}", "gpu.flops_bf16: the value 0 is divided by"),
        ("attack: {tokens_per_row: 0}", "attack.tokens_per_row: the value 0 is divided by"),
        ("gpu: {mfu_train: .nan}\nquery: {x: 1}", "mfu_train.*query.x"),
    ],
)
def test_bad_constants_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_constants(path)
