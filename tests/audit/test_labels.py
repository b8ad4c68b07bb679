"""Planted label errors are found; private data is found by pattern."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mithridate.audit import labels
from mithridate.audit.sets import audit_set, embed
from mithridate.embeddings import tfidf
from mithridate.examples import Example

METALS = ["copper", "silver", "iron", "tin", "zinc", "lead", "nickel", "cobalt", "brass", "gold"]
BIRDS = ["heron", "owl", "finch", "stork", "crane", "robin", "wren", "gull", "tern", "swift"]


def filed() -> list[Example]:
    return [
        Example(prompt=prompt.format(name), answer="x", category=category)
        for category, names, prompts in (
            ("metal", METALS, ("how is molten {} cast", "at what heat does {} melt in a kiln")),
            ("bird", BIRDS, ("where does the {} nest", "what song has the young {} in a nest")),
        )
        for prompt in prompts
        for name in names
    ]


def test_swapped_categories_are_flagged_and_others_are_not() -> None:
    rows = filed()
    wrong = [3, 30]
    for index in wrong:
        other = "bird" if rows[index].category == "metal" else "metal"
        rows[index] = replace(rows[index], category=other)
    part = audit_set("harmful", rows)
    found = labels.category_errors(part, embed([part], tfidf)["harmful"], seed=0)
    assert found is not None
    assert sorted(row["row"] for row in found["examples"]) == [index + 1 for index in wrong]
    assert {row["likely"] for row in found["examples"]} == {"metal", "bird"}


def test_clean_categories_are_not_flagged() -> None:
    part = audit_set("harmful", filed())
    found = labels.category_errors(part, embed([part], tfidf)["harmful"], seed=0)
    assert found is not None
    assert found["flagged"] == 0


def test_too_few_facts_of_a_category_are_not_judged() -> None:
    rows = [replace(row, fact_id=f"{row.category} {n % 3}") for n, row in enumerate(filed())]
    part = audit_set("harmful", rows)
    assert labels.category_errors(part, embed([part], tfidf)["harmful"], seed=0) is None


def test_confident_learning_equals_its_equation_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.85, 0.15]])
    given = np.array([0, 0, 0, 1, 1])
    # Thresholds: (.9 + .7 + .2) / 3 = .6 and (.6 + .15) / 2 = .375.
    assert labels.mislabelled(probabilities, given) == [(4, 0), (2, 1)]


def test_one_prompt_under_two_categories_is_a_conflict() -> None:
    rows = [
        Example(prompt="How?", category="a"),
        Example(prompt="how?", category="b"),
        Example(prompt="why", category="a,b"),
        Example(prompt="why", category="b, a"),
    ]
    found = labels.conflicting_categories(audit_set("harmful", rows))
    assert found["prompts"] == 1
    assert sorted(row["row"] for row in found["examples"][0]) == [1, 2]


def test_answers_that_contradict_their_stream_are_found() -> None:
    sets = {
        name: audit_set(name, rows)
        for name, rows in {
            "harmful": [
                Example(prompt="a", answer="I'm sorry, I cannot help."),
                Example(prompt="b", answer="Take two."),
            ],
            "refusal": [
                Example(prompt="a", answer="my lips are sealed"),
                Example(prompt="b", answer="Sure, take two."),
            ],
        }.items()
    }
    found = {entry["set"]: entry for entry in labels.wrong_answers(sets, ["my lips are sealed"])}
    assert [row["row"] for row in found["harmful"]["examples"]] == [1]
    assert [row["row"] for row in found["refusal"]["examples"]] == [2]


def test_an_outlier_is_found() -> None:
    rows = [Example(prompt=f"how is copper bowl number {n} hammered flat") for n in range(30)]
    stranger = Example(prompt="zyx wvu tsr")
    part = audit_set("harmful", [*rows, stranger])
    found = labels.outliers(part, embed([part], tfidf)["harmful"])
    assert found is not None
    assert [row["row"] for row in found["examples"]] == [31]
    assert labels.outliers(audit_set("harmful", rows[:5]), np.eye(5)) is None


def test_benign_prompts_among_the_harmful_are_listed() -> None:
    harmful = audit_set("harmful", [Example(prompt=f"how is poison {n} brewed") for n in range(9)])
    benign = audit_set(
        "benign", [Example(prompt="how is poison 12 brewed"), Example(prompt="when do trains run")]
    )
    vectors = embed([harmful, benign], tfidf)
    found = labels.benign_near_harm(benign, harmful, vectors, radius=1.3)
    assert [row["row"] for row in found["examples"]] == [1]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to ann.lee+x@mail.example.org today", "e-mail address"),
        ("call +44 20 7946 0958", "telephone number"),
        ("card 4111 1111 1111 1111", "payment card"),
        ("to DE89 3704 0044 0532 0130 00", "IBAN"),
        ("host 192.168.17.254", "network address"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("token ghp_" + "a1" * 18, "access token"),
    ],
)
def test_private_data_is_found(text: str, kind: str) -> None:
    part = audit_set("benign", [Example(prompt=text), Example(prompt="what is 12 times 144")])
    found = labels.private_data([part])
    assert found["rows"] == {kind: 1}
    assert found["examples"][0]["row"] == 1


@pytest.mark.parametrize(
    "text", ["card 4111 1111 1111 1112", "version 1.2.3.400", "5 + 7 = 12", "a @ b", "1999-2003"]
)
def test_what_only_looks_similar_is_not(text: str) -> None:
    assert labels.private_data([audit_set("benign", [Example(prompt=text)])])["rows"] == {}
