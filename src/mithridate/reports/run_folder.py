"""Reading a finished run folder, and refusing one that would make a misleading page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mithridate.configs import read_yaml
from mithridate.errors import InputError
from mithridate.measures.trajectory import UTILITY_FLOOR, WorstCase, worst_case

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
        before = self.rows(target)[0]["utility"]
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
    summary = _json(path / "summary.json")
    trajectory = _lines(path / "trajectory.jsonl")
    _check_control(path, summary, trajectory)
    for number, row in enumerate(trajectory, start=1):
        for key in ("learning_rate", "step", *MEASURES):
            if not isinstance(row.get(key), int | float) or not math.isfinite(row[key]):
                raise InputError(
                    f"{key} is {row.get(key)!r}, not a finite number",
                    where=f"{path / 'trajectory.jsonl'}: row {number}",
                    mend=_AGAIN,
                )
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
        planting=_lines(path / "planting.jsonl", needed=False),
        samples=_json(path / "samples.json") if (path / "samples.json").exists() else [],
        manifest=_json(path / "manifest.json"),
        config=read_yaml(config) if config.exists() else {},
    )


def _check_control(
    path: Path, summary: Mapping[str, Any], trajectory: list[dict[str, Any]]
) -> None:
    attacked = {row.get("target") for row in trajectory}
    for target in TARGETS:
        if target not in summary or target not in attacked:
            raise InputError(
                f"the {target} model was not attacked in this run, and a report without "
                f"{'the undefended control' if target == 'undefended' else 'it'} is refused",
                where=str(path),
                mend="attack both models in one run: `mithridate attack --model DEFENDED "
                "--undefended ALIGNED ...`, or `mithridate demo`",
            )
        for moment in ("before", "after"):
            missing = [key for key in MEASURES if key not in summary[target].get(moment, {})]
            if missing:
                raise InputError(
                    f"{target}.{moment} lacks {', '.join(missing)}",
                    where=str(path / "summary.json"),
                    mend=_AGAIN,
                )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "the run is not finished: this file is missing", where=str(path), mend=_AGAIN
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"not valid JSON: {error}", where=str(path), mend=_AGAIN) from error


def _lines(path: Path, *, needed: bool = True) -> list[dict[str, Any]]:
    if not needed and not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "the run is not finished: this file is missing", where=str(path), mend=_AGAIN
        ) from None
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"not valid JSON: {error}", where=f"{path}: line {number}", mend=_AGAIN
                ) from error
    return rows
