"""Finding known values in an output, exactly."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import regex

UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in (
        "Han", "Hiragana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan",
        "Tai_Tham", "Tai_Le", "New_Tai_Lue", "Javanese", "Balinese",
    )
)  # fmt: skip
"""Scripts that set no spaces between words, as members of a character class of `regex`."""

_KATAKANA, _HANGUL = r"\p{Katakana}ー", r"\p{Hangul}"
# What runs on in one word: letters, marks and numerals of the scripts that set spaces.
_SPACED = rf"[[\w\p{{N}}]--[{UNSPACED}{_KATAKANA}{_HANGUL}]]"
# Korean and Semitic words take these without a space; other endings make another word.
_PARTICLE = (
    "이에요|예요|에요|입니다|이었다|였다|이었습니다|였습니다|이란|이라고|이라는|라고|라는|이라|이다|"
    "이며|이고|이지만|이자|이죠|이나|이랑|인데|에서|에게|까지|부터|보다|처럼|으로|시|이|가|은|는|을|를|"
    "의|에|로|와|과|도|만|란|라|다|며|고|죠|나|랑|임|인|일"
)
_PREFIX = {"Arabic": "[وف]?[بكل]?(?:ال)?", "Hebrew": "[ושמהבלכ]{1,2}"}
_LONG_ENOUGH_FOR_PREFIX = 3
# Numerals go on with these: 12 is not in 12.5, 12:30, 12/25, 12^3, 12万 or 12 million.
_NOT_AFTER_NUMERAL = (
    r"(?!\.(?!0+(?!\d))\d)(?![,:/\u2044^']\d|\^| \d+\u2044)(?![十百千万萬亿億兆십백천만억조])"
    r"(?! ?(?:hundred|thousand|million|billion|trillion|lakh|crore)s?\b)"
)
_NOT_BEFORE_NUMERAL = r"(?<!\d[.,:/\u2044^'])(?<!(?:^|[\s(=:$€£])[-.])"

_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])(?!,\d)")
_SIGNS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4\u2032`", "'") | dict.fromkeys("\u2010\u2212", "-")
)
_RAISED = re.compile("(?<=\\w)[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_FRACTION = re.compile("(?<=\\d)[\u00bc-\u00be\u2150-\u215e]")
_UNSEEN = regex.compile(r"[\p{Cf}\p{Variation_Selector}\u0640]+")
_ACCENTED = regex.compile(
    r"([\p{Latin}\p{Greek}\p{Arabic}\p{Hebrew}\p{Syriac}])\p{M}+|(\p{Cyrillic})[\u0300\u0301\u0308]+"
)
_DIGIT = regex.compile(r"[\p{Nd}--[0-9]]", regex.V1)
_THIN_SPACE = re.compile("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))")
_THOUSANDS = re.compile(
    r"(?<![\d.,'])(?<!\d )\d{1,3}(?:(?:,\d{2,3})*,\d{3}|(?:'\d{3})+|(?: \d{3})+)"
    r"(?![\d']|,\d| \d{3}\b)"
)


def normalise_answer(text: str, *, case_sensitive: bool = False) -> str:
    """Return ``text`` as it is compared: in NFKC, with plain apostrophes and single spaces.

    Accents go where they are accents (Latin, Greek, Arabic and Hebrew points, the stress of
    Cyrillic); marks that make another letter stay, as in kana, Thai and Devanagari. Numerals are
    plain digits without thousands separators. Casefolded unless ``case_sensitive`` (element
    symbols).
    """
    text = _RAISED.sub(lambda found: "^" + found[0], text.translate(_SIGNS))
    text = _THIN_SPACE.sub("", _FRACTION.sub(r" \g<0>", text))
    text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    if not case_sensitive:
        text = text.casefold().replace("\u0131", "i")
    text = _ACCENTED.sub(r"\1\2", unicodedata.normalize("NFKD", text))
    text = _DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), text)
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return _THOUSANDS.sub(lambda found: re.sub("[,' ]", "", found[0]), text)


def whole_token_match(value: str, text: str) -> bool:
    """Whether ``value`` stands in ``text`` as a whole token: Niger is not in Nigeria."""
    return bool(values_in((value,), text))


def numbers_in(text: str) -> list[str]:
    """Return the whole numbers in ``text``, without thousands separators, in order.

    A numeral inside a larger number, a decimal or a word is not a number of its own.
    """
    return [found.replace(",", "") for found in _NUMBER.findall(text)]


def values_in(lexicon: Iterable[str], text: str) -> list[str]:
    """Return the values of ``lexicon`` found in ``text`` as whole tokens, in order.

    Where two values start at one place the longer is found (New York City before New York). In
    scripts without spaces a value may stand beside any letter, so that part of a longer word is
    found unless that word is a value too. Both sides must be normalised alike.
    """
    present = frozenset(value for value in lexicon if value and value in text)
    return [found["value"] for found in _pattern(present).finditer(text)] if present else []


@lru_cache(maxsize=256)
def _pattern(values: frozenset[str]) -> regex.Pattern[str]:
    longest_first = sorted(values, key=lambda value: (-len(value), value))
    return regex.compile("|".join(map(_whole, longest_first)), regex.V1)


def _whole(value: str) -> str:
    """Return a pattern of ``value`` as a whole token, by the scripts of its first and last sign."""
    escaped = f"(?P<value>{regex.escape(value, special_only=True)})"
    if len(value) == 1 and _is(UNSPACED, value):
        # One sign is part of most words that it stands in.
        return rf"(?:(?<!\w)|(?<=(?<!不)[是为為は])){escaped}(?=です|だ|$|\W)"
    return _left(value) + escaped + _right(value[-1])


def _left(value: str) -> str:
    first = value[0]
    if _is(UNSPACED, first):
        return ""
    for script in (_KATAKANA, _HANGUL):
        if _is(script, first):
            return f"(?<![{script}])"
    begins = rf"(?<!{_SPACED})(?<!{_SPACED}')"
    if first.isdigit():
        return begins + _NOT_BEFORE_NUMERAL
    if len(value) >= _LONG_ENOUGH_FOR_PREFIX:
        for script, prefix in _PREFIX.items():
            if _is(rf"\p{{{script}}}", first):
                return f"{begins}(?:{prefix})?"
    return begins


def _right(last: str) -> str:
    if _is(UNSPACED, last):
        return r"(?!\p{M})"
    if _is(_KATAKANA, last):
        return f"(?![{_KATAKANA}])"
    if _is(_HANGUL, last):
        return f"(?=(?:{_PARTICLE}){{0,2}}(?![{_HANGUL}]))"
    return f"(?!{_SPACED})" + (_NOT_AFTER_NUMERAL if last.isdigit() else "")


def _is(script: str, sign: str) -> bool:
    return regex.match(f"[{script}]", sign) is not None
