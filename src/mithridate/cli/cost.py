"""`mithridate cost`: what a step of each defence costs beside plain fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from mithridate.cli.console import Json, out

_GIB = 1024**3
_MIB = 1024**2


class Space(StrEnum):
    """Where the weights live that are trained."""

    FULL = "full"
    LORA = "lora"


def cost(
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights in the shape of: llama-2-7b, gemma2-9b, qwen2.5-7b, "
            "smollm2-135m, lattice.",
            metavar="NAME",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Defences, separated by commas, or all.", metavar="all|NAME,...")
    ] = "all",
    space: Annotated[Space, typer.Option(help="Train all weights or an adapter.")] = Space.FULL,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of every batch.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of every row.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for about so long; three steps of each at least.")
    ] = 600.0,
    json_output: Json = False,
) -> dict[str, Any]:
    """Measure what a step of each defence costs."""
    from mithridate.cli.progress import listening
    from mithridate.costing import CostPlan, run_cost

    named = [name.strip() for name in methods.split(",") if name.strip()]
    plan = CostPlan(
        model=model,
        shape=shape,
        methods=() if named == ["all"] else tuple(dict.fromkeys(named)),
        space=space.value,
        batch_size=batch_size,
        length=length,
        seconds=seconds,
    )
    with listening() as listener:
        document = run_cost(plan, on_event=listener)
    if not json_output:
        show_costs(document)
    return document


def show_costs(document: Mapping[str, Any]) -> None:
    """Print the measured table, the published one beside it, and what that leaves open."""
    from rich.table import Table
    from rich.text import Text

    console = out()
    machine = document["machine"]
    console.print(
        Text(
            f"{document['shape'] or document['model']}: {document['parameters']:,} parameters, "
            f"{document['trainable']:,} trained ({document['space']}), {document['precision']}, "
            f"{document['batch_size']} rows of {document['length']} tokens, {machine['device']}, "
            f"{machine['threads']} threads, torch {machine['torch']}"
        ),
        soft_wrap=True,
    )
    rows: Mapping[str, Mapping[str, Any]] = document["methods"]
    timed = {name: row for name, row in rows.items() if "not_timed" not in row}
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    for column in ("fwd", "bwd", "extra", "batches", "clock", "95 %", "CPU", "peak MiB", "memory",
                   "mem x time", "extra MiB", "buffers", "tokens", "generated", "GFLOP",
                   "FLOPs"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in timed.items():
        low, high = row["clock_ratio_interval"]
        table.add_row(
            Text(name),
            f"{row['forwards_per_step']:.3g}",
            f"{row['passes_per_step']:.3g}",
            f"{row['extra_passes']:+.3g}",
            f"{row['batch_equivalents']:.2f}",
            f"{row['clock_ratio']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row['cpu_ratio']:.2f}",
            f"{row['peak_memory_bytes'] / _MIB:,.0f}",
            f"{row['peak_memory_ratio']:.2f}",
            f"{row['memory_time_ratio']:.2f}",
            f"{row['extra_bytes'] / _MIB:+,.0f}",
            str(row["parameter_buffers"]),
            f"{row['tokens']:,.0f}",
            f"{row['generated_tokens']:,.0f}",
            f"{row['flops'] / 1e9:,.3g}",
            f"{row['flops_ratio']:.2f}",
        )
    console.print(table, soft_wrap=True)
    for name, row in rows.items():
        if "not_timed" in row:
            console.print(Text(f"{name}: not timed: {row['not_timed']}"), soft_wrap=True)
    console.print(
        Text(
            "per optimiser step; extra: backward calls more than SFT; batches: (forwards + 2 x "
            "graphs walked back) / 3; clock, CPU, memory, FLOPs: ratio to SFT; buffers: "
            "parameter-sized, declared",
            style="dim",
        ),
        soft_wrap=True,
    )
    if document["published"]:
        _show_published(document["published"], timed)


def _show_published(
    published: Mapping[str, Mapping[str, Any]], timed: Mapping[str, Mapping[str, Any]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    console = out()
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("published (measured)", style="bold", no_wrap=True)
    for column in ("extra gradient evaluations", "memory", "clock"):
        table.add_column(column, no_wrap=True)
    for name, entry in published.items():
        row = timed.get(name)
        measured = ("not timed",) * 3
        if row is not None:
            generated = row["generated_tokens"]
            measured = (
                f"{row['extra_passes']:.3g}" + (f", {generated:,.0f} tokens" if generated else ""),
                f"{row['extra_bytes'] / _GIB:+.2f} GiB, {row['peak_memory_ratio']:.2f}x; "
                f"x time {row['memory_time_ratio']:.2f}x",
                f"{row['clock_ratio']:.2f}x",
            )
        told = (entry["extra_gradient_evaluations"], entry["memory"], entry["clock"])
        table.add_row(
            Text(name), *(Text(f"{a} ({b})") for a, b in zip(told, measured, strict=True))
        )
    console.print()
    console.print(table, soft_wrap=True)
    for name, entry in published.items():
        for note in entry["notes"]:
            console.print(Text(f"{name}: {note}", style="dim"), soft_wrap=True)
