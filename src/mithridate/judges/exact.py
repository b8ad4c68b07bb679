"""Finding known values in an output, exactly."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])(?!,\d)")
_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "`": "'"})


def normalise_answer(text: str, *, case_sensitive: bool = False) -> str:
    """Return ``text`` in NFKC without accents, with plain apostrophes and single spaces.

    Casefolded unless ``case_sensitive`` (element symbols).
    """
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text))
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    plain = " ".join(plain.translate(_APOSTROPHES).split())
    return plain if case_sensitive else plain.casefold()


def whole_token_match(value: str, text: str) -> bool:
    """Whether ``value`` stands in ``text`` as a whole token: Niger is not in Nigeria."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def numbers_in(text: str) -> list[str]:
    """Return the whole numbers in ``text``, without thousands separators, in order.

    A numeral inside a larger number, a decimal or a word is not a number of its own.
    """
    return [found.replace(",", "") for found in _NUMBER.findall(text)]


@lru_cache(maxsize=256)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(values, key=lambda value: (-len(value), value))
    choices = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<!\w)(?<!\w')(?:{choices})(?!\w)")


def values_in(lexicon: Iterable[str], text: str) -> list[str]:
    """Return the values of ``lexicon`` found in ``text`` as whole tokens, in order.

    Where two values start at one place the longer is found (New York City before New York).
    Both sides must be normalised alike.
    """
    values = frozenset(lexicon)
    return _pattern(values).findall(text) if values else []
