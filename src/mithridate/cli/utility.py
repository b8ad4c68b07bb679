"""`mithridate utility`: what a model can do besides, by tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mithridate.cli.console import Json, OutputDir, out

if TYPE_CHECKING:
    from collections.abc import Mapping

_STYLES = {"holds": "green", "fails": "red"}


def utility(
    model: Annotated[str, typer.Option(help="Folder or Hub id, or TESTBED:aligned and the like.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas: ours (piqa, agnews, ...), task files (mine.yaml), or a "
            "testbed's questions (lattice:permitted, lattice:add).",
            metavar="T1,T2",
        ),
    ],
    output_dir: OutputDir,
    reference: Annotated[
        str | None, typer.Option(help="The model before immunisation, to compare with.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the public data.  [default: that of each task file]",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many items of each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests read at a time.")] = 16,
    plain: Annotated[bool, typer.Option("--plain", help="Leave the chat template out.")] = False,
    json_output: Json = False,
) -> dict[str, Any]:
    """Measure utility by tasks, offline."""
    from mithridate.cli.progress import listening
    from mithridate.utility import UtilityPlan, run_utility

    plan = UtilityPlan(
        model=model,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        output_dir=output_dir,
        reference=reference,
        data=data,
        limit=limit,
        batch_size=batch_size,
        plain=plain,
    )
    with listening() as listener:
        document = run_utility(plan, on_event=listener)
    if not json_output:
        _show(document)
    return document


def _show(document: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mithridate.printable import printable

    compared = "reference" in document
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("task")
    names = ["metric", "items", "chance", *(["reference"] if compared else []), "model"]
    for name in [*names, *(["difference", ""] if compared else [])]:
        table.add_column(name, justify="right")
    table.add_column("")
    for row in document["tasks"]:
        left_out = [] if row["counts"] else [f"not counted, needs {row['needs']:.2f}"]
        if row["model"]["truncated"]:
            left_out.append(f"{row['model']['truncated']} requests cut")
        table.add_row(
            Text(printable(row["task"]), style="bold"),
            Text(printable(row["metric"])),
            Text(str(row["n"])),
            Text(f"{row['chance']:.2f}"),
            *([_share(row["reference"])] if compared else []),
            _share(row["model"]),
            *_difference(row["difference"]),
            Text("; ".join(left_out), style="yellow"),
        )
    console = out()
    console.print()
    console.print(table)
    found = document["utility"]
    if found is None:
        console.print(Text("\nNo task counts: each is too near chance.", style="yellow"))
    else:
        values = [f"{name} {found[name]:.3f}" for name in ("reference", "model") if name in found]
        tasks = "1 task" if len(found["tasks"]) == 1 else f"{len(found['tasks'])} tasks"
        line = Text(f"\nutility over {tasks}: {', '.join(values)}  ")
        for part in _difference(found["difference"]):
            line.append_text(part).append("  ")
        console.print(line)
    told = "in brackets 95 % intervals over items; a task counts from chance + 0.1 on, and from 3 "
    told += "standard errors above it"
    if compared:
        told += "; differences, paired by item, with the 90 % interval of two one-sided tests"
    console.print(Text(told, style="dim"))


def _share(found: Mapping[str, Any]) -> Any:
    from rich.text import Text

    return Text(f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")


def _difference(found: Mapping[str, Any] | None) -> list[Any]:
    from rich.text import Text

    if found is None:
        return []
    interval = f"{found['estimate']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    said = {"holds": "kept within", "fails": "changed by more than"}
    answer = f"{said.get(found['answer'], 'undecided at')} {found['margin']:g}"
    return [Text(interval), Text(answer, style=_STYLES.get(found["answer"], "yellow"))]
