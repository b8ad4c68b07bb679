"""`mithridate immunise`: plant a defence in a user's own model with the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mithridate.cli.console import Columns, DropInvalid, Json, OutputDir, is_main_process, out
from mithridate.configs import LARGEST_SEED

File = Annotated[
    str | None,
    typer.Option(
        help="JSON, JSON Lines, CSV, Parquet, a saved data set, or a Hub id.", metavar="FILE"
    ),
]


def immunise(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the aligned model.")],
    method: Annotated[str, typer.Option(help="Name of a defence (`mithridate methods`).")],
    output_dir: OutputDir,
    harmful: File = None,
    refusal: File = None,
    benign: File = None,
    general: File = None,
    prompts: File = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with the sections `method:` and `training:`.", dir_okay=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides training.steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Overrides training.seed.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model on the Hub.")] = None,
    columns: Columns = None,
    drop_invalid: DropInvalid = False,
    json_output: Json = False,
) -> dict[str, Any]:
    """Plant a defence in your own model."""
    from mithridate.cli.progress import listening
    from mithridate.examples import Reading, parse_columns
    from mithridate.immunisation import ImmunisationPlan, run_immunisation
    from mithridate.reports.model_card import write_model_card

    given = {
        "harmful": harmful,
        "refusal": refusal,
        "benign": benign,
        "general": general,
        "prompts": prompts,
    }
    plan = ImmunisationPlan(
        model=model,
        revision=revision,
        method=method,
        streams={name: source for name, source in given.items() if source is not None},
        config=config,
        steps=steps,
        seed=seed,
        reading=Reading(columns=parse_columns(columns or (), [*given]), drop_invalid=drop_invalid),
        output_dir=output_dir,
    )
    with listening() as listener:
        document = run_immunisation(plan, on_event=listener)
    if not is_main_process():
        return document
    write_model_card(output_dir, base=model, revision=revision)
    if not json_output:
        out().print(f"Immunised with {method} in {document['seconds']:.0f} s.", markup=False)
        out().print(f"Model: {document['model']}", markup=False, soft_wrap=True)
    return document
