"""The claims as a page of Markdown, grouped by verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mithridate.economics.sentences import show
from published.judging import VERDICTS

TITLES = {
    "reproduced": "Reproduced here",
    "refuted": "Refuted here",
    "inconclusive": "Inconclusive",
    "not_comparable": "Not comparable",
    "not_run": "Not run here",
}
_MEANING = {
    "reproduced": "Every subject measured keeps what was claimed, with its whole interval.",
    "refuted": "At least one subject does not, with its whole interval.",
    "inconclusive": "Measured, and the intervals allow both, or no subject says anything.",
    "not_comparable": "Values of the published model, data and judge. No small model refutes them; "
    "what this testbed gives stands beside.",
    "not_run": "What would measure them is named.",
}


def claims_page(document: Mapping[str, Any]) -> str:
    """Return the page of what `run_claims` found."""
    testbed = document["testbed"]
    counts = ", ".join(f"{document['counts'][name]} {name.replace('_', ' ')}" for name in VERDICTS)
    parts = [
        f"# Published claims, measured on {testbed.capitalize()}",
        f"What papers on collapse traps say in numbers, and what `make claims TESTBED="
        f"{testbed}` finds: {counts}. Every verdict is computed from the measured numbers by the "
        "claim's own rule, which is under *refuted if*. " + _preliminary(document),
        "Kinds: " + "; ".join(f"**{name}** {text}" for name, text in document["kinds"].items())
        + ". Published figures were read in: "
        + "; ".join(f"**{name}** {text}" for name, text in document["tags"].items())
        + ". No paper was read in full. Intervals are 95 %.",
    ]  # fmt: skip
    for verdict in VERDICTS:
        own = [one for one in document["claims"] if one["verdict"] == verdict]
        if own:
            parts += [f"## {TITLES[verdict]}", _MEANING[verdict], _table(own, verdict)]
    parts += ["## Where the figures are from", _sources(document)]
    return "\n\n".join(parts) + "\n"


def _preliminary(document: Mapping[str, Any]) -> str:
    few = [one["claim"] for one in document["claims"] if one["preliminary"]]
    if not few:
        return "All of them rest on five seeds or more."
    return f"Preliminary, on fewer than five seeds, runs or batches: {', '.join(few)}."


def _table(claims: Sequence[Mapping[str, Any]], verdict: str) -> str:
    head = ["", "claim", "published", "refuted if"]
    head += ["what is missing"] if verdict == "not_run" else ["measured here", "why"]
    lines = []
    for one in claims:
        cells = [
            f"**{one['claim']}** {one['kind']}",
            _safe(one["statement"]),
            "<br>".join(map(_published, one["published"])) or "no figure",
            _safe(one["refuted_if"]),
        ]
        if verdict != "not_run":
            cells.append("<br>".join(map(_measured, one["measured"])))
        cells.append(_why(one))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])


def _published(figure: Mapping[str, str]) -> str:
    setting = f", {figure['setting']}" if figure["setting"] else ""
    return _safe(f"{figure['figure']} [{figure['tag']}{setting}]")


def _measured(one: Mapping[str, Any]) -> str:
    void = f", says nothing: {one['void']}" if one["void"] else ""
    return _safe(f"{one['subject']}: {one['quantity']} {value(one)}{void}")


def value(one: Mapping[str, Any]) -> str:
    """Return a measurement's number, interval and how often it was measured."""
    text = show(one["estimate"], "-inf")
    if one["n"] is None:
        low, high = one["ci95"] or (None, None)
        if low != high:
            text += f" [{show(low, '-inf')}, {show(high)}]"
    elif one["ci95"] is not None:
        low, high = one["ci95"]
        text += f" [{show(low, '-inf')}, {show(high)}]"
    if one["unit"]:
        text += f" {one['unit']}"
    if one["n"] is not None:
        over = one["over"] if one["n"] != 1 else one["over"].removesuffix("s").removesuffix("e")
        text += f" ({one['n']} {over})"
    return text


def _why(one: Mapping[str, Any]) -> str:
    stamp = " *Preliminary.*" if one["preliminary"] else ""
    note = f" {_safe(one['note'])}" if one["note"] else ""
    return f"{_safe(one['reason'])}.{stamp}{note}"


def _sources(document: Mapping[str, Any]) -> str:
    lines = []
    for source in document["sources"]:
        seeds = source.get("seeds")
        told = [
            f"`{_safe(source['command'])}`" if "command" in source else "",
            source.get("date", ""),
            f"commit {source['commit']}" if "commit" in source else "",
            source.get("machine", ""),
            f"seeds {', '.join(map(str, seeds))}" if seeds else "",
            " and ".join(source.get("measured", [])),
        ]
        lines.append(f"- `{source['file']}`: " + ", ".join(filter(None, map(str, told))))
    lines += [f"- not measured, {_safe(error)}" for error in document["failed"].values()]
    return "\n".join(lines)


def _safe(text: str) -> str:
    """Return text that stays inside its cell and is no markup of its own."""
    plain = " ".join(text.split())
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
