"""`mithridate demo`: the whole story in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mithridate.cli.console import Json, out
from mithridate.configs import LARGEST_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping


def demo(
    testbed: Annotated[
        str, typer.Option(help="atlas: a real 135M model; lattice: a tiny world, minutes.")
    ] = "atlas",
    method: Annotated[
        str | None,
        typer.Option(help="Defence to plant (`mithridate methods`); default: what holds best."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Immunisation steps; default: the testbed's.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of every random choice.")
    ] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Run folder; finished work in it is kept.  [default: runs/demo-…]"
        ),
    ] = None,
    json_output: Json = False,
) -> dict[str, Any]:
    """Immunise, attack, judge and report, in one go."""
    from mithridate.cli.progress import listening
    from mithridate.demo import DemoConfig, run_demo

    folder = output_dir or Path("runs") / f"demo-{testbed}-{method or 'best'}-{seed}"
    config = DemoConfig(testbed=testbed, method=method, steps=steps, seed=seed, output_dir=folder)
    with listening() as listener:
        summary: dict[str, Any] = run_demo(config, on_event=listener)
    if not json_output:
        show_summary(summary, folder)
    return summary


def show_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the one table, the conclusion above it and the report's path below."""
    from rich.table import Table
    from rich.text import Text

    from mithridate.reports.conclusion import HARM_LIMIT, conclude

    console = out()
    conclusion = conclude(summary)
    colour = {"holds": "green", "partly": "yellow", "fails": "red", "void": "dim"}[conclusion.kind]
    console.print()
    console.print(Text(conclusion.headline, style=f"bold {colour}"))
    for sentence in conclusion.sentences:
        console.print(Text(sentence))
    console.print()

    rates = [entry["learning_rate"] for entry in summary["undefended"]["per_learning_rate"]]
    benign, cost = summary.get("benign_finetuning"), summary.get("cost")
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("", "refusal", "useful harm", "utility"):
        table.add_column(column, justify="right" if column else "left")
    for rate in rates:
        table.add_column(f"at {rate:.0e}".replace("e-0", "e-"), justify="right")
    if benign:
        table.add_column("benign ft", justify="right")
    if cost:
        table.add_column("passes", justify="right")
        table.add_column("clock", justify="right")
    for target in ("undefended", "defended"):
        before, after = summary[target]["before"], summary[target]["after"]
        row = [Text(target, style="bold")]
        for measure in ("refusal", "useful_harm", "utility"):
            text = Text(f"{before[measure]:.2f} → ")
            style = ""
            if measure == "useful_harm":
                style = "red" if after[measure] > HARM_LIMIT else "green"
            row.append(text.append(f"{after[measure]:.2f}", style=style))
        row += [
            Text(f"{entry['useful_harm']:.2f}") for entry in summary[target]["per_learning_rate"]
        ]
        if benign:
            row.append(Text(f"{benign[target]:.2f}"))
        if cost:
            plain = target == "undefended"
            row.append(Text("1" if plain else f"{cost['passes_per_step']:g}"))
            row.append(Text("1" if plain else f"{cost['clock_ratio']:.1f}"))
        table.add_row(*row)
    console.print(table)
    console.print(
        Text(
            "before → after the attack at its worst; “at” columns: useful harm per learning rate",
            style="dim",
        )
    )
    report = folder / "report.html"
    if report.exists():
        console.print(Text(f"\nReport: {report}"))
