"""Live progress on standard error: the stage, the newest metrics, and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mithridate.cli.console import err, is_main_process
from mithridate.events import Event, Listener, silent
from mithridate.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 20.0
_METRICS = 4
_NOT_SHOWN = {"step", "epoch", "learning_rate", "grad_norm"}


@contextmanager
def listening() -> Iterator[Listener]:
    """Draw the events it is given: bars on a terminal, a line now and then elsewhere."""
    console = err()
    if not is_main_process():
        yield silent
    elif console.is_terminal:
        with _bars(console) as listener:
            yield listener
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[Listener]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, int] = {}
        current: str | None = None

        def listener(event: Event) -> None:
            nonlocal current
            if event.stage != current and current is not None:
                task = progress.tasks[tasks[current]]
                progress.update(task.id, total=task.total or task.completed or 1)
                progress.update(task.id, completed=task.total)
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(
                    printable(event.stage), total=event.total or None, metrics=""
                )
            current = event.stage
            progress.update(
                progress.task_ids[tasks[event.stage]],
                completed=event.step,
                total=event.total or None,
                metrics=_metrics(event.metrics),
            )

        yield listener
        if current is not None:
            task = progress.tasks[tasks[current]]
            progress.update(task.id, total=task.total or 1, completed=task.total or 1)


def _lines(console: Console) -> Listener:
    stage: str | None = None
    started = shown = 0.0
    kept = 0

    def listener(event: Event) -> None:
        nonlocal stage, started, shown, kept
        now = time.monotonic()
        done = bool(event.total) and event.step >= event.total
        if event.stage != stage:
            # What a stage begins with was done before, in no time: it says nothing of the rest.
            stage, started, kept = event.stage, now, event.step
        elif not done and now - shown < _SECONDS_BETWEEN_LINES:
            return
        shown = now
        parts = [printable(event.stage)]
        if event.total:
            parts.append(f"{event.step}/{event.total}")
        if event.step > kept and event.total and not done:
            left = (now - started) / (event.step - kept) * (event.total - event.step)
            parts.append(f"about {left:.0f} s left")
        parts.append(_metrics(event.metrics))
        console.print("  ".join(part for part in parts if part), markup=False, soft_wrap=True)

    return listener


def _metrics(metrics: Mapping[str, float]) -> str:
    shown = [item for item in metrics.items() if item[0] not in _NOT_SHOWN][:_METRICS]
    return "  ".join(f"{printable(name)} {value:.3g}" for name, value in shown)
