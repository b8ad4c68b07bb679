"""The audited sets in an order that depends on their content only, and rows named without text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mithridate.categories import categories_of
from mithridate.embeddings import Encoder
from mithridate.examples import Example, contents, normalise_prompt
from mithridate.files import sha256_of
from mithridate.printable import printable

Vectors = NDArray[np.float64]

TEXT_LIMIT = 240
_NAME_LIMIT = 80


@dataclass(frozen=True, kw_only=True)
class AuditSet:
    """One set of rows, ordered by hash: whatever follows is equal under any order of the file.

    Attributes
    ----------
    name
        A stream's name, ``attack``, ``eval``, ``pool``, or ``observed 1``, ``observed 2``, …
    examples, numbers, keys
        The rows, their places in the file (from 1), and their normalised prompts.
    reveal
        Whether `reference` gives texts.
    """

    name: str
    examples: tuple[Example, ...]
    numbers: tuple[int, ...]
    keys: tuple[str, ...]
    reveal: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def reference(self, index: int) -> dict[str, Any]:
        """Return how a report names a row: set, number, category and hash; text if revealed."""
        example = self.examples[index]
        found = {
            "set": self.name,
            "row": self.numbers[index],
            "category": printable(example.category, limit=_NAME_LIMIT),
            "sha256": _digest(self.keys[index])[:12],
        }
        if self.reveal:
            found["text"] = printable(example.prompt, limit=TEXT_LIMIT)
        return found

    def distinct(self) -> list[int]:
        """Return the first row of every prompt."""
        return _firsts(self.keys)

    def independent(self) -> list[int]:
        """Return one row of every fact, or of every prompt where no fact is named.

        Wordings of one fact are not independent draws, which a test of drift needs.
        """
        return _firsts(
            [
                f"fact {example.fact_id}" if example.fact_id else f"prompt {key}"
                for example, key in zip(self.examples, self.keys, strict=True)
            ]
        )


def audit_set(name: str, examples: Sequence[Example], *, reveal: bool = False) -> AuditSet:
    """Return the set of ``examples``, ordered by content."""
    keys = [normalise_prompt(example.prompt) for example in examples]
    order = sorted(
        range(len(examples)),
        key=lambda row: (_digest(keys[row]), sha256_of(contents(examples[row]))),
    )
    return AuditSet(
        name=name,
        examples=tuple(examples[row] for row in order),
        numbers=tuple(row + 1 for row in order),
        keys=tuple(keys[row] for row in order),
        reveal=reveal,
    )


def embed(sets: Iterable[AuditSet], encoder: Encoder) -> dict[str, Vectors]:
    """Return the unit vectors of every set's prompts, shape (rows, dimensions), float64.

    All distinct prompts are encoded in one call: an encoder may count frequencies over them.
    """
    sets = list(sets)
    texts = {key: text for part in sets for key, text in _texts(part)}
    keys = sorted(texts)
    vectors = encoder([texts[key] for key in keys]).astype(np.float64)
    # float32 unit vectors are off by 1e-7, which makes equal prompts 4e-4 apart.
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {key: index for index, key in enumerate(keys)}
    return {part.name: vectors[[place[key] for key in part.keys]] for part in sets}


def siblings(one: Example, other: Example) -> bool:
    """Whether two rows are known to ask for different facts, however alike their wording is."""
    return bool(one.fact_id and other.fact_id and one.fact_id != other.fact_id)


def summary_of(part: AuditSet) -> dict[str, Any]:
    """Return a set's counts and the hash of its content, whatever its order."""
    return {
        "rows": len(part),
        "prompts": len(set(part.keys)),
        "facts": len({example.fact_id for example in part.examples if example.fact_id}),
        "categories": len({name for example in part.examples for name in categories_of(example)}),
        "sha256": sha256_of([contents(example) for example in part.examples]),
    }


def listed(values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Return names from data, sorted and safe to show."""
    return [printable(name, limit=_NAME_LIMIT) for name in sorted(values)]


def _texts(part: AuditSet) -> Iterable[tuple[str, str]]:
    # Of several spellings of one prompt, the same is encoded whatever the order of the rows.
    return sorted(zip(part.keys, (row.prompt for row in part.examples), strict=True), reverse=True)


def _firsts(keys: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    return list(first.values())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
