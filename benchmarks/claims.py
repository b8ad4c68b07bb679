"""Hold published claims against what is measured here.

Reads the benchmarks' result files, makes the measurements that take minutes at most, and prints
every claim with its verdict; ``--page`` writes the table of docs/claims.md.

    python benchmarks/claims.py --testbed lattice --page docs/claims.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mithridate.cli.progress import listening
from mithridate.errors import InputError, RunStoppedError
from mithridate.files import write_atomic
from mithridate.printable import printable
from published.page import claims_page, value
from published.run import RESULTS, ClaimsPlan, run_claims

_STYLES = {
    "reproduced": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not_comparable": "dim",
    "not_run": "dim",
}


def main() -> None:
    """Judge the claims and show them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--testbed", required=True, help="lattice or atlas")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="result files of the benchmarks; what is measured here is kept there",
    )
    parser.add_argument("--page", type=Path, help="write the table there, in Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    try:
        with listening() as listener:
            document = run_claims(
                ClaimsPlan(testbed=given.testbed, results=given.results), on_event=listener
            )
    except (InputError, RunStoppedError) as error:
        sys.exit(str(error))
    if given.page is not None:
        write_atomic(given.page, claims_page(document))
    if given.json:
        print(json.dumps(document, indent=2))
    else:
        show_claims(document)


def show_claims(document: Mapping[str, Any]) -> None:
    """Print each claim with its verdict and the reason."""
    console = Console(highlight=False)
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


if __name__ == "__main__":
    main()
