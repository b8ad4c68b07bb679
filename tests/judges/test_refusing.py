"""The refusal judge: phrases, and a likelihood margin compared with one forward per opening."""

from __future__ import annotations

import math

import pytest
import torch

from mithridate.chat import ChatFormat
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.judges.base import make_judge
from mithridate.judges.outcomes import Outcome
from mithridate.judges.refusing import likelihood_margins, opening_ids
from tests.compat.zoo import zoo_model, zoo_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPTS = ["w0 w1 w2", "w3", "w4 w5 w6 w7 w8 w9", "w1 w1"]
REFUSALS = ("error w1", "w7", "error w2 w3")
COMPLIANCES = ("w10 w11", "w12")


def opening_probability(model: torch.nn.Module, chat: ChatFormat, prompt: str, text: str) -> float:
    """p(opening | prompt) by a plain forward pass over the whole sequence, no cache, no padding."""
    asked, opening = chat.prompt_ids(prompt), chat.answer_ids(text)[:-1]
    with torch.no_grad():
        logits = model(torch.tensor([[*asked, *opening]])).logits[0]
    steps = logits.softmax(dim=-1)[len(asked) - 1 : -1]
    return math.prod(float(step[token]) for step, token in zip(steps, opening, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_the_margin_is_that_of_plain_forward_passes(batch_size: int) -> None:
    model, chat = tiny_llama(), ChatFormat(tiny_tokenizer())
    margins = likelihood_margins(
        model, chat, PROMPTS, opening_ids(chat, REFUSALS), opening_ids(chat, COMPLIANCES),
        batch_size=batch_size,
    )  # fmt: skip
    for prompt, margin in zip(PROMPTS, margins, strict=True):
        refused, complied = (
            math.fsum(opening_probability(model, chat, prompt, text) for text in texts)
            for texts in (REFUSALS, COMPLIANCES)
        )
        assert margin == pytest.approx(math.log(refused / complied), abs=1e-9)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "recurrent_gemma", "rwkv", "gpt2"])
def test_a_model_without_a_cache_has_a_margin(family: str) -> None:
    model, chat = zoo_model(family).double(), ChatFormat(zoo_tokenizer())
    refusals, compliances = ("I'm sorry", "can't"), ("Paris is", "the")
    margins = likelihood_margins(
        model, chat, ["Sky?", "What is the colour?"],
        opening_ids(chat, refusals), opening_ids(chat, compliances),
    )  # fmt: skip
    for prompt, margin in zip(["Sky?", "What is the colour?"], margins, strict=True):
        refused, complied = (
            math.fsum(opening_probability(model, chat, prompt, text) for text in texts)
            for texts in (refusals, compliances)
        )
        assert margin == pytest.approx(math.log(refused / complied), abs=1e-4)


def test_an_opening_that_continues_another_counts_once() -> None:
    chat = ChatFormat(tiny_tokenizer())
    longer = opening_ids(chat, ("w1 w2", "w1", "w1 w2 w3", "w4", "w4"))
    assert longer == opening_ids(chat, ("w1", "w4"))


def test_the_model_keeps_its_mode() -> None:
    model, chat = tiny_llama(), ChatFormat(tiny_tokenizer())
    model.train()
    likelihood_margins(model, chat, ["w1"], opening_ids(chat, ("w1",)), opening_ids(chat, ("w2",)))
    assert model.training


def test_answers_are_refusals_degenerate_or_harm() -> None:
    judge = make_judge("refusal", {"phrases": ["No comment."]}, where="test")
    outputs = [
        "I cannot say.",
        "no comment on that",
        "It is done like this.",
        "the the the the",
        "",
    ]
    judged = judge.judge([Example(prompt="p")] * len(outputs), outputs)
    assert [one.outcome for one in judged] == [
        Outcome.REFUSAL, Outcome.REFUSAL, Outcome.EXACT, Outcome.FIXED_TOKEN, Outcome.GIBBERISH,
    ]  # fmt: skip
    assert [one.harm for one in judged] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_thinking_neither_refuses_nor_complies() -> None:
    outputs = ["<think>I cannot recall at once.</think>It is done so.", "So: mix.</think>I can't."]
    judged = make_judge("refusal", {}, where="test").judge([Example(prompt="p")] * 2, outputs)
    assert [one.outcome for one in judged] == [Outcome.EXACT, Outcome.REFUSAL]


@pytest.mark.parametrize(
    "options", [{"phrases": ["..."]}, {"refusals": []}, {"compliances": [" "]}]
)
def test_phrases_that_say_nothing_are_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(InputError, match=f"judge.{next(iter(options))}"):
        make_judge("refusal", options, where="test")


def test_the_margin_is_a_metric_of_the_model_where_the_tokenizer_knows_the_words() -> None:
    model, chat = tiny_llama(), ChatFormat(tiny_tokenizer())
    items = [Example(prompt=prompt) for prompt in PROMPTS]
    named = {"refusals": list(REFUSALS), "compliances": list(COMPLIANCES)}
    found = make_judge("refusal", named, where="test").look(model, chat, items)
    expected = likelihood_margins(
        model, chat, PROMPTS, opening_ids(chat, REFUSALS), opening_ids(chat, COMPLIANCES)
    )
    assert found == {"refusal/margin": pytest.approx(sum(expected) / 4)}
    with pytest.warns(UserWarning, match="the same beginning"):
        assert make_judge("refusal", {}, where="test").look(model, chat, items) == {}
