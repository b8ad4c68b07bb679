"""`mithridate audit`: whether the harmful set is complete, clean, disjoint, still current."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mithridate.cli.console import Columns, DropInvalid, Json, OutputDir, out
from mithridate.cli.immunise import File
from mithridate.configs import LARGEST_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping


def audit(
    output_dir: OutputDir,
    testbed: Annotated[
        str | None, typer.Option(help="Audit the sets of lattice or atlas instead of files.")
    ] = None,
    harmful: File = None,
    refusal: File = None,
    benign: File = None,
    general: File = None,
    prompts: File = None,
    attack: Annotated[str | None, typer.Option(help="The attacker's rows.", metavar="FILE")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Held-out restricted questions.", metavar="FILE")
    ] = None,
    observed: Annotated[
        list[str] | None,
        typer.Option(
            help="Newly observed prompts; once for each window, oldest first.", metavar="FILE"
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="Prompts to choose what to add next from.  [default: observed, else attack]",
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model: measures canary exposure.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model before immunisation, to compare with.")
    ] = None,
    canaries: Annotated[
        str | None, typer.Option(help="Made-up facts in the harmful set.", metavar="FILE")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="YAML: where each set comes from.", dir_okay=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with the section `audit:`.", dir_okay=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Overrides audit.seed.")
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Attack rows may stand in the harmful set.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure.")] = False,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show prompts, in files for your eyes only.")
    ] = False,
    columns: Columns = None,
    drop_invalid: DropInvalid = False,
    json_output: Json = False,
) -> dict[str, Any]:
    """Check a harmful set; exit code 1 when a gate fails."""
    from mithridate.audit import AuditPlan, run_audit
    from mithridate.cli.progress import listening
    from mithridate.examples import Reading, parse_columns
    from mithridate.files import write_atomic
    from mithridate.reports.audit_page import audit_page

    given = {
        "harmful": harmful,
        "refusal": refusal,
        "benign": benign,
        "general": general,
        "prompts": prompts,
    }
    plan = AuditPlan(
        testbed=testbed,
        streams={name: source for name, source in given.items() if source is not None},
        attack=attack,
        evaluation=evaluation,
        observed=tuple(observed or ()),
        pool=pool,
        model=model,
        reference=reference,
        canaries=canaries,
        manifest=manifest,
        config=config,
        seed=seed,
        overlap=overlap,
        strict=strict,
        reveal=reveal,
        reading=Reading(
            columns=parse_columns(
                columns or (), (*given, "attack", "eval", "observed", "pool", "canaries")
            ),
            drop_invalid=drop_invalid,
        ),
        output_dir=output_dir,
    )
    with listening() as listener:
        document = run_audit(plan, on_event=listener)
        page = output_dir / "audit.html"
        write_atomic(page, audit_page(document), private=reveal)
    if not json_output:
        _show(document, page)
    return document


def _show(document: Mapping[str, Any], page: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from mithridate.printable import printable
    from mithridate.reports.audit_page import headline

    colours = {"pass": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}
    console = out()
    console.print(Text(headline(document), style=f"bold {colours[document['verdict']]}"))
    console.print()
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for gate in document["gates"]:
        text = Text(gate["name"])
        text.append(f"  {printable(gate['measured'])}", style="dim")
        if gate["mend"]:
            text.append(f"\n→ {printable(gate['mend'])}", style="")
        table.add_row(Text(gate["status"], style=colours[gate["status"]]), text)
    console.print(table)
    console.print(Text(f"\nReport: {page}"), soft_wrap=True)
