"""The claims themselves: `claims.yaml`, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import yaml

from mithridate.configs import from_mapping, require

TAGS = {
    "B": "stated by the project's brief",
    "N": "tutorial notes on the papers, second-hand",
    "R": "read in released or third-party code",
    "P": "a paper's abstract or public page",
}
"""Where a published figure was read. No paper was read in full."""

KINDS = {
    "S": "structural: a small model can refute it",
    "R": "ratio: the local value stands beside the published one",
    "V": "value: comparable with the published model, data and judge only",
}

Bound = float | list[float]
Place = Callable[[float, float, Any], bool]

CONDITIONS: dict[str, tuple[Place, str]] = {
    "above": (lambda low, _, x: low > x, "above {}"),
    "below": (lambda _, high, x: high < x, "below {}"),
    "at_least": (lambda low, _, x: low >= x, "{} or more"),
    "at_most": (lambda _, high, x: high <= x, "{} or less"),
    "inside": (lambda low, high, x: x[0] <= low and high <= x[1], "within {} to {}"),
    "outside": (lambda low, high, x: high < x[0] or low > x[1], "outside {} to {}"),
    "excludes": (lambda low, high, x: not low <= x <= high, "not {}"),
}
"""Where an interval may lie, and the words for it."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A place for an interval.

    Attributes
    ----------
    name
        A key of `CONDITIONS`.
    bound
        What it is compared with.
    """

    name: str
    bound: Bound

    def holds(self, low: float, high: float) -> bool:
        """Whether the interval lies there."""
        return CONDITIONS[self.name][0](low, high, self.bound)

    def __str__(self) -> str:
        bounds = self.bound if isinstance(self.bound, list) else [self.bound]
        if self.name == "inside" and bounds[0] == bounds[1]:
            return f"exactly {bounds[0]:g}"
        return CONDITIONS[self.name][1].format(*(f"{bound:g}" for bound in bounds))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What follows from one quantity; the refutation is asked for first.

    Attributes
    ----------
    of
        Name of the quantity; other quantities of the claim stand beside it.
    refuted
        Of any measured subject.
    reproduced
        Of every measured subject; None: no measurement here could.
    """

    of: str
    refuted: Condition
    reproduced: Condition | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure.

    Parameters
    ----------
    figure
        As it was stated.
    tag
        Key of `TAGS`.
    setting
        Model, data and judge behind it, as far as they are known.
    """

    figure: str
    tag: str
    setting: str = ""

    def __post_init__(self) -> None:
        require(self.tag in TAGS, f"{self.tag!r} is no source that may be quoted",
                f"use one of {', '.join(TAGS)}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, and the rule that judges it.

    Attributes
    ----------
    published
        Empty where no figure was.
    refuted_if
        The rule's refutation in words.
    rules
        Empty for values, which no model of ours can refute. With several, one that refutes is
        enough and all must reproduce.
    measured_by
        Command that measures it, with ``{testbed}``; empty where `make claims` does itself.
    note
        What belongs beside the figures.
    """

    id: str
    kind: Literal["S", "R", "V"]
    statement: str
    published: tuple[Published, ...]
    refuted_if: str
    rules: tuple[Rule, ...]
    measured_by: str
    note: str


@dataclass(frozen=True, kw_only=True)
class _Entry:
    kind: Literal["S", "R", "V"]
    statement: str
    refuted_if: str
    published: list[dict[str, Any]] | None = None
    rules: list[dict[str, Any]] | None = None
    measured_by: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _RuleEntry:
    of: str
    refuted: dict[str, float | list[float]]
    reproduced: dict[str, float | list[float]] | None = None


def read_claims(text: str | None = None) -> list[Claim]:
    """Return the claims in the file's order.

    Parameters
    ----------
    text
        YAML in place of the file shipped.

    Raises
    ------
    InputError
        An unknown key, source or condition; a value with a rule, or another claim without one.
    """
    if text is None:
        text = files("published").joinpath("claims.yaml").read_text(encoding="utf-8")
    return [_claim(name, entry) for name, entry in yaml.safe_load(text).items()]


def _claim(name: str, values: Mapping[str, Any]) -> Claim:
    where = f"claims.yaml: {name}"
    entry = from_mapping(_Entry, values, where=where)
    require(
        (entry.kind == "V") != bool(entry.rules),
        f"{where}: a claim of kind {entry.kind} {'has' if entry.rules else 'lacks'} rules",
        "values have none, because no small model refutes them; all others need one",
    )
    return Claim(
        id=name,
        kind=entry.kind,
        statement=entry.statement,
        published=tuple(from_mapping(Published, one, where=where) for one in entry.published or ()),
        refuted_if=entry.refuted_if,
        rules=tuple(_rule(one, where) for one in entry.rules or ()),
        measured_by=entry.measured_by,
        note=entry.note,
    )


def _rule(values: Mapping[str, Any], where: str) -> Rule:
    entry = from_mapping(_RuleEntry, values, where=f"{where}: rules")
    return Rule(
        of=entry.of,
        refuted=_condition(entry.refuted, where),
        reproduced=None if entry.reproduced is None else _condition(entry.reproduced, where),
    )


def _condition(values: Mapping[str, Bound], where: str) -> Condition:
    require(
        len(values) == 1 and set(values) <= set(CONDITIONS),
        f"{where}: {dict(values)} is not one condition",
        f"use one of {', '.join(CONDITIONS)}",
    )
    ((name, bound),) = values.items()
    require(
        isinstance(bound, list) == (name in ("inside", "outside")),
        f"{where}: {name} {bound}",
        "inside and outside take [low, high], the others a number",
    )
    return Condition(name=name, bound=bound)
