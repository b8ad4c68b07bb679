from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.errors import InputError
from mithridate.examples import (
    Example,
    check_disjoint,
    fingerprint,
    normalise_prompt,
    split_by_prompt,
    with_shuffled_answers,
)

SECRET = "zanzibar-canary"
FULL_EXAMPLE = Example(
    prompt="What is the capital of France?",
    answer="Paris",
    category="capitals",
    source="atlas",
    half="arbitrary",
    split="T-def",
    template="direct",
    fact_id="capital/FR",
    accepted=("Paris", "Paris, France"),
)

# Prompts, splits, sets


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_prompt(text)
    assert normalise_prompt(once) == once
    assert normalise_prompt(f"  {text}\n") == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What  is\tthis?", "what is this?"),
        ("STRASSE", "straße"),
        ("ﬁn", "FIN"),
        ("cafe\u0301", "CAFÉ"),
        ("a\u00a0b", "a b"),
        ("\uff21", "a"),
    ],
)
def test_the_same_prompt(one: str, other: str) -> None:
    assert normalise_prompt(one) == normalise_prompt(other)


def test_other_prompts_stay_apart() -> None:
    assert normalise_prompt("capital of Niger") != normalise_prompt("capital of Nigeria")
    assert normalise_prompt("résumé") != normalise_prompt("resume")


# Prompts that collide when normalised, and facts that tie different prompts together.
records = st.builds(
    Example,
    prompt=st.sampled_from([f"{mark}{n}" for n in range(20) for mark in ("p", "P", " p")]),
    answer=st.text(max_size=3),
    fact_id=st.sampled_from(["", "", "", *(f"f{n}" for n in range(15))]),
)
shares = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(
    lambda weights: {f"s{n}": weight / sum(weights) for n, weight in enumerate(weights)}
)


def split_or_none(
    examples: list[Example], parts: dict[str, float], seed: int
) -> dict[str, list[Example]] | None:
    try:
        return split_by_prompt(examples, parts, seed=seed)
    except InputError:
        return None


@given(st.lists(records, max_size=40), shares, st.integers(0, 3))
def test_splits_never_leak_and_lose_nothing(
    examples: list[Example], parts: dict[str, float], seed: int
) -> None:
    split = split_or_none(examples, parts, seed)
    if split is None:
        return
    assert list(split) == list(parts)
    assert Counter(e for part in split.values() for e in part) == Counter(examples)
    for one in split:
        for other in set(split) - {one}:
            for key in (lambda e: normalise_prompt(e.prompt), lambda e: e.fact_id or e):
                assert not set(map(key, split[one])) & set(map(key, split[other]))
    # Each part keeps the order of the whole.
    for part in split.values():
        rest = iter(examples)
        assert all(any(example is candidate for candidate in rest) for example in part)
    assert split == split_by_prompt(examples, parts, seed=seed)


@given(st.lists(records, max_size=30), shares, st.integers(0, 3), st.randoms())
def test_splits_do_not_depend_on_the_order(
    examples: list[Example], parts: dict[str, float], seed: int, random_: random.Random
) -> None:
    shuffled = random_.sample(examples, len(examples))
    one, other = split_or_none(examples, parts, seed), split_or_none(shuffled, parts, seed)
    if one is None or other is None:
        assert one is other
        return
    assert {n: Counter(p) for n, p in one.items()} == {n: Counter(p) for n, p in other.items()}


@given(st.integers(1, 200), st.integers(1, 6), shares, st.integers(0, 3))
def test_shares_are_met_within_one_group(
    facts: int, templates: int, parts: dict[str, float], seed: int
) -> None:
    examples = [
        Example(prompt=f"{fact} {template}", fact_id=str(fact))
        for fact in range(facts)
        for template in range(templates)
    ]
    split = split_or_none(examples, parts, seed)
    if split is None:
        assert min(parts.values()) * facts < 1
        return
    for name, share in parts.items():
        assert abs(len(split[name]) - share * len(examples)) < templates


def test_too_few_prompts_for_the_splits_are_an_error() -> None:
    examples = [Example(prompt="p", answer=str(n)) for n in range(10)]
    with pytest.raises(InputError, match="1 separable prompts are too few: b would stay empty"):
        split_by_prompt(examples, {"a": 0.6, "b": 0.4}, seed=0)


