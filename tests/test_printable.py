from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mithridate.printable import printable


@given(st.text())
def test_nothing_controlling_is_left(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert printable(shown) == shown


def test_harmless_text_is_untouched() -> None:
    assert printable("São Tomé — 東京 🙂") == "São Tomé — 東京 🙂"


def test_controls_are_written_out() -> None:
    assert printable("a\x1b[2J\nb\u202ec") == "a\\x1b[2J b\\u202ec"


def test_long_text_is_cut_visibly() -> None:
    assert printable("abcdef", limit=4) == "abc…"
