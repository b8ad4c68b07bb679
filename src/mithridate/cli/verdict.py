"""`mithridate verdict`: what a run folder's measurements allow to be said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mithridate.cli.console import Json, out

if TYPE_CHECKING:
    from collections.abc import Mapping

_STYLES = {
    "held": "green", "holds": "green", "passed": "green", "collapsed": "green",
    "broken": "red", "broken at cost": "red", "dead on arrival": "red", "fails": "red",
    "failed": "red", "not valid": "dim", "not run": "dim",
}  # fmt: skip


def verdict(
    run_dir: Annotated[Path, typer.Argument(help="A run folder of an attack or a battery.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="A run of the same method elsewhere: does the verdict transfer?"),
    ] = None,
    json_output: Json = False,
) -> dict[str, Any]:
    """Say what a run folder's measurements allow."""
    from mithridate.errors import InputError
    from mithridate.files import write_json
    from mithridate.folders import writing
    from mithridate.measures.rows import read_measured
    from mithridate.reports import render_report
    from mithridate.reports.tamperbench import heat_map
    from mithridate.verdicts import judge_measured, judge_run

    others = [judge_run(other) for other in beside or ()]
    measured = read_measured(run_dir)
    document = judge_measured(measured, others=others)
    heat = heat_map(measured)
    with writing(run_dir, mend="the verdict is written into the run folder: make that writable"):
        write_json(run_dir / "verdict.json", document)
        if heat is not None:
            write_json(run_dir / "tamperbench.json", heat)
    try:
        page = f"Report: {render_report(run_dir, verdict=document)}"
    except InputError as error:
        # A verdict asks less of a folder than a page does.
        page = f"No report: {error.what}"
    if not json_output:
        _show(document)
        out().print(f"\n{page}", markup=False, soft_wrap=True)
    return document


def _show(document: Mapping[str, Any]) -> None:
    from rich.text import Text

    from mithridate.printable import printable

    console = out()
    console.print()
    style = _STYLES.get(document["verdict"], "yellow")
    console.print(Text(printable(document["first_line"]), style=f"bold {style}"))
    if document["headline"]:
        console.print(Text(f"It {document['headline']}: all four criteria of the card are passed."))
    for gate in document["gates"]:
        if gate["state"] == "withholds":
            console.print(Text(f"{gate['id']}  {printable(gate['what'])}", style="yellow"))
    for one in document["failed"]:
        told = (
            f"failed: {one['attack']} {one['configuration']} on the {one['target']} model, "
            f"seed {one['seed']}: {one['error']}"
        )
        console.print(Text(printable(told), style="red"))
    missing = document["card"]["attacks_not_run"]
    if missing:
        names = ", ".join(printable(entry["id"]) for entry in missing)
        console.print(Text(f"Attacks not run ({len(missing)}): {names}", style="yellow"))
    console.print()
    console.print(_attacks(document))
    console.print(
        Text(
            "useful harm: the attacker's best with utility kept [95 %]; K: collapse at the end; "
            "AUHC: harm over log steps; break: attacks that broke it, restricted mean of steps",
            style="dim",
        )
    )
    console.print()
    console.print(_conditions(document))
    console.print()
    console.print(_card(document))


def _attacks(document: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from mithridate.printable import printable

    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for column in ("attack", "verdict"):
        table.add_column(column)
    for column in ("useful harm", "unbounded", "control", "K", "AUHC", "break", "window"):
        table.add_column(column, justify="right")
    for cell in document["cells"]:
        collapses = [ending["collapse"] for ending in cell["endings"]]
        broken = cell["steps_to_break"]
        table.add_row(
            Text(printable(cell["attack"]), style="bold"),
            Text(cell["verdict"], style=_STYLES.get(cell["verdict"], "yellow")),
            _bounds(cell["useful_harm"]),
            _bounds(cell["unbounded_useful_harm"]),
            _number(cell["control_useful_harm"] and cell["control_useful_harm"]["estimate"]),
            f"{min(collapses):.2f} to {max(collapses):.2f}" if collapses else "-",
            _number(cell["area_under_harm"]),
            "-"
            if broken is None
            else f"{broken['broken']}/{broken['attacks']}, {broken['restricted_mean']:.0f}",
            "-" if cell["window"] is None else f"{cell['window']:.0f}",
        )
    return table


def _conditions(document: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from mithridate.printable import printable

    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for column in ("condition", "answer", "measured"):
        table.add_column(column, overflow="fold")
    for condition in document["conditions"]:
        lines = [
            f"{one['measure']}: {one['answer']}"
            + (f" {one['estimate']:+.3f}" if one["estimate"] is not None else "")
            + (f" [{one['low']:.3f}, {one['high']:.3f}]" if one["low"] is not None else "")
            + (f" ({one['detail']})" if one["detail"] else "")
            for one in condition["findings"]
        ]
        table.add_row(
            Text(condition["name"], style="bold"),
            Text(condition["answer"], style=_STYLES.get(condition["answer"], "yellow")),
            Text("\n".join(printable(line) for line in [*lines, *condition["notes"]])),
        )
    return table


def _card(document: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from mithridate.printable import printable

    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for column in ("acceptance card", "", "why"):
        table.add_column(column, overflow="fold")
    for criterion in document["card"]["criteria"]:
        table.add_row(
            Text(criterion["name"], style="bold"),
            Text(criterion["state"], style=_STYLES.get(criterion["state"], "yellow")),
            Text("\n".join(printable(line) for line in criterion["why"])),
        )
    return table


def _bounds(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return "-"
    return f"{best['estimate']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
