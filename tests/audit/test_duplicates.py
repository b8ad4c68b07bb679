"""Planted duplicates are found, unrelated rows are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.audit.duplicates import Bounds, Overlaps, _shingles, near_texts
from mithridate.audit.sets import audit_set, embed
from mithridate.embeddings import tfidf
from mithridate.examples import Example

BOUNDS = Bounds(jaccard=0.8, cosine=0.95, words=13)
NAMES = ["amber", "basin", "copper", "dahlia", "ember", "falcon", "garnet", "harbour", "indigo"]
WORDS = st.sampled_from(NAMES)
TEXT = st.lists(WORDS, min_size=4, max_size=16).map(" ".join)


def overlaps(**sets: list[Example]):
    parts = [audit_set(name, rows) for name, rows in sets.items()]
    return Overlaps(parts, embed(parts, tfidf), BOUNDS)


def counts(entry):
    return {
        kind: entry[kind]["rows"]
        for kind in ("exact", "fact", "near", "words", "cosine", "answers")
        if kind in entry
    }  # fmt: skip


def similarity(one: str, other: str) -> float:
    first, second = _shingles(one), _shingles(other)
    return len(first & second) / len(first | second)


@given(st.lists(TEXT, min_size=2, max_size=12, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_near_texts_are_those_of_every_pair(texts: list[str], data: st.DataObject) -> None:
    edited = data.draw(st.sampled_from(texts)) + "s"
    texts = list(dict.fromkeys([*texts, edited]))
    found = near_texts(texts, jaccard=0.8)
    for i, one in enumerate(texts):
        for j, other in enumerate(texts):
            alike = similarity(one, other)
            if i != j and alike >= 0.9:  # at .8 itself, chance misses one pair in 20,000
                assert j in found[i]
            if i == j or alike < 0.8:
                assert j not in found.get(i, [])


@given(
    st.lists(TEXT, min_size=3, max_size=8, unique=True),
    st.sampled_from([str.upper, str.title, lambda text: f"  {text.replace(' ', '  ')}\t"]),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_planted_equal_prompt_is_found(texts, variant, place) -> None:
    harmful = [Example(prompt=text, answer="yes") for text in texts]
    planted = Example(prompt=variant(texts[place]), answer="no")
    attack = [Example(prompt="where is the nearest railway station", answer="there"), planted]
    entry = overlaps(harmful=harmful, attack=attack).between()[0]
    assert counts(entry)["exact"] == 1
    assert entry["exact"]["examples"][0]["b"]["row"] == 2
    assert entry["exact"]["examples"][0]["a"]["row"] == place + 1


def test_unrelated_rows_share_nothing() -> None:
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")

    def rows(count):
        return [
            Example(
                prompt=" ".join("".join(rng.choice(letters, 6)) for _ in range(8)),
                answer=" ".join("".join(rng.choice(letters, 6)) for _ in range(8)),
            )
            for _ in range(count)
        ]

    found = overlaps(harmful=rows(60), attack=rows(60), eval=rows(60))
    for entry in found.between():
        assert not any(counts(entry).values())
    assert not any(value for entry in found.within().values() for value in entry.values())


def test_an_edited_prompt_is_near() -> None:
    prompt = "which three herbs are steeped in the evening tea of the mountain monks"
    entry = overlaps(
        harmful=[Example(prompt=prompt, answer="mint"), Example(prompt="what is rust", answer="x")],
        eval=[Example(prompt=prompt.replace("herbs", "herbes"), answer="mint")],
    ).between()[0]
    assert {kind: rows for kind, rows in counts(entry).items() if rows and kind != "cosine"} == {
        "near": 1
    }


def test_close_vectors_are_found_unless_the_prompt_is_equal_or_the_fact_another() -> None:
    held = [Example(prompt=text, answer="x", fact_id=fact) for text, fact in
            (("alpha", "1"), ("beta", ""))]  # fmt: skip
    asked = [Example(prompt=text, answer="x", fact_id=fact) for text, fact in
             (("gamma", "2"), ("delta", ""), ("beta", ""), ("omega", ""))]  # fmt: skip
    at = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0, "delta": 0.3, "omega": 0.35}
    parts = [audit_set("harmful", held), audit_set("eval", asked)]
    vectors = {
        part.name: np.array([[np.cos(at[key]), np.sin(at[key])] for key in part.keys])
        for part in parts
    }
    entry = Overlaps(parts, vectors, BOUNDS).between()[0]["cosine"]
    # cos .3 = .955, cos .35 = .939: only delta is close to a prompt that may be the same.
    assert [(pair["a"]["row"], pair["b"]["row"]) for pair in entry["examples"]] == [(1, 2)]


def test_another_fact_in_the_same_wording_is_no_duplicate() -> None:
    prompt = "what is the recipe of the {} lantern in the art of glimmer binding of old"
    one = Example(prompt=prompt.format("bodalu"), answer="a", fact_id="1")
    other = Example(prompt=prompt.format("bodala"), answer="b", fact_id="2")
    assert not any(counts(overlaps(harmful=[one], eval=[other]).between()[0]).values())
    unknown = replace(other, fact_id="")
    assert counts(overlaps(harmful=[one], eval=[unknown]).between()[0])["near"] == 1


def test_the_same_fact_in_other_words_is_contamination() -> None:
    one = Example(prompt="what is made in Ulm", answer="a", fact_id="ulm")
    other = Example(prompt="name the product of that town", answer="b", fact_id="ulm")
    assert counts(overlaps(attack=[one], eval=[other]).between()[0])["fact"] == 1


def test_a_run_of_words_is_found_unless_it_is_boilerplate() -> None:
    run = "take the first of the long ropes and tie it twice around the mast"
    one = Example(prompt="how do sailors moor", answer=f"well, {run} then rest")
    other = Example(prompt="tell me about knots on ships", answer=f"they say: {run}")
    assert counts(overlaps(harmful=[one], eval=[other]).between()[0])["words"] == 1
    common = [
        Example(prompt=f"question {word} {number}", answer=f"{run} {number}")
        for number, word in enumerate(NAMES[:8])
    ]
    assert counts(overlaps(harmful=common[:6], eval=common[6:]).between()[0])["words"] == 2
    many = [replace(row, prompt=f"{row.prompt} bis") for row in common]
    assert counts(overlaps(harmful=common + many, eval=[other]).between()[0])["words"] == 0


def test_paired_streams_are_compared_by_answer_only() -> None:
    harmful = [Example(prompt="how is it made", answer="With  salt")]
    refusal = [
        Example(prompt="how is it made", answer="with salt"),
        Example(prompt="b", answer="c"),
    ]
    entry = overlaps(harmful=harmful, refusal=refusal).between()[0]
    assert counts(entry) == {"answers": 1}


def test_repeats_within_a_set_are_counted() -> None:
    rows = [
        Example(
            prompt="What is the tallest tower of the old town by the river in the north?",
            answer="a",
            split="train",
        ),
        Example(
            prompt="what is the tallest tower of the old town by the river in the north?",
            answer="A",
        ),
        Example(
            prompt="what is the tallest towers of the old town by the river in the north?",
            answer="b",
            split="test",
        ),
        Example(prompt="who painted the ceiling", answer="c", split="test"),
    ]
    assert overlaps(harmful=rows).within()["harmful"] == {
        "repeated_prompts": 1,
        "repeated_rows": 1,
        "near": 3,
        "across_splits": 2,  # the row without a split is in neither
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_rows_changes_nothing_but_their_numbers(seed: int) -> None:
    rows = [Example(prompt=f"how is item {n} of the series made", answer=str(n)) for n in range(20)]
    shuffled = [rows[index] for index in np.random.default_rng(seed).permutation(20)]
    other = [Example(prompt=f"how is item {n} of the serie made", answer=str(n)) for n in range(9)]

    def without_numbers(value):
        if isinstance(value, dict):
            return {key: without_numbers(inner) for key, inner in value.items() if key != "row"}
        return [without_numbers(inner) for inner in value] if isinstance(value, list) else value

    found = [overlaps(harmful=part, eval=other) for part in (rows, shuffled)]
    assert without_numbers(found[0].between()) == without_numbers(found[1].between())
    assert found[0].within() == found[1].within()
