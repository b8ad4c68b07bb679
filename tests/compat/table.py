"""Every method on every family: the table of docs/compatibility.md, printed by `make compat`.

python -m tests.compat.table --page docs/compatibility.md --workers 2
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from mithridate.files import write_atomic
from mithridate.provenance import provenance
from tests.compat.runs import OPTIONS, SPACES, Outcome, family_table
from tests.compat.zoo import FAMILIES, MULTIMODAL

Table = dict[str, dict[tuple[str, str], Outcome]]


def main() -> None:
    """Try every combination, print those that do not work, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=[*FAMILIES, *MULTIMODAL])
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the table there, in Markdown")
    given = parser.parse_args()
    started = time.monotonic()
    table: Table = {}
    context = get_context("forkserver")
    with ProcessPoolExecutor(given.workers, mp_context=context) as pool:
        tried = pool.map(partial(_of_family, methods=given.methods), given.families)
        for family, outcomes in zip(given.families, tried, strict=True):
            table[family] = outcomes
            works = sum(one.status == "works" for one in outcomes.values())
            print(f"{family}: {works} of {len(outcomes)}", flush=True)
            for place, one in outcomes.items():
                if one.status == "fault":
                    print(f"  {' '.join(place)}: {one.reason}", flush=True)
    minutes = (time.monotonic() - started) / 60
    counts = _counts(table)
    print(f"{counts}, {minutes:.1f} minutes")
    if given.page is not None:
        write_atomic(given.page, page(table, minutes))
    sys.exit(any(one.status == "fault" for found in table.values() for one in found.values()))


def _of_family(family: str, methods: list[str]) -> dict[tuple[str, str], Outcome]:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return family_table(family, methods, Path(folder))


def _counts(table: Table) -> str:
    found = [one.status for outcomes in table.values() for one in outcomes.values()]
    return ", ".join(f"{found.count(name)} {name}" for name in ("works", "refused", "fault"))


def page(table: Table, minutes: float) -> str:
    """Return the page: a row a family, a column a method, and the reasons of what is refused."""
    methods = list(dict.fromkeys(method for one in table.values() for method, _ in one))
    made = provenance("make compat", Path(__file__).parent)
    lines = [
        "# Architectures",
        "Every method is planted for two steps in a random model of about 30,000 weights of each "
        "family, in all weights and in a LoRA adapter; the released model is loaded again and "
        "attacked for one step, all through the calls behind `mithridate immunise` and "
        "`mithridate attack`. This shows that the code meets the architecture, not how well a "
        "method works.",
        f"{_counts(table)}; `{made['command']}`, {made['date']}, commit {made['commit']}, "
        f"{made['machine']}, {minutes:.0f} minutes. **both**: in all weights and in an adapter; "
        "**full**, **lora**: in these only; a number is a reason below.",
    ]
    reasons: dict[str, int] = {}
    rows = []
    for family, outcomes in table.items():
        cells = [_cell(method, outcomes, reasons) for method in methods]
        rows.append(f"| `{family}` | {' | '.join(cells)} |")
    head = f"| family | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}"
    lines.append("\n".join([head, *rows]))
    lines.append("\n".join(f"{number}. {reason}" for reason, number in reasons.items()))
    return "\n\n".join(lines) + "\n"


def _cell(method: str, outcomes: dict[tuple[str, str], Outcome], reasons: dict[str, int]) -> str:
    works = [space for space in SPACES if outcomes[method, space].status == "works"]
    why = {
        f"{outcomes[method, space].status}: {outcomes[method, space].reason}"
        for space in SPACES
        if space not in works
    }
    numbers = sorted(reasons.setdefault(one, len(reasons) + 1) for one in why)
    told = "both" if len(works) == len(SPACES) else "".join(works)
    return " ".join([*([told] if told else []), *map(str, numbers)])


if __name__ == "__main__":
    main()
