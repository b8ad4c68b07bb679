"""`mithridate methods`: what can be planted, what each defence needs, costs and is set by."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mithridate.cli.console import Json, out

_SPACES = {"full": "all weights", "lora": "a LoRA adapter"}


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Of defences (a+b for a composition); all where none is given."),
    ] = None,
    json_output: Json = False,
) -> dict[str, Any]:
    """List the defences, what they cost, and their options."""
    from mithridate.methods import METHODS
    from mithridate.methods.describe import describe

    found = [describe(METHODS.load(name)) for name in names or METHODS.names()]
    if not json_output:
        for entry in found:
            _show(entry)
        out().print("passes: backward calls of a step; buffers: parameter-sized, beyond AdamW's.")
        out().print("Options stand in the section method: of --config, written as in YAML.")
        out().print("Joined by +, methods are planted together: --method seam+tokenbuncher.")
    return {"methods": found}


def _show(entry: dict[str, Any]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = out()
    console.print(Text.assemble((entry["name"], "bold"), "  ", entry["summary"]))
    facts = Table.grid(padding=(0, 1))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("paper", Text(entry["paper"]))
    facts.add_row("streams", Text(", ".join(entry["streams"]) or "none"))
    facts.add_row("trains", Text(" or ".join(_SPACES[space] for space in entry["spaces"])))
    passes, buffers = entry["passes_per_step"], entry["parameter_buffers"]
    per_step = f"{passes:g} {'pass' if passes == 1 else 'passes'} per step"
    facts.add_row("costs", Text(f"{per_step}, {buffers} {'buffer' if buffers == 1 else 'buffers'}"))
    facts.add_row("defends", Text(f"against {entry['defends']}"))
    facts.add_row("limits", Text(entry["limits"]))
    console.print(Padding(facts, (0, 0, 0, 2), expand=False))
    options = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    options.add_column("option", no_wrap=True)
    for column in ("default", "takes", "what it is"):
        options.add_column(column, overflow="fold")
    for option in entry["options"]:
        options.add_row(
            Text(option["name"]),
            Text(json.dumps(option["default"])),
            Text(option["values"]),
            Text(option["help"]),
        )
    console.print(Padding(options, (0, 0, 1, 2), expand=False))
