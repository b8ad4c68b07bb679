"""`mithridate economics`: who pays, how much, and where the asymmetry does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mithridate.cli.console import Json, out
from mithridate.configs import LARGEST_SEED

_RIVALS = ("monitor", "input_filter", "moderation")


def economics(
    cost: Annotated[
        Path | None,
        typer.Option(help="What `mithridate cost --json` printed; else modelled.", dir_okay=False),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of demo or attack, once a seed; or of redteam.", file_okay=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Price at the size of this model.  [default: llama-2-7b]"),
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(help="Price at this many parameters, instead of a shape.")
    ] = None,
    constants: Annotated[
        Path | None, typer.Option(help="YAML that overrides constants.", dir_okay=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Useful harm that counts as broken.  [default: half the control's]"),
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Of every distribution.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the draws.")] = 0,
    json_output: Json = False,
) -> dict[str, Any]:
    """Show who pays: developer, attacker, users."""
    from mithridate.configs import require
    from mithridate.economics import EconomicsPlan, run_economics

    require(
        shape is None or parameters is None,
        "--shape and --parameters both give the size of the model",
        "leave one of them out",
    )
    if shape is not None:
        from mithridate.measures.shapes import find_shape

        parameters = float(find_shape(shape).parameters())
    plan = EconomicsPlan(
        cost=cost,
        runs=tuple(run or ()),
        constants=constants,
        threshold=threshold,
        draws=draws,
        seed=seed,
        **({} if parameters is None else {"parameters": parameters}),
    )
    document = run_economics(plan)
    if not json_output:
        show_account(document)
    return document


def show_account(document: Mapping[str, Any]) -> None:
    """Print the account: each number with the central 95 % of its draws."""
    from rich.text import Text

    console = out()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    line(
        f"At {document['parameters']:.3g} parameters, USD, values [95 % of "
        f"{document['draws']:,} draws of the constants]",
        "dim",
    )
    console.print()
    _table(
        "once",
        ("compute", "with all else", "re-immunising", "source"),
        {
            name: [
                *(_cell(bill[key]) for key in ("compute", "total", "re_immunisations")),
                bill["source"],
            ]
            for name, bill in document["alignment"].items()
        },
    )
    _table(
        "per query",
        ("USD",),
        {_words(name): [_cell(cost)] for name, cost in document["per_query"].items()},
    )
    _table(
        "break-even, queries",
        tuple(map(_words, _RIVALS)),
        {
            name: [_cell(rivals[rival]["in_full"]) for rival in _RIVALS]
            for name, rivals in document["break_even"].items()
        },
    )
    if "attacker" in document:
        _table(
            "the attacker",
            ("FLOP", "USD"),
            {
                _words(name): [_cell(bill["flops"]), _cell(bill["dollars"])]
                for name, bill in document["attacker"].items()
            },
        )
        _table(
            "public beside it",
            ("asymmetry index", "at least", "times the cost", "cap"),
            {
                name: [
                    _cell(entry["index"], infinite="-inf"),
                    _cell(entry["index_at_least"], infinite="-inf"),
                    _cell(entry["multiplier_at_least"]),
                    _cell(entry["cap"]),
                ]
                for name, entry in document["asymmetry"].items()
            },
        )
    line(f"Downstream users together: {_cell(document['users']['cost'])} USD")
    for name, entry in document.get("leverage", {}).items():
        line(f"Attackers' extra USD per USD of developer and users, public: {name}: {_cell(entry)}")
    console.print()
    line("Where the asymmetry does not hold", "bold")
    for sentence in document["does_not_hold"]:
        line(f"- {sentence}")
    console.print()
    line("Beside every number", "bold")
    for sentence in document["caveats"]:
        line(f"- {sentence}")


def _table(first: str, columns: tuple[str, ...], rows: Mapping[str, list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column(first, style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(Text(name), *map(Text, cells))
    out().print(table)
    out().print()


def _cell(quantity: Mapping[str, float | None], *, infinite: str = "inf") -> str:
    from mithridate.economics.sentences import show

    value, low, high = (show(quantity[name], infinite) for name in ("value", "low", "high"))
    return value if value == low == high else f"{value} [{low}, {high}]"


def _words(name: str) -> str:
    return name.replace("_", " ")
