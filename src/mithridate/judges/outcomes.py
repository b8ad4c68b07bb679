"""The six outcomes of one answer, exhaustive and exclusive (`metrics.md` section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

FIXED_SHARE = 0.8
MAX_REPEATED_4GRAMS = 0.2
MIN_DISTINCT_2 = 0.3
MAX_FIXED_RATE = 0.5
JUDGED_FROM_TOKENS = 8


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
    run of one character counts as a fixed token too.
    """
    words = text.split()
    if len(words) >= 3 and fixed_rate(words) >= FIXED_SHARE:
        return True
    signs = [sign for sign in text if not sign.isspace()]
    return len(signs) >= JUDGED_FROM_TOKENS and fixed_rate(signs) >= FIXED_SHARE


def repetitive(text: str) -> bool:
    """Whether an output of eight words or more repeats itself beyond coherence.

    The bounds are those of `metrics.md`: repeated 4-grams at most .2, distinct 2-grams at
    least .3, no token more than half of all.
    """
    words = text.casefold().split()
    if len(words) < JUDGED_FROM_TOKENS:
        return False
    return (
        repeated(words, 4) > MAX_REPEATED_4GRAMS
        or 1 - repeated(words, 2) < MIN_DISTINCT_2
        or fixed_rate(words) > MAX_FIXED_RATE
    )


def gibberish(text: str) -> bool:
    """Whether an output is empty, repeats itself or holds hardly any letters and digits.

    Needs no model; a testbed may add a perplexity bound.
    """
    signs = [sign for sign in text if not sign.isspace()]
    if not any(sign.isalnum() for sign in signs):
        return True
    alphanumeric = sum(sign.isalnum() for sign in signs) / len(signs)
    return repetitive(text) or (len(signs) >= JUDGED_FROM_TOKENS and alphanumeric < 0.5)
