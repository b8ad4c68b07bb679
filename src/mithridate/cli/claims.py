"""`mithridate claims`: what was published, what is measured here, what follows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mithridate.cli.console import Json, out

_STYLES = {
    "reproduced": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not_comparable": "dim",
    "not_run": "dim",
}


def claims(
    testbed: Annotated[str, typer.Option(help="lattice or atlas.")],
    results: Annotated[
        Path,
        typer.Option(
            help="Result files of the benchmarks; what is measured here is kept there.",
            file_okay=False,
        ),
    ] = Path("benchmarks/results"),
    page: Annotated[
        Path | None, typer.Option(help="Write the table there, in Markdown.", dir_okay=False)
    ] = None,
    json_output: Json = False,
) -> dict[str, Any]:
    """Hold published claims against measurements."""
    from mithridate.claims import ClaimsPlan, run_claims
    from mithridate.claims.page import claims_page
    from mithridate.cli.progress import listening
    from mithridate.files import write_atomic

    with listening() as listener:
        document = run_claims(ClaimsPlan(testbed=testbed, results=results), on_event=listener)
    if page is not None:
        write_atomic(page, claims_page(document))
    if not json_output:
        show_claims(document, page)
    return document


def show_claims(document: Mapping[str, Any], page: Path | None) -> None:
    """Print each claim with its verdict and the reason."""
    from rich.table import Table
    from rich.text import Text

    from mithridate.claims.page import value
    from mithridate.printable import printable

    console = out()
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("claim", "verdict", "measured here"):
        table.add_column(column, overflow="fold")
    for one in document["claims"]:
        lines = [f"{m['subject']}: {m['quantity']} {value(m)}" for m in one["measured"]]
        verdict = one["verdict"].replace("_", " ") + (
            " (preliminary)" if one["preliminary"] else ""
        )
        table.add_row(
            Text(one["claim"], style="bold"),
            Text(one["statement"]),
            Text(verdict, style=_STYLES[one["verdict"]]),
            Text("\n".join(map(printable, lines or [one["reason"]]))),
        )
    console.print(table)
    told = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in document["counts"].items())
    console.print(Text(f"\n{told}"), soft_wrap=True)
    if page is not None:
        console.print(Text(f"Page: {page}"), soft_wrap=True)
