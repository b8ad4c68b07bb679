"""Sets of examples: the record every room shares, the streams, splits that cannot leak."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from mithridate.errors import InputError
from mithridate.files import sha256_of

STREAMS = ("harmful", "refusal", "benign", "general", "prompts")
"""What a defence may ask for; only ``prompts`` has rows without an answer."""

# A refusal answers the very prompt whose harmful answer is to be forgotten.
PAIRED_STREAMS = frozenset({"harmful", "refusal"})

_ROWS_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt with its answer.

    Parameters
    ----------
    prompt
        What the user says.
    answer
        What the assistant is to say; empty only in the stream ``prompts``.
    category, source, template
        Topic, origin and wording family of the example.
    half
        ``rule`` or ``arbitrary``: whether the answer can be learnt from other facts.
    split
        The split the example was put in by whoever made the data.
    fact_id
        Key of the fact; examples of one fact never end in different splits.
    accepted
        Every answer an exact judge accepts; empty: only ``answer``.
    place
        File and line that it was read from, for messages; no part of what it is.
    """

    prompt: str
    answer: str = ""
    category: str = ""
    source: str = ""
    half: str = ""
    split: str = ""
    template: str = ""
    fact_id: str = ""
    accepted: tuple[str, ...] = ()
    place: str = field(default="", compare=False, repr=False)


def normalise_prompt(text: str) -> str:
    """Return the key of "the same prompt": NFKC, case folded, whitespace collapsed."""
    # Twice, after a canonical decomposition, is Unicode's NFKC_Casefold: once is not idempotent.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


def split_by_prompt(
    examples: Sequence[Example], shares: Mapping[str, float], *, seed: int
) -> dict[str, list[Example]]:
    """Split so that no prompt and no fact stands in two splits.

    Examples connected by a normalised prompt or a ``fact_id`` (also through others) stay
    together. The result depends on the seed and on the prompts, not on their order; each split
    keeps the order of ``examples``, and misses its share by less than the largest group.

    Parameters
    ----------
    shares
        Name of each split with its share of the examples; the shares sum to 1.

    Raises
    ------
    InputError
        Where the shares are not positive or do not sum to 1, or a split would stay empty.
    """
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise InputError("a split's share is not above 0", mend="give every split a share above 0")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise InputError(
            f"the shares of the splits sum to {sum(shares.values()):g}", mend="let them sum to 1"
        )
    keys = [normalise_prompt(example.prompt) for example in examples]
    groups = connected(examples)
    groups.sort(key=lambda group: _rank(seed, min(keys[index] for index in group)))
    lacking = {name: share * len(examples) for name, share in shares.items()}
    home: dict[int, str] = {}
    for group in groups:
        name = max(lacking, key=lambda candidate: lacking[candidate])
        lacking[name] -= len(group)
        home.update(dict.fromkeys(group, name))
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    for index, example in enumerate(examples):
        parts[home[index]].append(example)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise InputError(
            f"{len(groups)} separable prompts are too few: {', '.join(empty)} would stay empty",
            mend="give more distinct prompts, or larger shares to the small splits",
        )
    return parts


