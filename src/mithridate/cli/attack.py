"""`mithridate attack`: fine-tuning or RL against one's own model and its undefended control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mithridate.cli.console import Columns, DropInvalid, Json, OutputDir, out
from mithridate.configs import LARGEST_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping


def attack(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the model to attack.")],
    harmful: Annotated[str, typer.Option(help="The attacker's rows.", metavar="FILE")],
    evaluation: Annotated[
        str, typer.Option("--eval", help="Held-out restricted questions.", metavar="FILE")
    ],
    output_dir: OutputDir,
    undefended: Annotated[
        str | None, typer.Option(help="The control: the model before immunisation.")
    ] = None,
    permitted: Annotated[
        str | None,
        typer.Option(help="Held-out permitted questions: utility.", metavar="FILE"),
    ] = None,
    kind: Annotated[
        Literal["sft", "rl"],
        typer.Option(help="Fine-tuning on the rows, or RL paid for their answers."),
    ] = "sft",
    judge: Annotated[
        str,
        typer.Option(
            help="Of restricted answers: exact, refusal, classifier:PATH or served:URL; options "
            "in the section `judge:`.",
            metavar="NAME[:SOURCE]",
        ),
    ] = "exact",
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="Once for each attack.  [default: 2e-5, 1e-4, 5e-4]"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with the sections `attack:`, `judge:`.", dir_okay=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides attack.steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, help="Overrides attack.seed.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens generated for an answer.  [default: as many as the answers need]"
        ),
    ] = None,
    keep_answers: Annotated[
        bool, typer.Option("--keep-answers", help="Keep sample answers, for your eyes only.")
    ] = False,
    columns: Columns = None,
    drop_invalid: DropInvalid = False,
    json_output: Json = False,
) -> dict[str, Any]:
    """Attack your own model by fine-tuning or RL, and judge."""
    from mithridate.attacking import AttackPlan, run_attack
    from mithridate.cli.progress import listening
    from mithridate.examples import Reading, parse_columns

    plan = AttackPlan(
        model=model,
        undefended=undefended,
        harmful=harmful,
        evaluation=evaluation,
        permitted=permitted,
        kind=kind,
        judge=judge,
        config=config,
        steps=steps,
        seed=seed,
        max_new_tokens=max_new_tokens,
        keep_answers=keep_answers,
        reading=Reading(
            columns=parse_columns(columns or (), ("harmful", "eval", "permitted")),
            drop_invalid=drop_invalid,
        ),
        output_dir=output_dir,
        learning_rates=tuple(learning_rate or AttackPlan.learning_rates),
    )
    with listening() as listener:
        summary = run_attack(plan, on_event=listener)
        comparable = undefended is not None and permitted is not None
        if comparable:
            from mithridate.reports import render_report

            render_report(output_dir)
    if not json_output:
        _show(summary, output_dir, comparable=comparable)
    return summary


def _show(summary: Mapping[str, Any], folder: Path, *, comparable: bool) -> None:
    from rich.text import Text

    from mithridate.cli.demo import show_summary
    from mithridate.reports.limits import cut_short

    for line in cut_short(summary["attack"]["answers"]):
        out().print(Text(line, style="yellow"))
    if comparable:
        show_summary(summary, folder)
        return
    console = out()
    for entry in summary["defended"]["per_learning_rate"]:
        utility = f"  utility {entry['utility']:.2f}" if "utility" in entry else ""
        console.print(
            f"at {entry['learning_rate']:g}: useful harm {entry['useful_harm']:.2f}"
            f"  refusal {entry['refusal']:.2f}{utility}  (step {entry['step']})"
        )
    console.print(
        Text(
            "No report: it needs the control (--undefended) and utility (--permitted).",
            style="dim",
        )
    )
