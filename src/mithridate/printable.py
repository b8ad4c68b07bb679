"""Text from models and data, made safe to show: a terminal or a page never obeys it."""

from __future__ import annotations

import reprlib
import unicodedata
from typing import Any

# Control (Cc), formatting such as bidirectional overrides (Cf), lone surrogates (Cs), and the
# separators that some viewers take for a new line (Zl, Zp).
_DANGEROUS = {"Cc", "Cf", "Cs", "Zl", "Zp"}

_QUOTED = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _QUOTED


def printable(text: str, *, limit: int | None = None) -> str:
    r"""Return ``text`` with every invisible or controlling character written out.

    Line feeds and tabs become spaces, other controls their code point: ``"\x1b[2J"`` becomes
    ``"\\x1b[2J"``, and a right-to-left override ``"\\u202e"``.

    Parameters
    ----------
    limit
        Longest result in characters; a cut is marked by ``…``.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(_shown(character) for character in text)


def quoted(value: Any) -> str:
    """Return a value for a message: at most 200 characters of it, however large it is."""
    return printable(_SHORT.repr(value), limit=_QUOTED)


def _shown(character: str) -> str:
    if character in "\n\t\r":
        return " "
    if unicodedata.category(character) not in _DANGEROUS:
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
