"""Separating answers from thinking."""

from __future__ import annotations

import time

import pytest

from mithridate.thinking import final_answer, open_thought

HARMONY = (
    "<|channel|>analysis<|message|>Not Berlin.<|end|><|start|>assistant<|channel|>final<|message|>"
)


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        " Paris\n",
        "<think>\nNot Berlin.\n</think>\n\nParis",
        "<think>\n\n</think>\n\nParis",
        "Not Berlin, which is in Germany.\n</think>\n\nParis",
        "<think>a</think>Rome<think>no: b</think>Paris",
        "<think>it begins with <think> they say</think>Paris",
        "<thinking>Not Berlin.</thinking>Paris",
        "<thought>Not Berlin.</thought>Paris",
        "<reasoning>Not Berlin.</reasoning>\n<answer>Paris</answer>",
        "[THINK]Not Berlin.[/THINK]Paris",
        "<seed:think>Not <seed:cot_budget_reflect>x</seed:cot_budget_reflect></seed:think>Paris",
        "◁think▷Not Berlin.◁/think▷Paris",
        "<think>Not Berlin.</think><response>Paris</response> and so on",
        "<|begin_of_thought|>Not Berlin.<|end_of_thought|>\n"
        "<|begin_of_solution|>Paris<|end_of_solution|>",
        "<|START_THINKING|>Not Berlin.<|END_THINKING|><|START_RESPONSE|>Paris<|END_RESPONSE|>",
        "<|inner_prefix|>Not Berlin.<|inner_suffix|>Paris",
        "<|im_start|>think\nNot Berlin.<|im_start|>answer\nParis",
        "<|channel>thought\nNot Berlin.<channel|>Paris",
        "<unused94>thought\nNot Berlin.<unused95>Paris",
        "Here is my thought process: not Berlin. Here is my response: Paris",
        f"{HARMONY}Paris",
        f"{HARMONY}Paris<|return|>",
        f"{HARMONY}Paris<|end|><|start|>assistant<|channel|>commentary<|message|>Rome",
        "<|channel|>final <|constrain|>text<|message|>Paris<|return|>",
        "Paris <think>was that right?",
    ],
)
def test_only_what_follows_the_thinking_answers(text: str) -> None:
    assert final_answer(text) == "Paris"
    assert final_answer("Paris") == "Paris"


@pytest.mark.parametrize(
    "text",
    [
        "<think>Paris",
        " \n<think>\nParis. I'm sorry, I cannot help",
        "<think>a</think>\n<think>Paris",
        "[THINK]Paris",
        "<|channel|>analysis<|message|>Paris",
        "<|channel|>analysis<|message|>Paris<|end|><|start|>assistant<|channel|>final",
    ],
)
def test_an_unfinished_thought_is_no_answer(text: str) -> None:
    assert final_answer(text) is None


def test_text_without_thoughts_stays_as_it_is() -> None:
    for text in ("1 < 2 > 1", "<answer>Paris</answer>", "Here is my thought process: Paris", ""):
        assert final_answer(text) == text


@pytest.mark.parametrize(
    ("before", "opened"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<think></think>[/INST][THINK]", "[THINK]"),
        ("<|start|>assistant", ""),
        ("<|start|>assistant<|channel|>final<|message|>", ""),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("<|channel|>analysis<|message|>x<|end|><|start|>assistant", ""),
    ],
)
def test_a_template_may_open_the_thought_itself(before: str, opened: str) -> None:
    assert open_thought(before) == opened
    if opened:
        assert final_answer(opened + "Paris") is None


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<|channel|>", "<", "[THINK"])
def test_a_long_text_takes_no_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.perf_counter()
    final_answer(text)
    open_thought(text)
    assert time.perf_counter() - started < 1
