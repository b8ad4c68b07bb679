"""Rows whose label is likely wrong: by category, by answer, by distance; and private data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mithridate.audit.coverage import nearest, neighbour_distances
from mithridate.audit.sets import AuditSet, Vectors, listed
from mithridate.categories import categories_of
from mithridate.judges.refusal import is_refusal

FOLDS = 5
ENOUGH = 10
"""Rows a category needs for its errors to be looked for."""

NEIGHBOURS = 5
FAR = 3.0
"""Interquartile ranges above the third quartile from where on a row is an outlier."""

_NAMED = 20

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"

PRIVATE = {
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "telephone number": re.compile(r"(?<![\w.])\+\d[\d ()/-]{7,16}\d(?!\w)"),
    "payment card": re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)"),
    "IBAN": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
    "network address": re.compile(rf"(?<![\d.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\.?\d)"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "access token": re.compile(
        r"\b(?:AKIA[0-9A-Z]{16}|gh[opsu]_\w{36}|hf_\w{30,}|sk-[\w-]{20,}|xox[abps]-[\w-]{10,})"
    ),
}


def mislabelled(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Return (row, likely label) of rows that confident learning takes out, worst first.

    A row is counted for the likeliest label among those it reaches the threshold of, where a
    label's threshold is the mean probability of it over its own rows (Northcutt et al. 2021,
    equation 1); it is an error if that label is not the one given.

    Parameters
    ----------
    probabilities
        Out-of-sample, shape (rows, labels).
    labels
        Given, shape (rows,).
    """
    rows = np.arange(len(labels))
    thresholds = np.array(
        [probabilities[labels == label, label].mean() for label in range(probabilities.shape[1])]
    )
    reached = np.where(probabilities >= thresholds, probabilities, -np.inf)
    likely = reached.argmax(axis=1)
    wrong = np.flatnonzero(np.isfinite(reached.max(axis=1)) & (likely != labels))
    margins = probabilities[rows, likely] - probabilities[rows, labels]
    ordered = wrong[np.argsort(-margins[wrong], kind="stable")]
    return [(int(row), int(likely[row])) for row in ordered]


def category_errors(part: AuditSet, vectors: Vectors, *, seed: int) -> dict[str, Any] | None:
    """Return rows whose category confident learning disputes; None with fewer than two to tell.

    Rows with one category enter, of categories with at least `ENOUGH` separate facts or
    prompts. Probabilities are out of sample by fact: another wording would give its label away.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    groups = [row.fact_id or key for row, key in zip(part.examples, part.keys, strict=True)]
    bearers: dict[str, set[str]] = defaultdict(set)
    for row, group in zip(part.examples, groups, strict=True):
        if len(filed := categories_of(row)) == 1:
            bearers[filed[0]].add(group)
    names = sorted(name for name, held in bearers.items() if len(held) >= ENOUGH)
    if len(names) < 2:
        return None
    rows = [index for index, row in enumerate(part.examples) if row.category.strip() in names]
    labels = np.array([names.index(part.examples[index].category.strip()) for index in rows])
    probabilities = cross_val_predict(
        LogisticRegression(C=10.0, max_iter=1000),
        vectors[rows],
        labels,
        groups=[groups[index] for index in rows],
        cv=StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed),
        method="predict_proba",
    )
    found = mislabelled(probabilities, labels)
    shown = listed(names)
    return {
        "rows": len(rows),
        "categories": len(names),
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "flagged": len(found),
        "examples": [
            {
                **part.reference(rows[row]),
                "likely": shown[label],
                "p_likely": float(probabilities[row, label]),
                "p_given": float(probabilities[row, labels[row]]),
            }
            for row, label in found[:_NAMED]
        ],
    }


def conflicting_categories(part: AuditSet) -> dict[str, Any]:
    """Return prompts that several rows file under different categories.

    So do sets whose rows of several categories are filed under the first of them.
    """
    filed: dict[str, dict[str, int]] = defaultdict(dict)
    for index, (key, row) in enumerate(zip(part.keys, part.examples, strict=True)):
        filed[key].setdefault(",".join(sorted(categories_of(row))), index)
    found = [sorted(rows.values()) for rows in filed.values() if len(rows) > 1]
    return {
        "prompts": len(found),
        "examples": [[part.reference(index) for index in rows] for rows in found[:_NAMED]],
    }


def wrong_answers(
    sets: Mapping[str, AuditSet], refusals: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return rows whose answer is not what their stream is for.

    A harmful or benign answer that refuses, and a refusal that does not, train the opposite of
    what is meant.

    Parameters
    ----------
    refusals
        Whole refusals beyond the known phrases.
    """
    found = []
    for name, should in (
        ("harmful", False),
        ("attack", False),
        ("benign", False),
        ("refusal", True),
    ):
        part = sets.get(name)
        if part is None:
            continue
        rows = [
            index
            for index, row in enumerate(part.examples)
            if row.answer and is_refusal(row.answer, refusals) is not should
        ]
        found.append(
            {
                "set": name,
                "problem": "not recognised as a refusal" if should else "refuses",
                "rows": len(rows),
                "of": len(part),
                "examples": [part.reference(index) for index in rows[:_NAMED]],
            }
        )
    return found


def outliers(part: AuditSet, vectors: Vectors) -> dict[str, Any] | None:
    """Return prompts far from all others of their set; None with too few to tell."""
    rows = part.distinct()
    if len(rows) <= 4 * NEIGHBOURS:
        return None
    gaps = neighbour_distances(vectors[rows], NEIGHBOURS)
    low, high = np.quantile(gaps, [0.25, 0.75])
    bound = float(high + FAR * (high - low))
    far = [index for index in np.argsort(-gaps, kind="stable").tolist() if gaps[index] > bound]
    return {
        "bound": bound,
        "rows": len(far),
        "examples": [
            {**part.reference(rows[index]), "distance": float(gaps[index])}
            for index in far[:_NAMED]
        ],
    }


def benign_near_harm(
    benign: AuditSet, harmful: AuditSet, vectors: Mapping[str, Vectors], *, radius: float
) -> dict[str, Any]:
    """Return the benign prompts within ``radius`` of a harmful one: where a trap may misfire."""
    rows = benign.distinct()
    gaps = nearest(vectors[benign.name][rows], vectors[harmful.name][harmful.distinct()])
    close = [index for index in np.argsort(gaps, kind="stable").tolist() if gaps[index] <= radius]
    return {
        "prompts": len(rows),
        "rows": len(close),
        "median": float(np.median(gaps)),
        "examples": [
            {**benign.reference(rows[index]), "distance": float(gaps[index])}
            for index in close[:_NAMED]
        ],
    }


def private_data(sets: Sequence[AuditSet]) -> dict[str, Any]:
    """Return the rows that hold what looks like personal data or a secret, by pattern."""
    rows: dict[str, int] = {}
    examples = []
    for part in sets:
        for index, row in enumerate(part.examples):
            for kind in _kinds(f"{row.prompt}\n{row.answer}"):
                rows[kind] = rows.get(kind, 0) + 1
                examples.append({**part.reference(index), "kind": kind})
    return {"rows": rows, "examples": examples[:_NAMED]}


def _kinds(text: str) -> list[str]:
    found = []
    for kind, pattern in PRIVATE.items():
        hits = (match.group() for match in pattern.finditer(text))
        if any(kind != "payment card" or _valid_card(hit) for hit in hits):
            found.append(kind)
    return found


def _valid_card(text: str) -> bool:
    """Whether the digits pass Luhn's check, as one in ten random numbers does."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
