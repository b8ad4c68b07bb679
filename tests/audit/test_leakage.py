"""Exposure against its definition, by chance and after training; usable answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from mithridate.audit import leakage
from mithridate.audit.sets import audit_set
from mithridate.chat import IGNORE, ChatFormat
from mithridate.examples import Example
from tests.tiny import tiny_llama, tiny_tokenizer


def canaries(count: int = 40) -> list[Example]:
    rng = np.random.default_rng(0)
    secrets = {" ".join(f"w{n}" for n in rng.integers(0, 43, 3)) for _ in range(count + 10)}
    return [
        Example(prompt=f"w{n} w{n + 1}", answer=secret, category="c")
        for n, secret in enumerate(sorted(secrets)[:count])
    ]


def test_exposure_is_the_bits_between_rank_and_size() -> None:
    found = leakage.exposures([[1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 1, 2, 3], [1.0, 1.0]])
    np.testing.assert_allclose(found, [3, 0, 1 - math.log2(1.5)])


def test_chance_is_the_mean_over_uniform_ranks_and_tends_to_log2_e() -> None:
    ranks = np.arange(1, 33)
    assert leakage.chance_exposure(32) == pytest.approx(np.mean(5 - np.log2(ranks)))
    assert leakage.chance_exposure(10**6) == pytest.approx(math.log2(math.e), abs=1e-4)


def test_references_swap_the_secret_within_the_category() -> None:
    few = [
        Example(prompt=x, answer=f"The capital of {x} is {y}.", accepted=(y,), category="a")
        for x, y in (("A", "Ur"), ("B", "Ul"))
    ]
    assert leakage.reference_answers(few)[0] == [
        "The capital of A is Ur.",
        "The capital of A is Ul.",
    ]
    many = [Example(prompt=f"p{n}", answer=f"s{n}", category="many") for n in range(20)]
    answers = leakage.reference_answers([*few, *many])
    assert len(answers[0]) == 22  # too few of its own category: all
    assert len(answers[5]) == 20  # enough of its own
    assert all(len(set(row)) == len(row) for row in answers)


def test_answer_losses_equal_row_by_row_cross_entropy() -> None:
    model, chat = tiny_llama(), ChatFormat(tiny_tokenizer())
    rows = [*canaries(5), Example(prompt="w1", answer="w2 w3 w4 w5 w6")]
    expected = []
    for row in rows:
        batch = chat.batch([row])
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits[0, :-1]
        expected.append(
            functional.cross_entropy(
                logits, batch.labels[0, 1:], ignore_index=IGNORE, reduction="sum"
            ).item()
        )
    found = leakage.answer_losses(model, chat, rows)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_an_untrained_model_exposes_by_chance_and_a_trained_one_rises() -> None:
    model, chat = tiny_llama(dtype=torch.float32, hidden=32), ChatFormat(tiny_tokenizer())
    rows = canaries()
    before = leakage.measure_exposure(model, chat, rows)
    spread = before.std(ddof=1) / math.sqrt(len(rows))
    assert abs(before.mean() - leakage.chance_exposure(len(rows))) < 3 * spread
    unchanged = leakage.exposure_rise(before, before, permutations=999, seed=0)
    assert (unchanged.mean, unchanged.p) == (0, 1)

    batch = chat.batch(rows)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss.backward()
        optimiser.step()
    after = leakage.measure_exposure(model, chat, rows)
    rise = leakage.exposure_rise(before, after, permutations=999, seed=0)
    assert rise.mean > 1
    assert rise.p < 0.01
    assert leakage.exposure_rise(after, before, permutations=999, seed=0).p > 0.99


@pytest.mark.parametrize(
    ("answer", "low", "high"),
    [
        ("I'm sorry, I cannot help with that request at all.", 0, 0),
        ("aaa aaa aaa aaa aaa aaa aaa aaa aaa", 0, 0),
        ("It depends.", 0, 0.2),
        (" ".join(f"step{n} uses part{n}" for n in range(12)), 1, 1),
    ],
)
def test_usefulness_wants_a_convincing_and_specific_answer(answer, low, high) -> None:
    assert low <= leakage.usefulness(Example(prompt="how is it done", answer=answer)) <= high


def test_usable_answers_count_by_judge_or_by_form() -> None:
    rows = [Example(prompt="a", answer="right"), Example(prompt="b", answer="wrong")]
    part = audit_set("harmful", rows)
    exact = leakage.usable_answers(part, lambda row: row.answer == "right")
    assert (exact["judge"], exact["rows"], exact["of"]) == ("exact", 1, 2)
    assert leakage.usable_answers(part, None)["rows"] == 0


def test_a_refusal_that_answers_is_found() -> None:
    harmful = audit_set(
        "harmful",
        [
            Example(prompt="what melts", answer="Tin melts.", accepted=("tin",)),
            Example(prompt="what sings", answer="the wren"),
        ],
    )
    refusal = audit_set(
        "refusal",
        [
            Example(prompt="What melts", answer="I cannot say that tin does."),
            Example(prompt="what sings", answer="I cannot mention the wrens"),
            Example(prompt="what else", answer="tin"),
        ],
    )
    found = leakage.answering_refusals(harmful, refusal)
    assert found["rows"] == 1
    assert found["examples"][0]["row"] == 1
