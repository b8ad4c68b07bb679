"""`mithridate methods`: what can be planted, and what each one needs."""

from __future__ import annotations

from typing import Any

from mithridate.cli.console import Json, out


def methods(json_output: Json = False) -> dict[str, Any]:
    """List the defences and what they cost."""
    from mithridate.methods import METHODS

    found = [describe(METHODS.load(name)) for name in METHODS.names()]
    if not json_output:
        _show(found)
    return {"methods": found}


def describe(method_class: Any) -> dict[str, Any]:
    """Return a method's own description, with the default configuration's needs and cost."""
    method = method_class(method_class.config_class())
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "streams": list(method.streams),
        "spaces": list(method.spaces),
        "passes_per_step": method.passes_per_step,
        "parameter_buffers": method.parameter_buffers,
        "defends": method.defends,
        "limits": method.limits,
    }


def _show(found: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    for column in ("passes", "buffers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it does, needs and does not do", overflow="fold")
    for entry in found:
        lines = (
            escape(entry["summary"]),
            f"[dim]paper[/]    {escape(entry['paper'])}",
            f"[dim]streams[/]  {escape(', '.join(entry['streams']))}   "
            f"[dim]weights[/]  {escape(', '.join(entry['spaces']))}",
            f"[dim]defends[/]  {escape(entry['defends'])}",
            f"[dim]limits[/]   {escape(entry['limits'])}",
            "",
        )
        table.add_row(
            escape(entry["name"]),
            f"{entry['passes_per_step']:g}",
            str(entry["parameter_buffers"]),
            "\n".join(lines),
        )
    out().print(table)
    out().print("passes: forward-backward passes a step; buffers: parameter-sized, beyond AdamW's.")
    out().print("Joined by +, methods are planted together: --method seam+tokenbuncher.")
