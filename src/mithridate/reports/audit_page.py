"""`audit_page`: an audit's document as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mithridate.printable import printable
from mithridate.reports.charts import LineChart, Series, percent
from mithridate.reports.html import render

_KINDS = {"fail": "fails", "warn": "partly", "pass": "holds", "skipped": "void"}
_SUBTITLES = {
    "fail": "A gate fails",
    "warn": "Every gate holds, with warnings",
    "pass": "Every gate holds",
}
_TONES = {"fail": "harmful", "warn": "warned", "pass": "kept", "skipped": "soft"}
_OVERLAPS = ("exact", "fact", "near", "words", "cosine")
_BAR, _BAR_HEIGHT = 480.0, 9.0


def headline(document: Mapping[str, Any]) -> str:
    """Return the audit's result in one sentence."""
    counts = {
        status: sum(gate["status"] == status for gate in document["gates"])
        for status in ("fail", "warn")
    }
    if document["verdict"] == "fail":
        failed = counts["fail"] or counts["warn"]
        return f"The harmful set fails {_plural(failed, 'gate')}"
    if counts["warn"]:
        return f"The harmful set passes, with {_plural(counts['warn'], 'warning')}"
    return "The harmful set passes every gate"


def audit_page(document: Mapping[str, Any]) -> str:
    """Return the page of an audit's document.

    Texts are shown only where the document holds them, which takes ``--reveal``.
    """
    charts: dict[str, Any] = {}
    embedding = document["coverage"]["embedding"]
    return render(
        "audit.html.j2",
        charts,
        kind=_KINDS[document["verdict"]],
        subtitle=_SUBTITLES[document["verdict"]],
        headline=headline(document),
        chips=[name for name in (document["testbed"],) if name],
        revealed=document["revealed"],
        worst=[gate for gate in document["gates"] if gate["status"] in ("fail", "warn")][:4],
        gates=[{**gate, "tone": _TONES[gate["status"]]} for gate in document["gates"]],
        sets=document["sets"].items(),
        categories=_categories(document["coverage"]["categories"], document["settings"]),
        groups=[group for group in document["coverage"]["categories"]["groups"] if len(group) > 1],
        entropy=document["coverage"]["categories"]["entropy"],
        radius=embedding["radius"],
        asked=[_asked(name, entry) for name, entry in embedding["sets"].items()],
        uncovered=[
            {"name": name, "count": entry["uncovered_count"], "rows": entry["uncovered"]}
            for name, entry in embedding["sets"].items()
            if entry["uncovered"]
        ],
        next=_next(document["coverage"]["next"], embedding["radius"], charts),
        overlaps=_overlaps(document["duplicates"]["between"]),
        contaminated=list(_contaminated(document["duplicates"]["between"])),
        within=document["duplicates"]["within"].items(),
        leakage=document["leakage"],
        review=list(_review(document["labels"])),
        windows=document["drift"]["windows"],
        attack_drift=document["drift"]["attack"],
        not_checked=document["not_checked"],
        settings=document["settings"].items(),
        provenance=document["provenance"],
        percent=percent,
        p_value=_p_value,
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _p_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _categories(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    most = max((entry["prompts"] for entry in found["counts"].values()), default=0)
    rows = []
    for name, entry in found["counts"].items():
        thin = entry["prompts"] < settings["min_items"] or entry["share"] < settings["min_share"]
        rows.append(
            {
                "name": name,
                "prompts": entry["prompts"],
                "share": percent(entry["share"]),
                "thin": thin,
                "bar": _bar(entry["prompts"] / most, "share-exact" if thin else "share-refusal"),
            }
        )
    return rows


def _bar(share: float, tone: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" aria-hidden="true">'
        '<rect class="gauge-track" width="{width}" height="{height}" rx="3"/>'
        '<rect class="{tone}" width="{span}" height="{height}" rx="3"/></svg>'
    ).format(width=_BAR, height=_BAR_HEIGHT, tone=tone, span=round(max(share * _BAR, 1.5), 1))


def _asked(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    nearest = entry.get("k_nearest")
    return {
        "name": name,
        "prompts": entry["prompts"],
        "covered": percent(entry["coverage_at_r"]),
        "median": entry["median"],
        "q95": entry["q95"],
        "farthest": entry["farthest"],
        "recall": f"{nearest['recall']:.2f}" if nearest else "",
        "coverage": f"{nearest['coverage']:.2f}" if nearest else "",
        "categories": sorted(
            entry["categories"].items(), key=lambda item: (item[1]["coverage_at_r"], item[0])
        ),
    }


def _next(
    found: Mapping[str, Any] | None, radius: float, charts: dict[str, Any]
) -> dict[str, Any] | None:
    if found is None or not found["add"]:
        return None
    radii = found["radii"]
    chart = LineChart(
        name="radius",
        description=(
            f"Covering radius {radii[0]:.2f} before and {radii[-1]:.2f} after {len(radii) - 1} "
            f"additions; r is {radius:.2f}."
        ),
        series=[
            Series(label="covering radius", role="term", points=list(enumerate(map(float, radii))))
        ],
        x_label="prompts added",
        y_range=(0.0, 1.1 * max(radii[0], radius)),
        limit=(radius, f"r {radius:.2f}"),
    )
    charts[chart.name] = chart.data()
    return {**found, "svg": chart.svg(), "note": f"from {radii[0]:.2f} to {radii[-1]:.2f}"}


def _overlaps(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "a": pair["a"],
            "b": pair["b"],
            "counts": [
                str(pair[kind]["rows"]) if kind in pair else "by design" for kind in _OVERLAPS
            ],
        }
        for pair in pairs
    ]


def _contaminated(pairs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        if pair["b"] in ("attack", "eval"):
            for kind in _OVERLAPS:
                for example in pair.get(kind, {"examples": []})["examples"]:
                    yield {"kind": kind, **example}


def _review(labels: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in labels["answers"]:
        for row in entry["examples"]:
            yield {"why": f"answer {entry['problem']}", "row": row}
    for rows in labels["conflicts"]["examples"]:
        told = ", ".join(row["category"] or "none" for row in rows)
        yield {"why": f"filed under {told}", "row": rows[0]}
    if labels["categories"]:
        for row in labels["categories"]["examples"]:
            yield {
                "why": f"likely {row['likely']} "
                f"({row['p_likely']:.2f} against {row['p_given']:.2f})",
                "row": row,
            }
    if labels["outliers"]:
        for row in labels["outliers"]["examples"]:
            yield {"why": f"far from all others ({row['distance']:.2f})", "row": row}
    if labels["benign"]:
        for row in labels["benign"]["examples"]:
            yield {"why": f"benign, {row['distance']:.2f} from a harmful prompt", "row": row}
    for row in labels["private"]["examples"]:
        yield {"why": printable(row["kind"]), "row": row}
