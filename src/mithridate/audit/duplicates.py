"""Rows that stand in two sets, or twice in one: exactly, by fact, nearly, by a run of words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mithridate.audit.sets import AuditSet, Vectors, siblings
from mithridate.examples import PAIRED_STREAMS, Example, normalise_prompt

CHARACTERS = 5
"""Of a shingle for the Jaccard similarity."""

BOILERPLATE = 10
"""A run of words in more texts than this says nothing (Brown et al. 2020, appendix C)."""

BANDS, ROWS = 25, 5
"""Of the hash table: a pair at Jaccard .8 is missed once in 20,000 times."""

_NAMED = 20
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """From where on two texts count as alike.

    Attributes
    ----------
    jaccard, cosine
        Of the prompts' character shingles, and of their embeddings.
    words
        Length of a run of words in common.
    """

    jaccard: float
    cosine: float
    words: int


Matches = dict[int, int]
"""Row of the second set -> the first row of the first set that it matches."""


def near_texts(texts: Sequence[str], *, jaccard: float) -> dict[int, list[int]]:
    """Return, for each text, the others whose shingles have at least this Jaccard similarity.

    MinHash finds candidates (Broder 1997), the shingles themselves decide: no pair is reported
    that is not alike.

    Parameters
    ----------
    texts
        Distinct and normalised.
    """
    from datasketch import MinHash, MinHashLSH

    shingles = [_shingles(text) for text in texts]
    table = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    found: dict[int, list[int]] = defaultdict(list)
    sketches = MinHash.generator(
        ([shingle.encode("utf-8") for shingle in part] for part in shingles),
        num_perm=BANDS * ROWS,
    )
    for index, sketch in enumerate(sketches):
        for other in sorted(table.query(sketch)):
            common = len(shingles[index] & shingles[other])
            if common >= jaccard * (len(shingles[index]) + len(shingles[other]) - common):
                found[index].append(other)
                found[other].append(index)
        table.insert(index, sketch)
    return dict(found)


class Overlaps:
    """Every comparison of the sets, over one index of their texts.

    Parameters
    ----------
    sets
        All sets; of a pair, the later one's rows are counted.
    vectors
        Unit vectors of each set's prompts, as `sets.embed` gives them.
    """

    def __init__(
        self, sets: Sequence[AuditSet], vectors: Mapping[str, Vectors], bounds: Bounds
    ) -> None:
        self.sets = sets
        self.vectors = vectors
        self.bounds = bounds
        texts = sorted({key for part in sets for key in part.keys})
        near = near_texts(texts, jaccard=bounds.jaccard)
        self._near = {texts[one]: [texts[other] for other in near[one]] for one in near}
        self._runs = {part.name: [self._runs_of(row) for row in part.examples] for part in sets}
        bearers: dict[int, set[str]] = defaultdict(set)
        for part in sets:
            for key, runs in zip(part.keys, self._runs[part.name], strict=True):
                for run in runs:
                    bearers[run].add(key)
        self._boilerplate = {run for run, keys in bearers.items() if len(keys) > BOILERPLATE}
        facts = sorted({row.fact_id for part in sets for row in part.examples if row.fact_id})
        number = {fact: index for index, fact in enumerate(facts)}
        self._facts = {
            part.name: np.array([number.get(row.fact_id, -1) for row in part.examples])
            for part in sets
        }

    def between(self) -> list[dict[str, Any]]:
        """Return what each pair of sets shares.

        ``harmful`` and ``refusal`` are paired by prompt by design: only their answers are
        compared, as ``answers``.
        """
        found = []
        for one, other in combinations(self.sets, 2):
            entry: dict[str, Any] = {"a": one.name, "b": other.name}
            if {one.name, other.name} == PAIRED_STREAMS:
                kinds = {"answers": _same(one, other, lambda row: normalise_prompt(row.answer))}
            else:
                kinds = {
                    "exact": _same(one, other, lambda row: normalise_prompt(row.prompt)),
                    "fact": _same(one, other, lambda row: row.fact_id),
                    "near": self._alike(one, other),
                    "words": self._common_runs(one, other),
                    "cosine": self._close(one, other),
                }
            for kind, matches in kinds.items():
                entry[kind] = {
                    "rows": len(matches),
                    "examples": [
                        {"a": one.reference(first), "b": other.reference(row)}
                        for row, first in list(matches.items())[:_NAMED]
                    ],
                }
            found.append(entry)
        return found

    def within(self) -> dict[str, Any]:
        """Return what repeats inside each set.

        ``across_splits`` counts rows with an equal or nearly equal prompt in another split of
        their own set: a split by row number leaks them.
        """
        found = {}
        for part in self.sets:
            answers = {
                (key, normalise_prompt(row.answer))
                for key, row in zip(part.keys, part.examples, strict=True)
            }
            splits: dict[str, set[str]] = defaultdict(set)
            for key, row in zip(part.keys, part.examples, strict=True):
                splits[key].add(row.split)
            at: dict[str, list[int]] = _places(part.keys)
            alike = across = 0
            for index, row in enumerate(part.examples):
                neighbours = [
                    other
                    for text in self._near.get(part.keys[index], ())
                    for other in at.get(text, ())
                    if not siblings(row, part.examples[other])
                ]
                alike += bool(neighbours)
                others = splits[part.keys[index]].union(
                    *(splits[part.keys[other]] for other in neighbours)
                )
                across += bool(row.split) and bool(others - {row.split, ""})
            found[part.name] = {
                "repeated_prompts": len(part) - len(set(part.keys)),
                "repeated_rows": len(part) - len(answers),
                "near": alike,
                "across_splits": across,
            }
        return found

    def _runs_of(self, row: Example) -> set[int]:
        words = normalise_prompt(f"{row.prompt} {row.answer}").split()
        size = self.bounds.words
        return {hash(tuple(words[start : start + size])) for start in range(len(words) - size + 1)}

    def _alike(self, one: AuditSet, other: AuditSet) -> Matches:
        at = _places(one.keys)
        matches: Matches = {}
        for index, key in enumerate(other.keys):
            for text in self._near.get(key, ()):
                row = _first_stranger(at.get(text, ()), one, other.examples[index])
                if row is not None:
                    matches.setdefault(index, row)
        return matches

    def _common_runs(self, one: AuditSet, other: AuditSet) -> Matches:
        bearers: dict[int, list[int]] = defaultdict(list)
        for index, runs in enumerate(self._runs[one.name]):
            for run in runs - self._boilerplate:
                bearers[run].append(index)
        matches: Matches = {}
        for index, runs in enumerate(self._runs[other.name]):
            rows = sorted({row for run in runs for row in bearers.get(run, ())})
            row = _first_stranger(rows, one, other.examples[index])
            if row is not None:
                matches[index] = row
        return matches

    def _close(self, one: AuditSet, other: AuditSet) -> Matches:
        first, second = self.vectors[one.name], self.vectors[other.name]
        known, asked = self._facts[one.name], self._facts[other.name]
        same = set(one.keys)
        matches: Matches = {}
        for start in range(0, len(other), _CHUNK):
            cosines = second[start : start + _CHUNK] @ first.T
            facts = asked[start : start + _CHUNK, None]
            cosines[(facts >= 0) & (known >= 0) & (facts != known)] = -1.0
            best = cosines.argmax(axis=1)
            for index in np.flatnonzero(cosines.max(axis=1) >= self.bounds.cosine).tolist():
                if other.keys[start + index] not in same:
                    matches[start + index] = int(best[index])
        return matches


def _same(one: AuditSet, other: AuditSet, mark: Any) -> Matches:
    first: dict[str, int] = {}
    for index, row in enumerate(one.examples):
        if name := mark(row):
            first.setdefault(name, index)
    marks = [mark(row) for row in other.examples]
    return {index: first[name] for index, name in enumerate(marks) if name in first}


def _first_stranger(rows: Iterable[int], one: AuditSet, row: Example) -> int | None:
    """Return the first of ``rows`` not known to ask for another fact than ``row``."""
    return next((index for index in rows if not siblings(one.examples[index], row)), None)


def _places(keys: Sequence[str]) -> dict[str, list[int]]:
    at: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        at[key].append(index)
    return at


def _shingles(text: str) -> set[str]:
    return {text[start : start + CHARACTERS] for start in range(max(1, len(text) - CHARACTERS + 1))}