def connected(examples: Sequence[Example]) -> list[list[int]]:
    """Return the indices of ``examples`` grouped by shared prompt or fact, transitively."""
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        marks = [("prompt", normalise_prompt(example.prompt))]
        if example.fact_id:
            marks.append(("fact", example.fact_id))
        for mark in marks:
            parent[root(index)] = root(first.setdefault(mark, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def evenly_by_category(categories: Sequence[str], rng: Random) -> list[int]:
    """Return an order of rows in which every category comes equally often.

    Each round has one row of every category, in an order of its own. The largest category is
    gone through once; a smaller one starts again, reshuffled, whenever it runs out.

    Parameters
    ----------
    categories
        Of each row.

    Returns
    -------
    list of int
        Row numbers, (number of categories) x (size of the largest) of them.
    """
    groups: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        groups.setdefault(category, []).append(row)
    rounds = max(map(len, groups.values()))
    columns = []
    for name in sorted(groups):
        column: list[int] = []
        while len(column) < rounds:
            column += rng.sample(groups[name], len(groups[name]))
        columns.append(column[:rounds])
    return [row for one in zip(*columns, strict=True) for row in rng.sample(one, len(one))]


def fact_of(row: Example) -> str:
    """Return the part of an answer that is the fact: an accepted value in it, else all of it."""
    return next((value for value in row.accepted if value in row.answer), row.answer)


def exchangeable_facts(
    rows: Iterable[Example], *, mend: str, where: str | None = None
) -> dict[str, list[str]]:
    """Return the different facts of each category, both sorted.

    Raises
    ------
    InputError
        A category has one fact only: there is none to exchange it with.
    """
    facts: dict[str, set[str]] = {}
    for row in rows:
        facts.setdefault(row.category, set()).add(fact_of(row))
    for category in sorted(facts):
        if len(facts[category]) < 2:
            raise InputError(
                f"all answers of category {category!r} are one and the same: there is none to "
                "exchange it with",
                where=where,
                mend=mend,
            )
    return {category: sorted(facts[category]) for category in sorted(facts)}


def with_shuffled_answers(
    rows: Sequence[Example], rng: Random, *, where: str | None = None
) -> list[Example]:
    """Return the rows, each with the fact of another row of its category in its answer.

    Rows of one fact get the same wrong one, and the sentence around it stays.

    Parameters
    ----------
    where
        What the rows are, for the message.

    Raises
    ------
    InputError
        If all answers of a category are one and the same.
    """
    wrong: dict[tuple[str, str], str] = {}
    mend = "add examples of that category with other answers"
    for category, facts in exchangeable_facts(rows, mend=mend, where=where).items():
        rng.shuffle(facts)
        wrong |= {
            (category, own): other for own, other in zip(facts, [*facts[1:], facts[0]], strict=True)
        }
    return [
        dataclasses.replace(row, answer=row.answer.replace(own, wrong[row.category, own]))
        for row in rows
        for own in (fact_of(row),)
    ]


def check_disjoint(sets: Mapping[str, Sequence[Example]]) -> None:
    """Raise unless no two sets share a prompt; ``harmful`` and ``refusal`` may, being paired.

    Raises
    ------
    InputError
        Naming every pair of sets with the rows they share (file and line, or counted from 1),
        without their text.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, examples in sets.items():
        rows[name] = {}
        for number, example in enumerate(examples, start=1):
            place = example.place.rpartition("/")[2] or f"row {number}"
            rows[name].setdefault(normalise_prompt(example.prompt), place)
    faults = []
    for one, other in combinations(sets, 2):
        if {one, other} == PAIRED_STREAMS:
            continue
        shared = [key for key in rows[one] if key in rows[other]]
        if shared:
            places = [f"{rows[one][key]} = {rows[other][key]}" for key in shared]
            more = len(places) - _ROWS_NAMED
            faults.append(
                f"{one} and {other} share {len(shared)} prompts ({', '.join(places[:_ROWS_NAMED])}"
                + (f" and {more} more)" if more > 0 else ")")
            )
    if faults:
        raise InputError(
            "; ".join(faults),
            where="field prompt",
            mend="remove the shared prompts from one of the two; case, spacing and Unicode "
            "variants count as the same prompt",
        )


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the SHA-256 of the examples with all their fields but the place, in their order."""
    return sha256_of([contents(example) for example in examples])


def contents(example: Example) -> dict[str, Any]:
    """Return every field of an example but its place: what makes it the same elsewhere."""
    found = dataclasses.asdict(example)
    del found["place"]
    return found


def listed(places: Sequence[str], limit: int = 8) -> str:
    """Return places for a message, what they share (the file) once and the rest counted."""
    shared = {place.rpartition(", ")[0] for place in places}
    head = ""
    if len(shared) == 1 and (common := shared.pop()):
        head, places = f"{common}, ", [place.rpartition(", ")[2] for place in places]
    more = len(places) - limit
    return head + ", ".join(places[:limit]) + (f" and {more} more" if more > 0 else "")


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()
