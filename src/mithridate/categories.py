"""Holding categories out without a leak, where a row may have several categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mithridate.errors import InputError
from mithridate.examples import Example, connected


@dataclass(frozen=True, kw_only=True)
class CategorySplit:
    """Two sides that share no category, no prompt and no fact.

    Attributes
    ----------
    kept, held_out
        The rows whose prompts belong to one side wholly, in their order.
    dropped
        Rows of prompts that belong to both.
    bridges
        How often a held-out and a kept category stand together: each pair's number of prompts.
    """

    kept: list[Example]
    held_out: list[Example]
    dropped: list[Example]
    bridges: dict[tuple[str, str], int] = field(default_factory=dict)


def categories_of(example: Example) -> tuple[str, ...]:
    """Return the categories of a row; `Example.category` names several with commas between."""
    return tuple(part for name in example.category.split(",") if (part := name.strip()))


def category_groups(examples: Sequence[Example]) -> list[list[str]]:
    """Return the connected components of categories that stand together at a prompt or a fact.

    Whole groups can be held out with nothing dropped.
    """
    groups: dict[str, set[str]] = {}
    for together in connected(examples):
        names = {name for row in together for name in categories_of(examples[row])}
        merged = set(names).union(*(groups.get(name, set()) for name in names))
        groups.update(dict.fromkeys(merged, merged))
    distinct = {min(group): group for group in groups.values()}
    return [sorted(distinct[first]) for first in sorted(distinct)]


def split_by_category(examples: Sequence[Example], held_out: Collection[str]) -> CategorySplit:
    """Split so that nothing of a held-out category can be learnt from the rows that are kept.

    A prompt counts with the categories of all its rows (published sets answer one prompt several
    times, each answer with its own labels), and with those of rows of the same fact. If some of
    these are held out and some not, its rows are dropped from both sides: filing a row under one of
    its labels would leak the others.

    Parameters
    ----------
    held_out
        Names of categories.

    Raises
    ------
    InputError
        A row without a category, a name that no row has, or a side that stays empty.
    """
    known = {name for example in examples for name in categories_of(example)}
    bare = sum(not categories_of(example) for example in examples)
    if bare:
        raise InputError(
            f"{bare} of {len(examples)} rows have no category, so they fit neither side",
            mend="remove them or give them one",
        )
    unknown = sorted(set(held_out) - known)
    if unknown or not held_out:
        raise InputError(
            f"no row has the category {', '.join(unknown)}" if unknown else "nothing is held out",
            mend=f"hold out some of: {', '.join(sorted(known))}",
        )
    sides: dict[int, str] = {}
    bridges: Counter[tuple[str, str]] = Counter()
    for together in connected(examples):
        names = {name for row in together for name in categories_of(examples[row])}
        out, kept = sorted(names & set(held_out)), sorted(names - set(held_out))
        side = "dropped" if out and kept else "held_out" if out else "kept"
        sides.update(dict.fromkeys(together, side))
        bridges.update((one, other) for one in out for other in kept)
    parts: dict[str, list[Example]] = {"kept": [], "held_out": [], "dropped": []}
    for row, example in enumerate(examples):
        parts[sides[row]].append(example)
    if not parts["kept"] or not parts["held_out"]:
        raise InputError(
            f"holding out {', '.join(sorted(held_out))} leaves {len(parts['kept'])} rows, and "
            f"{len(parts['held_out'])} held out ({len(parts['dropped'])} belong to both)",
            mend="hold out whole groups of categories that stand together: "
            + "; ".join(" + ".join(group) for group in category_groups(examples)[:10]),
        )
    return CategorySplit(**parts, bridges=dict(bridges.most_common()))
