"""`mithridate report`: a run folder as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mithridate.cli.console import Json, out


def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a demo, an attack or a battery.")],
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show sample answers of your own data too.")
    ] = False,
    json_output: Json = False,
) -> dict[str, Any]:
    """Write a run folder's report.html."""
    from mithridate.reports import render_report

    path = render_report(run_dir, reveal=reveal)
    if not json_output:
        out().print(f"Report: {path}", markup=False, soft_wrap=True)
    return {"report": str(path), "bytes": path.stat().st_size}
