"""`mithridate doctor`: what is installed here and what can run."""

from __future__ import annotations

from typing import Any

from mithridate.cli.console import Json, out

_GIB = 1024**3


def doctor(json_output: Json = False) -> dict[str, Any]:
    """Show what is here and what can run."""
    from mithridate.diagnosis import diagnose

    found = diagnose()
    if not json_output:
        _show(found)
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(Text(name), Text(value))

    device, precision = found["device"], found["precision"]
    row("versions", "  ".join(f"{name} {number}" for name, number in found["versions"].items()))
    row("device", f"{device['kind']}  {device['name']}")
    row("cores", f"{device['cores']} usable, {device['threads']} threads in torch")
    flags = ", ".join(precision["cpu_flags"]) or "none"
    row("bfloat16", f"{precision['verdict']}  (CPU flags: {flags})")
    row(
        "matmul",
        f"float32 {precision['float32_gflops']:.0f} GFLOP/s, "
        f"bfloat16 {precision['bfloat16_gflops']:.0f} GFLOP/s",
    )
    row("memory", f"{found['memory']['free'] / _GIB:.1f} GiB free")
    row("disk", f"{found['disk']['free'] / _GIB:.1f} GiB free at {found['disk']['cache']}")
    optional = found["optional"]
    row("optional", ", ".join(name for name in optional if optional[name]["version"]) or "none")
    for name, entry in optional.items():
        if not entry["version"]:
            row("missing", f"{name}: {entry['serves']}")
    out().print(table)
    out().print()
    for entry in found["can_run"]:
        mark = Text("✓ ", style="green") if entry["possible"] else Text("✗ ", style="red")
        out().print(mark + Text(entry["what"]) + Text(f"  {entry['note']}", style="dim"))
