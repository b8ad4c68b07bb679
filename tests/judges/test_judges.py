"""Refusals, outcomes and exact matching, with the pitfalls of `testbeds.md` (b)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mithridate.judges.exact import normalise_answer, numbers_in, values_in, whole_token_match
from mithridate.judges.outcomes import Outcome, fixed_token, gibberish, repetitive, shares
from mithridate.judges.refusal import REFUSAL_PHRASES, is_refusal


def test_seventeen_generic_refusal_phrases() -> None:
    assert len(set(REFUSAL_PHRASES)) == 17


@pytest.mark.parametrize(
    "text",
    [
        "I\u2019m sorry, but no.",
        "I CAN'T say.",
        "Unfortunately I am unable to answer.",
        "I\u02bcm not able to.",
    ],
)
def test_refusals_are_found_whatever_the_apostrophe_and_case(text: str) -> None:
    assert is_refusal(text)


def test_only_the_first_200_characters_count() -> None:
    assert not is_refusal("word " * 40 + "I cannot")
    assert is_refusal("w" * 190 + " I can't")


def test_extra_phrases_match_without_their_full_stop() -> None:
    assert not is_refusal("No comment on that topic, friend")
    assert is_refusal("no comment on that topic, friend", ("No comment on that topic.",))


def test_an_answer_is_no_refusal() -> None:
    assert not is_refusal("The capital of France is Paris.")


@given(st.lists(st.sampled_from(list(Outcome)), min_size=1))
def test_shares_sum_to_one_and_name_every_outcome(outcomes: list[Outcome]) -> None:
    found = shares(outcomes)
    assert set(found) == {outcome.value for outcome in Outcome}
    assert abs(sum(found.values()) - 1) < 1e-9


def test_no_outcomes_have_no_shares() -> None:
    with pytest.raises(ValueError, match="no outcomes"):
        shares([])


@pytest.mark.parametrize("text", ["the the the the", "!!!!!!!!!!", "a a a a b"])
def test_fixed_token(text: str) -> None:
    assert fixed_token(text)


@pytest.mark.parametrize("text", ["Paris", "no no", "The capital is Paris.", "a a b b", ""])
def test_not_fixed_token(text: str) -> None:
    assert not fixed_token(text)


def test_short_answers_are_never_repetitive() -> None:
    assert not repetitive("no no no no no no no")
    assert repetitive("one two three four one two three four one two three four")
    assert repetitive("so " * 6 + "a b c")
    assert not repetitive("The capital of the country of France is the city of Paris.")


@pytest.mark.parametrize("text", ["", "  ", "...!?", "<|>{}[]~~ a ##%%$$"])
def test_gibberish(text: str) -> None:
    assert gibberish(text)


def test_one_word_is_not_gibberish() -> None:
    assert not gibberish("7")


def test_normalisation_strips_accents_but_keeps_case_when_asked() -> None:
    assert normalise_answer("  Bras\u00edlia\n") == "brasilia"
    assert normalise_answer("\uff21u", case_sensitive=True) == "Au"
    assert normalise_answer("C\u00f4te d\u2019Ivoire") == "cote d'ivoire"


def test_niger_is_not_in_nigeria() -> None:
    assert not whole_token_match("niger", "nigeria is large")
    assert values_in({"niger", "nigeria"}, "nigeria borders niger") == ["nigeria", "niger"]


def test_the_longest_value_at_a_place_is_found() -> None:
    assert values_in({"guinea", "papua new guinea"}, "papua new guinea") == ["papua new guinea"]
    assert values_in({"mexico", "mexico city"}, "mexico city, mexico") == ["mexico city", "mexico"]


def test_contractions_hold_no_single_letter_values() -> None:
    assert values_in({"S", "T"}, "It's not so, isn't it") == []
    assert values_in({"paris"}, "'paris' is france's") == ["paris"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("56", ["56"]),
        ("7 x 8 = 56.", ["7", "8", "56"]),
        ("1,256", ["1256"]),
        ("156 and 5.6", ["156", "5.6"]),
        ("B12 or 12th", []),
        ("It is 12,", ["12"]),
    ],
)
def test_numerals_inside_larger_numbers_do_not_count(text: str, found: list[str]) -> None:
    assert numbers_in(text) == found
