"""Reading a finished run folder, and refusing one that would make a misleading page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mithridate import schema
from mithridate.configs import read_yaml
from mithridate.errors import InputError
from mithridate.measures.rows import read_summary
from mithridate.measures.trajectory import UTILITY_FLOOR, WorstCase, start_of, worst_case
from mithridate.printable import quoted

TARGETS = ("undefended", "defended")
MEASURES = ("refusal", "useful_harm", "utility")
_AGAIN = "run the same command again: finished work is kept"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a run left behind.

    Attributes
    ----------
    summary
        The document that ``--json`` printed.
    trajectory
        One row per target, learning rate and probed step, in that order.
    planting
        One row per logged immunisation step; empty when the run planted nothing itself.
    samples
        Prompts with their answers before and after the attack.
    """

    path: Path
    summary: Mapping[str, Any]
    trajectory: list[dict[str, Any]]
    planting: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def learning_rates(self) -> list[float]:
        """The attack's learning rates, ascending."""
        return sorted({row["learning_rate"] for row in self.trajectory})

    def rows(self, target: str, learning_rate: float | None = None) -> list[dict[str, Any]]:
        """Return a target's probes by step, of one learning rate or of all."""
        return [
            row
            for row in self.trajectory
            if row["target"] == target and learning_rate in (None, row["learning_rate"])
        ]

    def worst(self, target: str, learning_rate: float | None = None) -> WorstCase:
        """Return the attacker's best checkpoints on a target, at one learning rate or over all."""
        before = start_of(self.rows(target))["utility"]
        return worst_case(
            self.rows(target, learning_rate),
            reference_utility=before,
            utility_floor=UTILITY_FLOOR,
        )


def read_run(path: Path) -> RunFolder:
    """Read and check the run folder ``path``.

    Raises
    ------
    InputError
        A file is missing or broken, a number is not finite, or the undefended control, without
        which no number means anything, is not there.
    """
    if not path.is_dir():
        raise InputError("no such run folder", where=str(path), mend="check the path")
    if (path / "history.jsonl").exists() and not (path / "summary.json").exists():
        raise InputError(
            "an immunisation alone has no report: nothing was attacked",
            where=str(path),
            mend="`mithridate attack --model RUN/model --undefended ALIGNED --harmful F --eval F "
            "--permitted F --output-dir DIR` writes one",
        )
    summary = read_summary(path)
    placed = schema.read_rows(path / "trajectory.jsonl")
    trajectory = [row for _, row in placed]
    _check_control(path, summary, trajectory)
    seen: dict[tuple[object, ...], str] = {}
    for where, row in placed:
        schema.check(schema.TrajectoryRow, row, where=where)
        key = (row["target"], row["learning_rate"], row["step"])
        if key in seen:
            raise InputError(
                f"a second row of the {quoted(row['target'])[1:-1]} model at "
                f"{row['learning_rate']:g}, step {row['step']:g}: the first is "
                f"{seen[key].rpartition(': ')[2]}",
                where=where,
                mend=_AGAIN,
            )
        seen[key] = where
    for target in TARGETS:
        own = [row for row in trajectory if row["target"] == target]
        started = {row["learning_rate"] for row in own if row["step"] == 0}
        late = sorted({row["learning_rate"] for row in own} - started)
        if late:
            raise InputError(
                f"the attack on the {target} model at {late[0]:g} has no probe at step 0",
                where=str(path / "trajectory.jsonl"),
                mend=_AGAIN,
            )
    trajectory.sort(key=lambda row: (row["target"], row["learning_rate"], row["step"]))
    config = path / "config.yaml"
    return RunFolder(
        path=path,
        summary=summary,
        trajectory=trajectory,
        planting=_planting(path / "planting.jsonl"),
        samples=_samples(path / "samples.json"),
        manifest=schema.check(
            schema.Manifest,
            schema.read_object(path / "manifest.json"),
            where=str(path / "manifest.json"),
        ),
        config=read_yaml(config) if config.exists() else {},
    )


def _check_control(
    path: Path, summary: Mapping[str, Any], trajectory: list[dict[str, Any]]
) -> None:
    attacked = [row.get("target") for row in trajectory]
    for target in TARGETS:
        if summary.get(target) is None or target not in attacked:
            raise InputError(
                f"the {target} model was not attacked in this run, and a report without "
                f"{'the undefended control' if target == 'undefended' else 'it'} is refused",
                where=str(path),
                mend="attack both models in one run: `mithridate attack --model DEFENDED "
                "--undefended ALIGNED ...`, or `mithridate demo`",
            )
        benign = summary.get("benign_finetuning")
        if benign is not None and benign.get(target) is None:
            raise InputError(
                f"benign_finetuning lacks {target}", where=str(path / "summary.json"), mend=_AGAIN
            )
        for moment in ("before", "after"):
            told = (summary[target] or {}).get(moment) or {}
            missing = [key for key in MEASURES if told.get(key) is None]
            if missing:
                raise InputError(
                    f"{target}.{moment} lacks {', '.join(missing)}",
                    where=str(path / "summary.json"),
                    mend=_AGAIN,
                )


def _planting(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = schema.read_rows(path)
    return [schema.check(schema.PlantingRow, row, where=where) for where, row in rows]


def _samples(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = schema.read_document(path)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError("not a list of samples", where=str(path), mend=_AGAIN)
    return found
