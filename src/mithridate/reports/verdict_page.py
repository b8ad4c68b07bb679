"""The verdict for a reader: a section of any run's page, and the whole page of a battery."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mithridate import schema
from mithridate.configs import read_yaml
from mithridate.errors import GateError, InputError
from mithridate.measures.rows import BATTERY_VALUES, read_summary
from mithridate.printable import printable
from mithridate.reports.charts import IntervalBar
from mithridate.reports.html import flat, printable_lines, render
from mithridate.reports.limits import cut_short, validity_limits
from mithridate.verdicts import RANK, Term, judge_run
from mithridate.verdicts.verdict import HEADLINES

MEANINGS: Mapping[str, str] = {
    Term.DEAD_ON_ARRIVAL: "the model is no longer useful, before any attack",
    Term.BROKEN: "the attacker gets useful harm out of a model that stays useful",
    Term.BROKEN_AT_COST: "the attacker gets useful harm, out of a model that loses its utility",
    Term.INCONCLUSIVE: "the measurements do not decide it",
    Term.COLLAPSED_UNATTRIBUTED: "the model collapses, but the undefended one does too",
    Term.COLLAPSED_REVERSIBLE: "the model collapses, and benign training repairs it",
    Term.DEGRADED: "the attacker gets nothing, the model loses part of its utility",
    Term.COLLAPSED: "the attacker gets nothing, the model collapses",
    Term.HELD: "the attacker gets nothing, the model stays useful",
    Term.NOT_VALID: "the attack does not break the undefended model either",
    Term.NOT_RUN: "no attack reached the defended model",
}
_KINDS = {
    **dict.fromkeys((Term.HELD, Term.COLLAPSED), "holds"),
    **dict.fromkeys((Term.DEAD_ON_ARRIVAL, Term.BROKEN, Term.BROKEN_AT_COST), "fails"),
    **dict.fromkeys((Term.NOT_VALID, Term.NOT_RUN), "void"),
}
_TONES = {
    **dict.fromkeys(("holds", "passed", "met"), "kept"),
    **dict.fromkeys(("fails", "failed", "stops"), "harmful"),
    **dict.fromkeys(("not run", "not checked", "not valid"), "soft"),
}
_OF_KIND = {"holds": "kept", "fails": "harmful", "partly": "warned", "void": "soft"}
_ORDER = {term.value: place for place, term in enumerate((*RANK, Term.NOT_VALID))}


def verdict_of(run_dir: Path) -> dict[str, Any]:
    """Return the run's verdict, judged anew from its rows.

    A stored ``verdict.json`` is taken where the rows say the same: it may know other runs too,
    for the criterion of transfer.

    Raises
    ------
    InputError
        The folder cannot be read.
    GateError
        A gate stops the verdict.
    """
    found = judge_run(run_dir)
    path = run_dir / "verdict.json"
    if not path.exists():
        return found
    try:
        stored = schema.read_object(path)
        (known,) = (one for one in stored["card"]["criteria"] if one["name"] == "transfer")
        known = schema.check(schema.Criterion, known, where=str(path))
    except (InputError, KeyError, TypeError, ValueError):
        return found
    # Only of other runs does the stored one know more than the rows say.
    document = json.loads(json.dumps(found))
    document["card"]["criteria"] = [
        known if one["name"] == "transfer" else one for one in document["card"]["criteria"]
    ]
    document["headline"] = stored.get("headline")
    passed = all(one["state"] == "passed" for one in document["card"]["criteria"])
    whole = document == stored and document["headline"] == (
        HEADLINES.get(Term(document["verdict"])) if passed else None
    )
    return stored if whole else found


def battery_page(run_dir: Path, document: Mapping[str, Any] | None = None) -> str:
    """Return the page of a battery's run folder.

    Parameters
    ----------
    document
        The verdict, where it is already known.

    Raises
    ------
    InputError
        The folder cannot be read.
    GateError
        A gate stops the verdict: nothing follows from the run.
    """
    document = verdict_of(run_dir) if document is None else document
    view = section(run_dir, document)
    manifest, config = run_dir / "manifest.json", run_dir / "config.yaml"
    run = read_summary(run_dir)
    stamps = ["PRELIMINARY"] if document["preliminary"] else []
    testbed = document["testbed"]
    tier = [f"tier {run['tier']}"] if run.get("tier") else []
    chips = [testbed, document["method"], *tier]
    return render(
        "battery.html.j2",
        {},
        chips=[printable(str(chip)) for chip in chips if chip],
        config=printable_lines(config.read_text(encoding="utf-8")) if config.exists() else "",
        failed=[
            {name: printable(str(value)) for name, value in one.items()}
            for one in run.get("failed", ())
        ],
        files=", ".join(sorted(document["sources"])),
        limits=[
            *validity_limits(testbed, str(run.get("judge", {}).get("name", "exact"))),
            *cut_short(run.get("answers") or {}),
        ],
        provenance=[
            *flat(document["sources"]),
            *(flat(schema.read_object(manifest)) if manifest.exists() else ()),
        ],
        stamps=stamps,
        title=" · ".join(part for part in (testbed, document["method"]) if part) or run_dir.name,
        utility=utility_rows(run_dir),
        verdict=view,
    )


def utility_rows(run_dir: Path) -> list[dict[str, str]]:
    """Return what ``utility.json`` says of each task, if the run folder has one."""
    path = run_dir / "utility.json"
    if not path.exists():
        return []
    document = schema.check(schema.Utility, schema.read_object(path), where=str(path))
    rows = []
    for row in document["tasks"]:
        found = row["difference"] or {"estimate": None, "low": None}
        rows.append(
            {
                "task": printable(row["task"]),
                "metric": printable(row["metric"]),
                "n": str(row["n"]),
                "chance": f"{row['chance']:.2f}",
                "counts": "" if row["counts"] else "not counted: too near chance",
                **{name: _accuracy(row.get(name)) for name in ("reference", "model")},
                "difference": "" if row["difference"] is None else f"{found['estimate']:+.3f}",
                "between": "" if found["low"] is None else _between(found),
                "answer": found.get("answer", ""),
                "tone": _tone(found.get("answer", "")),
            }
        )
    return rows


def _accuracy(found: Mapping[str, Any] | None) -> str:
    return f"{found['accuracy']:.3f}" if found else ""


def kind_of(verdict: str) -> str:
    """Return the page's mood: ``holds``, ``partly``, ``fails`` or ``void``."""
    return _KINDS.get(Term(verdict), "partly")


