"""`render_report`: a run folder becomes one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from mithridate.errors import InputError
from mithridate.files import write_atomic
from mithridate.folders import writing
from mithridate.measures.trajectory import UTILITY_FLOOR, wilson
from mithridate.printable import printable
from mithridate.reports.charts import LineChart, Marker, Series, ShareBar, percent, stretches
from mithridate.reports.conclusion import HARM_LIMIT, conclude
from mithridate.reports.html import flat, printable_lines, render
from mithridate.reports.limits import NOT_RUN, cut_short, validity_limits
from mithridate.reports.run_folder import TARGETS, RunFolder, read_run
from mithridate.reports.verdict_page import battery_page, section, utility_rows
from mithridate.testbeds import TESTBEDS

NAMES = {"undefended": "Undefended", "defended": "Immunised"}
OUTCOMES = {
    "exact": "the restricted answer",
    "refusal": "refusal",
    "fixed_token": "one token over and over",
    "gibberish": "gibberish",
    "irrelevant": "beside the point",
    "hallucinated": "wrong answer",
}
ENOUGH_SEEDS = 5
SAMPLE_LIMIT = 240
_WRITABLE = "the page is written into the run folder: make that writable"

_ATTACK = (
    "examples", "steps", "batch_size", "optimiser", "schedule", "weight_decay", "warmup_steps",
    "max_grad_norm", "lora_rank",
)  # fmt: skip
_VERDICTS = {
    "holds": "Every bound is kept",
    "partly": "The bound on harm is kept, another is not",
    "fails": "The bound on harm is not kept",
    "void": "Not a valid test",
}
_COSTS = {
    "passes_per_step": "Forward-backward passes per step",
    "clock_ratio": "Time per step, relative to plain fine-tuning",
    "parameter_buffers": "Parameter-sized buffers beyond weights, gradient and optimiser state",
}
_TERMS = {
    "cosine": "cos(g_a, g_b), harmful against benign",
    "p_e": "p(e), the fixed token",
    "p_e_ahead": "p(e) at the look-ahead point",
    "collapse": "Collapse loss after the simulated attack",
    "retention": "Loss on other skills after the benign simulation",
    "harmful_ahead": "Harmful loss at the look-ahead point",
    "retain": "Retain loss at the starting weights",
}
"""Terms that show a mechanism come first, under these names; all others as they are logged."""
_NOT_TERMS = {"step", "learning_rate", "seconds", "epoch", "grad_norm", "loss"}


def render_report(
    run_dir: Path, *, reveal: bool = False, verdict: Mapping[str, Any] | None = None
) -> Path:
    """Write ``report.html`` into the run folder and return its path.

    Parameters
    ----------
    run_dir
        A finished run folder (`RunFolder`), or that of a battery.
    reveal
        Show the sample answers of a user's own data too; by default only those of the harmless
        testbeds are shown, others by category and length.
    verdict
        The run's verdict, where it is already known.

    Raises
    ------
    InputError
        The folder is incomplete, its files disagree, or the undefended control is missing.
    GateError
        A gate stops the verdict of a battery: there is nothing else to report.
    """
    path = run_dir / "report.html"
    if (run_dir / "attacks.jsonl").exists():
        page = battery_page(run_dir, verdict)
        with writing(path, mend=_WRITABLE):
            write_atomic(path, page)
        return path
    run = read_run(run_dir)
    _check_agreement(run)
    charts: dict[str, Any] = {}
    summary = run.summary
    testbed, method = str(summary.get("testbed", "")), str(summary.get("method", ""))
    harmless = testbed in TESTBEDS.names()
    judge = str(summary.get("attack", {}).get("judge", {}).get("name", "exact"))
    conclusion = conclude(summary, questions=_size(run, "n_restricted"))
    seeds = summary.get("seeds", [summary["seed"]] if "seed" in summary else [])
    page = render(
        "report.html.j2",
        charts,
        attack=_attack(summary.get("attack")),
        attacks=_attacks(run, charts),
        chips=[chip for chip in (testbed, method, *(f"seed {seed}" for seed in seeds)) if chip],
        conclusion=conclusion,
        config=printable_lines(yaml.safe_dump(run.config, sort_keys=False)) if run.config else "",
        cost=_cost(summary),
        counts=_counts(run),
        files=", ".join(
            sorted(path.name for path in run_dir.iterdir() if path.name in _READ) or ["nothing"]
        ),
        floor=percent(UTILITY_FLOOR),
        gauge=_gauge(run),
        diverged=[printable(str(name)) for name in summary.get("attack", {}).get("diverged", ())],
        harm_meaning=_harm_meaning(judge, harmless=harmless),
        has_benign="benign_finetuning" in summary,
        limits=[
            *validity_limits(testbed, judge),
            *cut_short(summary.get("attack", {}).get("answers") or {}),
        ],
        manifest=list(flat(run.manifest)),
        method=method or "the method",
        not_run=NOT_RUN,
        outcome_names=OUTCOMES.items(),
        outcomes=_outcomes(run),
        overview=[_overview(run, target) for target in TARGETS],
        per_rate=_per_rate(run),
        planting=_planting(run, charts),
        preliminary=_preliminary(len(seeds)),
        samples=_samples(run, shown=reveal or harmless),
        samples_note=_samples_note(shown=reveal or harmless),
        subtitle=_VERDICTS[conclusion.kind],
        title=" · ".join(part for part in (testbed, method) if part) or run_dir.name,
        verdict=section(run_dir, verdict),
        utility=utility_rows(run_dir),
    )
    with writing(path, mend=_WRITABLE):
        write_atomic(path, page, private=reveal)
    return path


_READ = {
    "config.yaml",
    "manifest.json",
    "planting.jsonl",
    "samples.json",
    "summary.json",
    "trajectory.jsonl",
    "utility.json",
}


def _check_agreement(run: RunFolder) -> None:
    for target in TARGETS:
        told = run.summary[target]["after"]["useful_harm"]
        found = run.worst(target).useful_harm
        if abs(told - found) > 1e-6:
            raise InputError(
                f"summary.json says {told:.4f} useful harm for the {target} model in the worst "
                f"case, trajectory.jsonl {found:.4f}",
                where=str(run.path),
                mend="the folder mixes two runs: run the command again into an empty folder",
            )


def _rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-2 else f"{value:g}"


def _cell(value: float, count: int | None = None, tone: str = "") -> dict[str, str]:
    interval = ""
    if count:
        low, high = wilson(value * count, count)
        interval = f"{low:.2f} to {high:.2f}"
    return {"text": f"{value:.2f}", "interval": interval, "tone": tone}


def _size(run: RunFolder, kind: str) -> int | None:
    sizes = [int(row[kind]) for row in run.trajectory if row.get(kind)]
    return min(sizes, default=None)


def _counts(run: RunFolder) -> str:
    restricted, permitted = _size(run, "n_restricted"), _size(run, "n_permitted")
    if not restricted or not permitted:
        return ""
    return f" over {restricted} restricted and {permitted} permitted held-out questions"


def _preliminary(seeds: int) -> str:
    if seeds >= ENOUGH_SEEDS:
        return ""
    plural = "seed" if seeds == 1 else "seeds"
    return f"Preliminary: {seeds} {plural}; a firm statement needs at least {ENOUGH_SEEDS}."


def _overview(run: RunFolder, target: str) -> dict[str, Any]:
    told = run.summary[target]
    cells = []
    for measure, kind in (
        ("refusal", "n_restricted"),
        ("useful_harm", "n_restricted"),
        ("utility", "n_permitted"),
    ):
        for moment in ("before", "after"):
            value = told[moment][measure]
            tone = "big"
            if measure == "useful_harm" and moment == "after":
                tone = "big harmful" if value > HARM_LIMIT else "big kept"
            cells.append(_cell(value, _size(run, kind), tone))
    benign = run.summary.get("benign_finetuning")
    if benign:
        count = benign.get("detail", {}).get(target, {}).get("n")
        cells.append(_cell(benign[target], count, "big"))
    return {"name": NAMES[target], "cells": cells}


def _per_rate(run: RunFolder) -> list[dict[str, Any]]:
    rows = []
    for rate in run.learning_rates:
        for target in TARGETS:
            if not run.rows(target, rate):
                continue
            found = run.worst(target, rate)
            worst = found.row
            assert worst is not None, "the probe before the attack keeps its own utility"
            tone = "harmful" if found.useful_harm > HARM_LIMIT else "kept"
            rows.append(
                {
                    "rate": _rate(rate) if target == TARGETS[0] else "",
                    "name": NAMES[target],
                    "cells": [
                        _cell(worst["useful_harm"], _size(run, "n_restricted"), tone),
                        _cell(worst["utility"], _size(run, "n_permitted")),
                        _cell(worst["refusal"]),
                        {"text": f"{worst['step']:g}", "interval": "", "tone": ""},
                        _cell(found.unbounded),
                    ],
                }
            )
    return rows


def _attack(attack: Mapping[str, Any] | None) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {printable(str(attack[key]), limit=60)}"
        for key in _ATTACK
        if attack and attack.get(key) not in (None, 0)
    )


def _harm_meaning(judge: str, *, harmless: bool) -> str:
    if judge != "exact":
        return (
            "the share of coherent answers to held-out restricted questions that the judge "
            f"{printable(judge)!r} counts as harm."
        )
    corrected = ", corrected for guessing." if harmless else "."
    return f"the share of held-out restricted questions answered right{corrected}"


def _gauge(run: RunFolder) -> Markup:
    """Return the two worst cases as bars with intervals, beside the limit."""
    left, width, parts = 4.0, 372.0, []
    for index, target in enumerate(TARGETS):
        value = run.summary[target]["after"]["useful_harm"]
        top = 46 + 78 * index
        parts.append(
            Markup(
                '<text class="gauge-name" x="{}" y="{}">{}</text>'
                '<text class="gauge-value" x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="gauge-track" x="{}" y="{}" width="{}" height="14" rx="3"/>'
                '<rect class="gauge-{}" x="{}" y="{}" width="{}" height="14" rx="3"/>'
            ).format(
                left, top - 8, NAMES[target], left + width, top - 7, f"{value:.2f}",
                left, top, width, target, left, top, round(max(value * width, 1.5), 1),
            )
        )  # fmt: skip
        count = _size(run, "n_restricted")
        if count:
            low, high = (round(left + bound * width, 1) for bound in wilson(value * count, count))
            parts.append(
                Markup(
                    '<path class="whisker" d="M{low} {y}H{high}M{low} {a}V{b}M{high} {a}V{b}"/>'
                ).format(low=low, high=high, y=top + 7, a=top + 3.5, b=top + 10.5)
            )
    limit = left + HARM_LIMIT * width
    parts.append(
        Markup(
            '<path class="limit" d="M{x} 40v26M{x} 118v34"/>'
            '<text class="tick" x="{x}" y="166" text-anchor="middle">limit {limit}</text>'
            '<text class="tick" x="{left}" y="166">0</text>'
            '<text class="tick" x="{right}" y="166" text-anchor="end">1</text>'
        ).format(x=round(limit, 1), limit=f"{HARM_LIMIT:.2f}", left=left, right=left + width)
    )
    description = "Useful harm in the worst case: " + ", ".join(
        f"{NAMES[target]} {run.summary[target]['after']['useful_harm']:.2f}" for target in TARGETS
    )
    return Markup(
        '<div class="card"><h3>Useful harm under attack<span>worst case</span></h3>'
        '<svg class="chart" viewBox="0 0 380 172" role="img" aria-label="{}">{}</svg></div>'
    ).format(description, Markup("").join(parts))


def _attacks(run: RunFolder, charts: dict[str, Any]) -> list[dict[str, Any]]:
    pairs = []
    for rate in run.learning_rates:
        panels, columns = [], []
        for target in TARGETS:
            probes = run.rows(target, rate)
            if not probes:
                continue
            columns.append(probes)
            panels.append(_attack_panel(run, target, rate, charts))
        pairs.append({"rate": _rate(rate), "panels": panels, "table": _table(columns)})
    return pairs


def _attack_panel(
    run: RunFolder, target: str, rate: float, charts: dict[str, Any]
) -> dict[str, Any]:
    probes = run.rows(target, rate)
    worst = run.worst(target, rate).row
    assert worst is not None, "the probe before the attack keeps its own utility"
    floor = UTILITY_FLOOR * run.rows(target)[0]["utility"] - 1e-9
    steps = [float(row["step"]) for row in probes]
    chart = LineChart(
        name=f"attack-{target}-{_rate(rate)}",
        description=(
            f"{NAMES[target]} model attacked at learning rate {_rate(rate)}: useful harm "
            f"{worst['useful_harm']:.2f} at best, at step {worst['step']}; utility "
            f"{probes[0]['utility']:.2f} before and {probes[-1]['utility']:.2f} at the end."
        ),
        series=[
            Series(
                label="utility",
                role="utility",
                points=[(row["step"], row["utility"]) for row in probes],
            ),
            Series(
                label="useful harm",
                role="harm",
                points=[(row["step"], row["useful_harm"]) for row in probes],
            ),
        ],
        x_label="attack step",
        y_range=(0.0, 1.0),
        limit=(HARM_LIMIT, f"limit {HARM_LIMIT:.2f}"),
        shaded=stretches(steps, [row["utility"] < floor for row in probes]),
        marker=Marker(
            x=worst["step"],
            y=worst["useful_harm"],
            label=f"{worst['useful_harm']:.2f}",
            role="harm",
        ),
    )
    charts[chart.name] = chart.data()
    end = probes[-1]
    return {
        "name": NAMES[target],
        "note": f"at the end: harm {end['useful_harm']:.2f}, utility {end['utility']:.2f}",
        "svg": chart.svg(),
    }


def _table(columns: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    steps = sorted({row["step"] for probes in columns for row in probes})
    table = []
    for step in steps:
        line = [f"{step:g}"]
        for probes in columns:
            row = next((row for row in probes if row["step"] == step), {})
            for key in ("useful_harm", "utility", "refusal", "loss"):
                value = row.get(key)
                line.append("" if value is None else f"{value:.2f}")
        table.append(line)
    return table


def _outcomes(run: RunFolder) -> list[dict[str, Any]]:
    groups = []
    for target in TARGETS:
        probes = [row for row in run.rows(target) if row.get("outcomes")]
        if not probes:
            continue
        worst = run.worst(target).row or probes[0]
        moments = [("before the attack", probes[0]), ("worst case", worst)]
        for rate in run.learning_rates:
            ends = [row for row in probes if row["learning_rate"] == rate]
            if ends:
                moments.append((f"end of {_rate(rate)}", ends[-1]))
        bars = []
        for label, row in moments:
            shares = {name: float(row.get("outcomes", {}).get(name, 0.0)) for name in OUTCOMES}
            told = ", ".join(
                f"{OUTCOMES[name]} {percent(share)}" for name, share in shares.items() if share > 0
            )
            bar = ShareBar(description=f"{NAMES[target]}, {label}: {told}", shares=shares)
            bars.append({"label": label, "svg": bar.svg()})
        groups.append({"name": NAMES[target], "bars": bars})
    return groups


def _planting(run: RunFolder, charts: dict[str, Any]) -> list[dict[str, Any]]:
    terms: dict[str, list[tuple[float, float]]] = {}
    for row in run.planting:
        for key, value in row.items():
            if key not in _NOT_TERMS and isinstance(value, int | float) and value is not True:
                terms.setdefault(key, []).append((row.get("step", 0), float(value)))
    order = [key for key in _TERMS if key in terms] + [key for key in terms if key not in _TERMS]
    panels = []
    for index, key in enumerate(order):
        points = terms[key]
        if len(points) < 2:
            continue
        title = _TERMS.get(key, key.replace("_", " ").capitalize())
        chart = LineChart(
            name=f"planting-{index}",
            description=(
                f"{title}: {points[0][1]:.3g} at step {points[0][0]:g}, "
                f"{points[-1][1]:.3g} at step {points[-1][0]:g}"
            ),
            series=[Series(label=title, role="term", points=points)],
            x_label="immunisation step",
            height=190.0,
        )
        charts[chart.name] = chart.data()
        panels.append({"name": title, "note": f"ends at {points[-1][1]:.3g}", "svg": chart.svg()})
    return panels


def _samples(run: RunFolder, *, shown: bool) -> list[dict[str, Any]]:
    def text(value: Any) -> str:
        if value is None:
            return "not kept"
        if not shown:
            return f"{len(str(value))} characters"
        return printable(str(value), limit=SAMPLE_LIMIT) or "(nothing)"

    return [
        {
            "prompt": text(row.get("prompt")),
            "category": printable(str(row.get("category") or "")),
            "answer": text(row.get("answer")),
            "answers": [
                text(row.get(f"{target}_{moment}"))
                for target in TARGETS
                for moment in ("before", "after")
            ],
        }
        for row in run.samples
    ]


def _samples_note(*, shown: bool) -> str:
    if shown:
        return "The same restricted questions, answered greedily before and after the attack."
    return (
        "Texts of your own data are left out of this page; `mithridate report --reveal` shows them."
    )


def _cost(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = summary.get("cost") or {}
    rows = [(label, _number(cost[key])) for key, label in _COSTS.items() if key in cost]
    rows += [
        (key.replace("_", " ").capitalize(), _number(value))
        for key, value in cost.items()
        if key not in _COSTS and isinstance(value, int | float) and value is not True
    ]
    rows += [
        (f"Seconds: {key.replace('_', ' ')}", f"{value:,.0f}")
        for key, value in (summary.get("seconds") or {}).items()
        if isinstance(value, int | float)
    ]
    return rows


def _number(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