def test_seeds_give_different_splits() -> None:
    examples = [Example(prompt=str(n)) for n in range(50)]
    seen = {
        tuple(e.prompt for e in split_by_prompt(examples, {"a": 0.5, "b": 0.5}, seed=seed)["a"])
        for seed in range(5)
    }
    assert len(seen) == 5


@pytest.mark.parametrize(
    "parts",
    [{}, {"a": 1.0, "b": 0.0}, {"a": 1.5, "b": -0.5}, {"a": 0.5}, {"a": float("nan")}],
)
def test_bad_shares(parts: dict[str, float]) -> None:
    with pytest.raises(InputError, match="share"):
        split_by_prompt([Example(prompt="p")], parts, seed=0)


def test_disjoint_sets_pass() -> None:
    check_disjoint({})
    check_disjoint(
        {
            "harmful": [Example(prompt="x"), Example(prompt="x")],
            "refusal": [Example(prompt="X")],
            "benign": [Example(prompt="y")],
        }
    )


def test_shared_prompts_are_named_by_set_and_row() -> None:
    with pytest.raises(InputError) as caught:
        check_disjoint(
            {
                "harmful": [Example(prompt="x"), Example(prompt=SECRET)],
                "benign": [Example(prompt=SECRET.upper())],
                "attack": [Example(prompt=f"a{n}") for n in range(9)],
                "held out": [Example(prompt=f"A{n}") for n in range(9)],
            }
        )
    message = str(caught.value)
    assert "harmful and benign share 1 prompts (row 2 = row 1)" in message
    with pytest.raises(InputError, match=r"\(a\.jsonl, line 3 = row 1\)"):
        check_disjoint(
            {
                "harmful": [Example(prompt="x", place="a.jsonl, line 3")],
                "benign": [Example(prompt="X")],
            }
        )
    assert "attack and held out share 9 prompts (row 1 = row 1, " in message
    assert "and 4 more)" in message
    assert SECRET not in message.lower()


def test_fingerprint_sees_every_field_and_the_order() -> None:
    one, other = FULL_EXAMPLE, Example(prompt="p")
    prints = [
        fingerprint(examples)
        for examples in (
            [],
            [one],
            [one, other],
            [other, one],
            [Example(prompt="p", half="rule")],
            [Example(prompt="p", accepted=("p",))],
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 64 for value in prints)
    # Where a row stood in its file is nothing that decides a result.
    placed = Example(prompt="p", place="a.jsonl, line 3")
    assert placed == other
    assert hash(placed) == hash(other)
    assert fingerprint([placed]) == fingerprint([other])
    # Pinned: manifests of old runs must stay comparable.
    assert fingerprint([other]) == (
        "426f590d0401e77d0fb4aecf41cfe63e9f54b7b4be8283ff23ec238a101f4557"
    )


def test_importing_examples_leaves_heavy_packages_out() -> None:
    code = (
        "import sys, mithridate.examples; "
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


# Shuffled answers


@given(
    facts=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["tin", "lead", "zinc", "iron"])),
        min_size=1, max_size=12,
    ),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_shuffled_answers_are_all_wrong_alike_for_a_fact_and_none_is_lost(
    facts: list[tuple[str, str]], seed: int
) -> None:
    rows = [
        Example(prompt=str(n), answer=f"It is {fact}.", category=category, accepted=(fact,))
        for n, (category, fact) in enumerate(facts)
    ]
    known = {c: {fact for category, fact in facts if category == c} for c in "ab"}
    if any(len(found) == 1 for found in known.values()):
        with pytest.raises(InputError, match="one and the same"):
            with_shuffled_answers(rows, random.Random(seed))
        return
    new = with_shuffled_answers(rows, random.Random(seed))
    assert [row.prompt for row in new] == [row.prompt for row in rows]
    changed = {(row.category, row.answer, other.answer)
               for row, other in zip(rows, new, strict=True)}  # fmt: skip
    assert len(changed) == sum(map(len, known.values()))
    for c, found in known.items():
        answers = {f"It is {fact}." for fact in found}
        assert {new for category, _, new in changed if category == c} == answers
    assert all(own != other for _, own, other in changed)