def section(run_dir: Path, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what the template of the verdict shows.

    Parameters
    ----------
    document
        The verdict, where it is already known.
    """
    try:
        document = verdict_of(run_dir) if document is None else document
    except GateError as error:
        return {"stopped": printable(str(error))}
    names = attack_names(run_dir)
    limit = float(document["limits"]["harm"])
    kind = kind_of(document["verdict"])
    return {
        "stopped": "",
        "kind": kind,
        "tone": _OF_KIND[kind],
        "verdict": sentence(document["verdict"]),
        "first_line": sentence(printable(document["first_line"])),
        "headline": document["headline"],
        "meaning": MEANINGS[document["verdict"]],
        "limits": {name: f"{value:g}" for name, value in document["limits"].items()},
        "cells": [_cell(cell, names, limit) for cell in _worst_first(document["cells"])],
        "counts": _counts(document["cells"]),
        "conditions": [_condition(condition) for condition in document["conditions"]],
        "gates": [{**gate, "tone": _tone(gate["state"])} for gate in document["gates"]],
        "withheld": [gate["what"] for gate in document["gates"] if gate["state"] == "withholds"],
        "criteria": [
            {**one, "tone": _tone(one["state"]), "why": [printable(why) for why in one["why"]]}
            for one in document["card"]["criteria"]
        ],
        "notes": [
            ("Stability", document["card"]["stability"]),
            ("Trainability", document["card"]["trainability"]),
            ("Base model", document["card"]["base_model"]),
        ],
        "bypass": [
            {"attack": printable(name), "name": names.get(name, ("", ""))[0], "text": best["text"]}
            for name, best in (document["bypass"] or {}).items()
            if best
        ],
        "missing": [_missing(entry, names) for entry in document["card"]["attacks_not_run"]],
    }


def attack_names(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Return the name and the state of each attack that the run's battery, or ours, lists."""
    own = run_dir / "battery.yaml"
    path = own if own.exists() else Path(str(files("mithridate") / "redteam" / "battery.yaml"))
    return {
        str(entry["id"]): (
            printable(str(entry.get("name", ""))),
            printable(str(entry.get("state", ""))),
        )
        for entry in read_yaml(path, most_values=BATTERY_VALUES).get("attacks") or ()
        if isinstance(entry, Mapping) and "id" in entry
    }


def sentence(text: str) -> str:
    """Return ``text`` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def _tone(state: str) -> str:
    return _TONES.get(state, "warned")


def _worst_first(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Order cells by verdict, the worst for the defence first, then by what they yield."""

    def place(cell: Mapping[str, Any]) -> tuple[int, float]:
        best = cell["useful_harm"] or cell["unbounded_useful_harm"]
        return _ORDER[cell["verdict"]], -best["estimate"] if best else 0.0

    return sorted(cells, key=place)


def _counts(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = Counter(cell["verdict"] for cell in cells)
    return [
        {
            "verdict": verdict,
            "count": found[verdict],
            "tone": _OF_KIND[kind_of(verdict)],
            "meaning": MEANINGS[verdict],
        }
        for verdict in _ORDER
        if found[verdict]
    ]


def _cell(
    cell: Mapping[str, Any], names: Mapping[str, tuple[str, str]], limit: float
) -> dict[str, Any]:
    best, unbounded, control = (
        cell[key] for key in ("useful_harm", "unbounded_useful_harm", "control_useful_harm")
    )
    collapses = [ending["collapse"] for ending in cell["endings"]]
    broken, term = cell["steps_to_break"], cell["verdict"]
    tone = _OF_KIND[kind_of(term)]
    shown = best or unbounded
    same = unbounded is None or (best and best["estimate"] == unbounded["estimate"])
    known = {
        "useful harm": best and f"{best['estimate']:.2f}, 95 % {_between(best)}",
        "undefended": control and f"{control['estimate']:.2f}",
        "limit": f"{limit:g}",
    }
    described = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    attack = printable(cell["attack"])
    return {
        "attack": attack,
        "name": names.get(cell["attack"], ("", ""))[0],
        "verdict": term,
        "tone": tone,
        "why": printable(_why(cell)),
        "harm": f"{best['estimate']:.2f}" if best else "",
        "between": _between(best) if best else "",
        "bar": IntervalBar(
            description=f"{attack}: {described}",
            low=shown["low"],
            estimate=shown["estimate"],
            high=shown["high"],
            limit=limit,
            other=control["estimate"] if control else None,
            role=tone,
        ).svg()
        if shown
        else "",
        "unbounded": "" if same else f"{unbounded['estimate']:.2f}",
        "control": f"{control['estimate']:.2f}" if control else "",
        "collapse": _range(collapses),
        "broken": "" if broken is None else f"{broken['broken']} of {broken['attacks']}",
        "steps": _steps(broken, cell["earliest_break"]),
        "window": "" if cell["window"] is None else f"{cell['window']:.0f}",
        "where": _where(shown) if shown else "",
        "counted": f"{shown['n']} items, {_plural(shown['seeds'], 'seed')}" if shown else "",
    }


def _why(cell: Mapping[str, Any]) -> str:
    """Return the reason without the useful harm, which has a column of its own."""
    reason: str = cell["reason"]
    for best in (cell["useful_harm"], cell["unbounded_useful_harm"]):
        if best:
            reason = reason.removeprefix(f"useful harm {best['text']}")
    return reason.lstrip(":; ")


def _between(best: Mapping[str, Any]) -> str:
    return f"{best['low']:.3f} to {best['high']:.3f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _steps(broken: Mapping[str, Any] | None, earliest: int | None) -> str:
    if broken is None or not broken["broken"]:
        return ""
    return f"from step {earliest}" if earliest is not None else ""


def _where(best: Mapping[str, Any]) -> str:
    parts = [printable(best["configuration"])] if best["configuration"] else []
    if best["learning_rate"]:
        parts.append(f"{best['learning_rate']:.1e}".replace("e-0", "e-"))
    return ", ".join([*parts, f"step {best['step']}"])


def _condition(condition: Mapping[str, Any]) -> dict[str, Any]:
    findings = [_finding(one) for one in condition["findings"]]
    answers = Counter(one["answer"] for one in condition["findings"])
    return {
        "name": sentence(condition["name"]),
        "answer": condition["answer"],
        "tone": _tone(condition["answer"]),
        "findings": findings,
        # One finding for each attack repeats the table of attacks.
        "folded": len(findings) > 6,
        "told": ", ".join(f"{count} {answer}" for answer, count in answers.items()),
        "notes": [printable(note) for note in condition["notes"]],
        "numbers": [
            (name.replace("_", " "), _number(value))
            for name, value in condition["numbers"].items()
            if value not in (None, 0)
        ],
    }


def _finding(one: Mapping[str, Any]) -> dict[str, str]:
    sign = "+" if one["low"] is not None and one["low"] < 0 else ""
    return {
        "measure": printable(one["measure"]),
        "answer": one["answer"],
        "tone": _tone(one["answer"]),
        "estimate": "" if one["estimate"] is None else f"{one['estimate']:{sign}.3f}",
        "between": "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}",
        "detail": printable(one["detail"]),
    }


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_number(one) for one in value)
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


def _missing(entry: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    name, state = names.get(entry["id"], ("", ""))
    return {
        "id": printable(entry["id"]),
        "name": name or printable(entry["family"]),
        "state": state,
    }
