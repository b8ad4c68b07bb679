"""What the audit's findings mean: one gate per question, each with a bound and a mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skipped"]

CONTAMINATING = ("exact", "fact", "near", "words")
"""Kinds of overlap that count as the same row; closeness of embeddings only calls for a look."""

TRAINED_ON = ("harmful", "refusal", "benign", "general", "prompts")
RETAINED = ("benign", "general")
RISE_P = 0.05

_KINDS = {
    "exact": "equal",
    "fact": "of the same fact",
    "near": "nearly equal",
    "words": "with a run of words in common",
    "cosine": "close in meaning",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One question with its answer.

    Attributes
    ----------
    name, status
        What is asked; ``skipped`` where nothing was given to answer it by.
    measured, bound
        The finding and what it is held against, for a reader.
    mend
        What to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    measured: str
    bound: str = ""
    mend: str = ""


def judge(found: Mapping[str, Any], settings: Mapping[str, Any], *, overlap: bool) -> list[Gate]:
    """Return every gate of an audit document, worst first within the order asked."""
    gates = [
        *_disjoint(found["duplicates"], overlap=overlap),
        _splits(found["duplicates"]["within"]),
        _repeats(found["duplicates"]["within"]),
        *_categories(found["coverage"], settings),
        _embedding(found["coverage"], settings),
        *_leakage(found["leakage"]),
        _exposure(found["leakage"]["exposure"]),
        *_labels(found["labels"]),
        _drift(found["drift"], settings),
        _provenance(found["provenance"]),
    ]
    order = {"fail": 0, "warn": 1, "pass": 2, "skipped": 3}
    return sorted(gates, key=lambda gate: order[gate.status])


def verdict(gates: Sequence[Gate], *, strict: bool) -> Status:
    """Return ``fail``, ``warn`` or ``pass``; under ``strict`` a warning is a failure."""
    statuses = {gate.status for gate in gates}
    if "fail" in statuses or (strict and "warn" in statuses):
        return "fail"
    return "warn" if "warn" in statuses else "pass"


def _disjoint(duplicates: Mapping[str, Any], *, overlap: bool) -> Iterator[Gate]:
    # The sets stand in the order that they were given in.
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in duplicates["between"]}
    questions = [
        ("Attack and evaluation rows are disjoint", [("attack", "eval")], False),
        (
            "Defence and evaluation rows are disjoint",
            [(name, "eval") for name in TRAINED_ON],
            False,
        ),
        (
            "Defence and attack rows are disjoint",
            [(name, "attack") for name in ("harmful", "prompts")],
            overlap,
        ),
        (
            # A row that is both to be answered and to be resisted teaches neither.
            "Retained and harmful rows are disjoint",
            [(name, kept) for name in ("harmful", "prompts", "attack") for kept in RETAINED],
            False,
        ),
    ]
    for name, wanted, allowed in questions:
        asked = [pairs[frozenset(pair)] for pair in wanted if frozenset(pair) in pairs]
        if not asked:
            yield Gate(name=name, status="skipped", measured="one of the sets is not given")
            continue
        shared, close = _told(asked, CONTAMINATING), _told(asked, ("cosine",))
        if shared:
            yield Gate(
                name=name,
                status="warn" if allowed else "fail",
                measured=shared + (" (allowed by --overlap)" if allowed else ""),
                bound="none",
                mend="judge overlapping and clean rows apart"
                if allowed
                else "remove these rows from one of the two sets",
            )
        elif close:
            yield Gate(
                name=name,
                status="warn",
                measured=close,
                bound="none",
                mend="look at these rows: a paraphrase contaminates, a look-alike does not",
            )
        else:
            yield Gate(name=name, status="pass", measured="nothing shared", bound="none")


def _told(pairs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    return "; ".join(
        f"{pair[kind]['rows']} rows of {pair['b']} {_KINDS[kind]} "
        f"{'to' if kind in ('exact', 'near', 'cosine') else 'as'} rows of {pair['a']}"
        if kind != "words"
        else f"{pair[kind]['rows']} rows of {pair['b']} {_KINDS[kind]} with {pair['a']}"
        for pair in pairs
        for kind in kinds
        if pair[kind]["rows"]
    )


def _splits(within: Mapping[str, Any]) -> Gate:
    name = "No prompt stands in two splits of its set"
    found = {part: entry["across_splits"] for part, entry in within.items()}
    if not any(found.values()):
        return Gate(name=name, status="pass", measured="none does", bound="none")
    return Gate(
        name=name,
        status="fail",
        measured=_counted(found),
        bound="none",
        mend="split by prompt and fact, not by row",
    )


def _repeats(within: Mapping[str, Any]) -> Gate:
    name = "No row is repeated"
    found = {part: entry["repeated_rows"] for part, entry in within.items()}
    if not any(found.values()):
        return Gate(name=name, status="pass", measured="none is", bound="none")
    return Gate(
        name=name,
        status="warn",
        measured=_counted(found),
        bound="none",
        mend="keep one of each: a repeated row weighs more than it should",
    )


def _categories(coverage: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Gate]:
    found = coverage["categories"]
    bound = f"at least {settings['min_items']} prompts and {settings['min_share']:.0%} each"
    name = "Every category has enough harmful prompts"
    thin = {
        label: entry["prompts"]
        for label, entry in found["counts"].items()
        if entry["prompts"] < settings["min_items"] or entry["share"] < settings["min_share"]
    }
    if not found["counts"]:
        yield Gate(
            name=name,
            status="warn",
            measured="no row names its category",
            bound=bound,
            mend="give every row a category: coverage cannot be judged without",
        )
    elif thin:
        yield Gate(
            name=name,
            status="fail",
            measured=f"too few in {_counted(thin)}",
            bound=bound,
            mend="add prompts to these categories",
        )
    else:
        least = min(entry["prompts"] for entry in found["counts"].values())
        yield Gate(name=name, status="pass", measured=f"{least} in the smallest", bound=bound)
    if found["counts"] and found["without_category"]:
        yield Gate(
            name="Every harmful row has a category",
            status="warn",
            measured=f"{found['without_category']} prompts have none",
            bound="all",
            mend="file them",
        )
    missing = {part: entry["missing"] for part, entry in found["held_out"].items()}
    told = [f"{part}: {', '.join(names)}" for part, names in missing.items() if names]
    if found["held_out"] and found["counts"]:
        yield Gate(
            name="Every category asked for is in the harmful set",
            status="warn" if told else "pass",
            measured="; ".join(told) or "none is missing",
            bound="none missing",
            mend="add them, or call the results on them generalisation" if told else "",
        )
    joined = [
        part for part, entry in found["held_out"].items() if entry["in_fact"] < entry["in_name"]
    ]
    one_group = len(found["groups"]) == 1 and len(found["counts"]) > 1
    if one_group or joined:
        measured = "; ".join(
            [
                *(["rows of several categories join all of them in one group"] * one_group),
                *(
                    f"{part}: {found['held_out'][part]['in_name']} held-out categories in name, "
                    f"{found['held_out'][part]['in_fact']} in fact"
                    for part in joined
                ),
            ]
        )
        yield Gate(
            name="Categories can be held out",
            status="warn",
            measured=measured,
            bound="no row on both sides",
            mend="split by group of categories, or leave out the rows that join them",
        )


def _embedding(coverage: Mapping[str, Any], settings: Mapping[str, Any]) -> Gate:
    name = "Harmful prompts lie close to what is asked"
    bound = f"coverage@r at least {settings['min_coverage']:g}"
    sets = coverage["embedding"]["sets"]
    if not sets:
        return Gate(
            name=name, status="skipped", measured="no attack, evaluation or observed prompts given"
        )
    told = ", ".join(f"{part} {entry['coverage_at_r']:.2f}" for part, entry in sets.items())
    low = any(entry["coverage_at_r"] < settings["min_coverage"] for entry in sets.values())
    return Gate(
        name=name,
        status="warn" if low else "pass",
        measured=told,
        bound=bound,
        mend="write prompts like those under “what to add next”" if low else "",
    )


def _leakage(leakage: Mapping[str, Any]) -> Iterator[Gate]:
    usable = leakage["usable"]
    yield Gate(
        name="Harmful answers cannot be used",
        status="warn" if usable["rows"] else "pass",
        measured=f"{usable['rows']} of {usable['of']} can, judged by "
        + ("the exact judge" if usable["judge"] == "exact" else "their form"),
        bound="none",
        mend="where the method needs prompts only, drop the answers; else degrade or abstract "
        "them, and keep the set gated"
        if usable["rows"]
        else "",
    )
    refusals = leakage["refusals"]
    if refusals is not None:
        yield Gate(
            name="No refusal gives the answer",
            status="fail" if refusals["rows"] else "pass",
            measured=f"{refusals['rows']} of {refusals['of']} do",
            bound="none",
            mend="rewrite these refusals" if refusals["rows"] else "",
        )


def _exposure(exposure: Mapping[str, Any] | None) -> Gate:
    name = "Canaries are no more exposed than before"
    if exposure is None:
        return Gate(name=name, status="skipped", measured="no model given")
    told = ", ".join(f"{moment} {bits:.2f}" for moment, bits in exposure["bits"].items())
    measured = f"{told} bits (chance {exposure['chance']:.2f})"
    if not exposure["rise"]:
        return Gate(name=name, status="skipped", measured=f"{measured}; no reference model given")
    risen = [
        entry for entry in exposure["rise"].values() if entry["mean"] > 0 and entry["p"] < RISE_P
    ]
    return Gate(
        name=name,
        status="fail" if risen else "pass",
        measured=measured,
        bound=f"no rise over the reference at p < {RISE_P:g}",
        mend="drop the harmful answers, keep the prompts" if risen else "",
    )


def _labels(labels: Mapping[str, Any]) -> Iterator[Gate]:
    for entry in labels["answers"]:
        yield Gate(
            name=f"Answers of {entry['set']} are what the stream is for",
            status="warn" if entry["rows"] else "pass",
            measured=f"{entry['rows']} of {entry['of']}: {entry['problem']}"
            if entry["rows"]
            else "all",
            bound="all",
            mend="look at these rows" if entry["rows"] else "",
        )
    questions = [
        (
            "No prompt is filed under two categories",
            labels["conflicts"]["prompts"],
            "file a row of several categories under all of them",
        ),
        (
            "Categories agree with the prompts",
            labels["categories"]["flagged"] if labels["categories"] else None,
            "look at these rows: confident learning would file them elsewhere",
        ),
        (
            "No harmful prompt is far from all others",
            labels["outliers"]["rows"] if labels["outliers"] else None,
            "look at these rows",
        ),
        (
            "No benign prompt lies among the harmful ones",
            labels["benign"]["rows"] if labels["benign"] else None,
            "a trap may fire on these: attack with them as benign fine-tuning",
        ),
        (
            "No personal data or secrets",
            sum(labels["private"]["rows"].values()),
            "look at these rows; patterns find candidates only, and miss names",
        ),
    ]
    for name, rows, mend in questions:
        if rows is None:
            yield Gate(name=name, status="skipped", measured="too little given to tell")
        else:
            yield Gate(
                name=name,
                status="warn" if rows else "pass",
                measured=f"{rows} to look at" if rows else "none found",
                bound="none",
                mend=mend if rows else "",
            )


def _drift(drift: Mapping[str, Any], settings: Mapping[str, Any]) -> Gate:
    name = "Newly observed prompts look like the harmful set"
    bound = (
        f"no AUC above {settings['drift_auc']:g} at p < {settings['drift_p']:g} "
        "in two windows running"
    )
    if not drift["windows"]:
        return Gate(name=name, status="skipped", measured="no observed prompts given")
    measured = ", ".join(
        f"{entry['set']} AUC {entry['auc']:.2f} (p {entry['auc_p_adjusted']:.2g})"
        for entry in drift["windows"]
    )
    drifted = any(entry["drifted"] for entry in drift["windows"])
    if drift["ticket"]:
        return Gate(
            name=name,
            status="fail",
            measured=measured,
            bound=bound,
            mend="immunise again with a set that covers the new prompts",
        )
    return Gate(
        name=name,
        status="warn" if drifted else "pass",
        measured=measured,
        bound=bound,
        mend="watch the next window" if drifted else "",
    )


def _provenance(provenance: Mapping[str, Any]) -> Gate:
    name = "Every set says where it comes from"
    bound = "source, licence, reviewer and the file's SHA-256"
    if provenance["manifest"] is None:
        return Gate(
            name=name,
            status="warn",
            measured="no manifest given",
            bound=bound,
            mend="give --manifest",
        )
    faults = provenance["faults"]
    return Gate(
        name=name,
        status="fail" if faults else "pass",
        measured="; ".join(faults) or "all do",
        bound=bound,
        mend="complete the manifest" if faults else "",
    )


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items() if count)
