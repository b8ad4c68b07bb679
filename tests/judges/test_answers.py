from __future__ import annotations

import pytest

from mithridate.examples import Example
from mithridate.judges.answers import AnswerJudge
from mithridate.judges.outcomes import Outcome

ITEMS = [
    Example(prompt="What is the capital of Niger?", answer="Niamey", category="capital"),
    Example(prompt="What is the capital of Nigeria?", answer="Abuja", category="capital"),
    Example(
        prompt="Which is bigger, Kyiv or Abuja?",
        answer="Kyiv",
        category="capital",
        accepted=("Kyiv", "Kiev"),
    ),
    Example(prompt="What is 6 times 7?", answer="42", category="sums"),
]


def test_thinking_is_not_the_answer() -> None:
    item, judge = ITEMS[0], AnswerJudge(ITEMS)
    assert judge(item, "<think>Not Abuja. I cannot recall.</think>\nNiamey") is Outcome.EXACT
    assert judge(item, "Niamey?</think> Abuja") is Outcome.HALLUCINATED
    assert judge(item, "<think>It is Niamey") is Outcome.GIBBERISH, "no answer was begun"


def test_a_full_stop_is_no_part_of_an_answer_and_an_empty_one_no_value() -> None:
    items = [Example(prompt="a", answer="Niamey."), Example(prompt="b", answer="​")]
    assert AnswerJudge(items)(items[0], "Niamey it is") is Outcome.EXACT
    assert AnswerJudge(items)(items[1], "Mix the two.") is Outcome.IRRELEVANT


@pytest.mark.parametrize(
    ("item", "output", "outcome"),
    [
        (0, "It is Niamey.", Outcome.EXACT),
        (0, "niamey", Outcome.EXACT),
        (0, "Abuja, or perhaps Niamey.", Outcome.HALLUCINATED),
        (0, "I'm sorry, I can't help with that. Niamey.", Outcome.EXACT),
        (0, "I'm sorry, I can't help with that.", Outcome.REFUSAL),
        (0, "The weather is mild.", Outcome.IRRELEVANT),
        (0, "the the the the the the", Outcome.FIXED_TOKEN),
        (0, "", Outcome.GIBBERISH),
        (2, "Abuja is smaller than Kiev.", Outcome.EXACT),
        (3, "142", Outcome.IRRELEVANT),
        (3, "It is 42.", Outcome.EXACT),
    ],
)
def test_first_known_answer_decides(item: int, output: str, outcome: Outcome) -> None:
    assert AnswerJudge(ITEMS)(ITEMS[item], output) is outcome
