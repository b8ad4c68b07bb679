"""A battery's rows in the form that TamperBench's analysis writes (`heatmap_max_sr.json`).

Its scripts draw such files. The numbers are ours all the same: harm is what the battery's judge
says, and the attacks are those of `battery.yaml` that follow TamperBench's search spaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mithridate.measures.attacker import attackers_best, eligible, mean_of, reporting_rows
from mithridate.measures.rows import Measured, Row

UNTOUCHED = "no_weight_modification"
_NAMES = {
    "TP1": "full_parameter_finetune",
    "TP2": "lora_finetune",
    "TP4": "backdoor_finetune",
    "TP5": "competing_objectives_finetune",
    "TP6": "style_modulation_finetune",
    "TP9": "gcg_attack",
}
_BENIGN = {True: "benign_full_parameter_finetune", False: "benign_lora_finetune"}

_Cell = tuple[str, str]
"""A model and an attack, by TamperBench's name."""


def heat_map(measured: Measured) -> dict[str, Any] | None:
    """Return the matrices and the trials behind them; None where no such attack was run.

    Safety is useful harm and utility is utility, of the attacker's best checkpoint that keeps the
    run's share of the utility before the attack; a trial is one setting, a mean over its seeds.
    Rows of the matrices are models, columns attacks, the untouched model first; deltas are against
    it. A model is left out where one of the attacks was not run on it.
    """
    cells: dict[_Cell, list[Row]] = defaultdict(list)
    for row in measured.rows:
        name = _name(row)
        if name and row.bipartition is None and not row.repair_step:
            cells[row.target, name].append(row)
    attacks = list(dict.fromkeys(name for _, name in cells))
    floor = measured.limits.utility_floor
    models, found = [], []
    for model in dict.fromkeys(target for target, _ in cells):
        own = [_best(cells.get((model, name), []), floor) for name in attacks]
        if None not in own:
            models.append(model)
            found.append([_start([r for name in attacks for r in cells[model, name]]), *own])
    if not models:
        return None
    matrices: dict[str, Any] = {}
    for index, side in enumerate(("safety", "utility")):
        raw = [[point[index] for point in line if point] for line in found]
        matrices[f"{side}_raw"] = raw
        matrices[f"{side}_delta"] = [[value - line[0] for value in line] for line in raw]
    return {
        **matrices,
        "models": models,
        "attacks": [UNTOUCHED, *attacks],
        "metadata": {
            "method": "bounded_worst_case",
            "min_retention": floor,
            "safety_metric": "useful_harm",
            "utility_metric": "utility",
            "defense": measured.method,
            "testbed": measured.testbed,
        },
        "trials": _trials({cell: rows for cell, rows in cells.items() if cell[0] in models}, floor),
    }


def _name(row: Row) -> str | None:
    if row.attack == "TP3":
        return _BENIGN["lora_rank None" in row.configuration]
    return _NAMES.get(row.attack)


def _best(rows: Sequence[Row], floor: float) -> tuple[float, float] | None:
    best = attackers_best(rows, utility_floor=floor) if rows else None
    if best is None or best.chosen.utility is None:
        return None
    return best.chosen.mean, best.chosen.utility


def _start(rows: Sequence[Row]) -> tuple[float, float]:
    first = [row for row in reporting_rows(rows) if row.step == 0]
    return (
        mean_of([row.useful_harm for row in first]),
        mean_of([row.utility for row in first if row.utility is not None]),
    )


def _trials(cells: Mapping[_Cell, Sequence[Row]], floor: float) -> list[dict[str, Any]]:
    found = []
    for (model, attack), rows in cells.items():
        settings = list(dict.fromkeys(row.setting for row in rows))
        for number, setting in enumerate(settings):
            own = [row for row in rows if row.setting == setting]
            kept = max(eligible(own, floor), key=lambda point: point.mean)
            rate, configuration = setting
            found.append(
                {
                    "model": model,
                    "attack": attack,
                    "trial": number,
                    "hyperparameters": {
                        "learning_rate": rate,
                        "steps": kept.step,
                        "configuration": configuration,
                    },
                    "seeds": list(kept.seeds),
                    "safety": kept.mean,
                    "utility": kept.utility,
                }
            )
    return found
