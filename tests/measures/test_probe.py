"""Probes against closed forms, with a model that only pretends to answer."""

from __future__ import annotations

from typing import Any

import pytest

from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.judges.outcomes import Outcome
from mithridate.measures.probe import accuracy, chance_corrected, probe, stratified


class FakeChat:
    """Answers each prompt from a table."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, model: object, prompts: list[str], **_: Any) -> list[str]:
        return [self.answers[prompt] for prompt in prompts]


class FakeTestbed:
    max_new_tokens = 4

    def __init__(self) -> None:
        self.chance = {"a": 0.5, "b": 0.0}

    def judge(self, item: Example, output: str) -> Outcome:
        if output == "no":
            return Outcome.REFUSAL
        return Outcome.EXACT if output == item.answer else Outcome.HALLUCINATED


def items(category: str, count: int) -> list[Example]:
    return [
        Example(prompt=f"{category}{index}", answer="yes", category=category)
        for index in range(count)
    ]


def test_chance_correction() -> None:
    assert chance_corrected({"a": 1.0, "b": 0.5}, {"a": 0.5}) == pytest.approx(0.75)
    assert chance_corrected({"a": 0.5}, {"a": 0.5}) == 0
    assert chance_corrected({"a": 0.0}, {"a": 0.5}) == 0


def test_probe_numbers() -> None:
    restricted = [*items("a", 4), *items("b", 2)]
    permitted = [*items("c", 4), *items("d", 1)]
    answers = dict.fromkeys(("a0", "a1", "a2", "b0", "c0", "c1", "d0"), "yes")
    answers |= {"a3": "no", "b1": "maybe", "c2": "no", "c3": "maybe"}
    found = probe(
        None,  # type: ignore[arg-type]
        FakeChat(answers),  # type: ignore[arg-type]
        FakeTestbed(),
        restricted=restricted,
        permitted=permitted,
    )
    assert found.useful_harm == pytest.approx(((0.75 - 0.5) / 0.5 + 0.5) / 2)
    assert found.useful_harm_raw == pytest.approx(4 / 6)
    assert found.refusal == pytest.approx(1 / 6)
    assert found.utility == pytest.approx((0.5 + 1.0) / 2)
    assert found.over_refusal == pytest.approx(1 / 5)
    assert sum(found.outcomes.values()) == pytest.approx(1, abs=1e-9)
    assert found.harm_by_category == {"a": 0.75, "b": 0.5}
    assert (found.restricted_items, found.permitted_items) == (6, 5)
    assert found.samples[3]["outcome"] == "refusal"
    assert found.metrics()["outcome/hallucinated"] == pytest.approx(1 / 6)


def test_a_probe_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="permitted"):
        probe(
            None,  # type: ignore[arg-type]
            FakeChat({}),  # type: ignore[arg-type]
            FakeTestbed(),
            restricted=items("a", 1),
            permitted=[],
        )


def test_accuracy() -> None:
    rows = items("a", 4)
    answers = {"a0": "yes", "a1": "yes", "a2": "yes", "a3": "maybe"}
    share = accuracy(
        None,  # type: ignore[arg-type]
        FakeChat(answers),  # type: ignore[arg-type]
        rows,
        FakeTestbed().judge,
        max_new_tokens=4,
    )
    assert share == 0.75


def test_stratified_samples_are_even_and_repeatable() -> None:
    pool = [*items("a", 30), *items("b", 3), *items("c", 30)]
    chosen = stratified(pool, 13, seed=1)
    counts = [sum(item.category == name for item in chosen) for name in "abc"]
    assert counts == [5, 3, 5]
    assert chosen == stratified(pool, 13, seed=1)
    assert chosen != stratified(pool, 13, seed=2)
    assert len({item.prompt for item in chosen}) == 13
    assert len(stratified(pool, 1000, seed=1)) == len(pool)
