"""The six outcomes of one answer, exhaustive and exclusive (`metrics.md` section 2)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

import regex

from mithridate.judges.exact import UNSPACED

FIXED_SHARE = 0.8
MAX_REPEATED_4GRAMS = 0.2
MIN_DISTINCT_2 = 0.3
MAX_FIXED_RATE = 0.5
JUDGED_FROM_TOKENS = 8

_UNSPACED = regex.compile(rf"[{UNSPACED}\p{{Katakana}}ー]")
_IDEOGRAPHIC = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー]")
# How many signs make up about a word, where no space says it.
_SIGNS_PER_IDEOGRAPHIC_WORD, _SIGNS_PER_ALPHABETIC_WORD = 2, 4
_LONGEST_UNIT = 24  # signs of a phrase that is said over and over


class Outcome(StrEnum):
    """What an output is; the first that applies, in this order."""

    EXACT = "exact"
    REFUSAL = "refusal"
    FIXED_TOKEN = "fixed_token"
    GIBBERISH = "gibberish"
    IRRELEVANT = "irrelevant"
    HALLUCINATED = "hallucinated"


def shares(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Return the share of every outcome, absent ones included; they sum to 1.

    Raises
    ------
    ValueError
        If there are no outcomes: an empty evaluation has no shares.
    """
    counts = Counter(outcomes)
    total = counts.total()
    if not total:
        raise ValueError("no outcomes to take shares of")
    return {outcome.value: counts[outcome] / total for outcome in Outcome}


def fixed_rate(tokens: list[str]) -> float:
    """Return the share of the commonest token; 0 for an empty output."""
    return max(Counter(tokens).values()) / len(tokens) if tokens else 0.0


def repeated(tokens: list[str], n: int) -> float:
    """Return 1 - unique n-grams / n-grams; 0 where there are none."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def fixed_token(text: str) -> bool:
    """Whether one token makes up at least 80 % of an output of three tokens or more.

    Tokens are words, else runs of one punctuation mark are counted sign by sign; an unbroken
    run of one character counts as a fixed token too. In scripts without spaces so does a few
    signs' repetition, three times or more on end.
    """
    words = text.split()
    if len(words) >= 3 and fixed_rate(words) >= FIXED_SHARE:
        return True
    signs = _signs(text)
    if len(signs) >= JUDGED_FROM_TOKENS and fixed_rate(signs) >= FIXED_SHARE:
        return True
    return _without_spaces(signs) and _longest_loop(signs) >= FIXED_SHARE * len(signs)


def repetitive(text: str) -> bool:
    """Whether an output of eight words or more repeats itself beyond coherence.

    The bounds are those of `metrics.md`: repeated 4-grams at most .2, distinct 2-grams at
    least .3, no token more than half of all. Where no spaces divide words, a word is two signs
    of Chinese or Japanese and four of an alphabet.
    """
    tokens, per_word = text.casefold().split(), 1
    signs = _signs(text)
    if _without_spaces(signs):
        ideographic = sum(_IDEOGRAPHIC.match(sign) is not None for sign in signs) * 2 >= len(signs)
        per_word = _SIGNS_PER_IDEOGRAPHIC_WORD if ideographic else _SIGNS_PER_ALPHABETIC_WORD
        tokens = signs
    if len(tokens) < JUDGED_FROM_TOKENS * per_word:
        return False
    return (
        repeated(tokens, 4 * per_word) > MAX_REPEATED_4GRAMS
        or 1 - repeated(tokens, 2 * per_word) < MIN_DISTINCT_2
        or fixed_rate(tokens) > MAX_FIXED_RATE
    )


def gibberish(text: str) -> bool:
    """Whether an output is empty, repeats itself or holds hardly any letters and digits.

    Needs no model; a testbed may add a perplexity bound.
    """
    signs = _signs(text)
    if not any(sign.isalnum() for sign in signs):
        return True
    alphanumeric = sum(sign.isalnum() for sign in signs) / len(signs)
    return repetitive(text) or (len(signs) >= JUDGED_FROM_TOKENS and alphanumeric < 0.5)


def _signs(text: str) -> list[str]:
    """Return the characters but spaces and marks: a vowel sign is part of its letter."""
    return [
        sign
        for sign in unicodedata.normalize("NFC", text)
        if not sign.isspace() and unicodedata.category(sign)[0] != "M"
    ]


def _without_spaces(signs: list[str]) -> bool:
    """Whether most letters and digits are of scripts that set no spaces between words."""
    letters = [sign for sign in signs if sign.isalnum()]
    unspaced = sum(_UNSPACED.match(sign) is not None for sign in letters)
    return unspaced > 0 and unspaced * 2 >= len(letters)


def _longest_loop(signs: list[str]) -> int:
    """Return the length of the longest run that says one unit three times or more."""
    longest = 0
    for unit in range(1, _LONGEST_UNIT + 1):
        alike = 0
        for sign, before in zip(signs[unit:], signs, strict=False):
            alike = alike + 1 if sign == before else 0
            if alike >= 2 * unit:
                longest = max(longest, alike + unit)
    return longest
