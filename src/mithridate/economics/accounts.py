"""The whole account: developer, alternatives, attacker, users, and where the asymmetry fails."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mithridate import schema
from mithridate.configs import Seed, check_values, require
from mithridate.economics.attacker import (
    AVAILABILITIES,
    AttackCosts,
    asymmetry,
    attack_costs,
    multiplier,
)
from mithridate.economics.constants import Draws, Values, read_constants
from mithridate.economics.developer import (
    AlignmentCost,
    alignment_cost,
    break_even,
    dollars,
    per_query_costs,
    seconds,
    training_flops,
)
from mithridate.economics.measured import Broken, MeasuredRun, read_measured
from mithridate.economics.sentences import caveats, failures
from mithridate.errors import InputError
from mithridate.printable import quoted

BASELINE = "sft"
LLAMA_2_7B = 6.74e9
_WITHIN = 1.959963984540054
_DEAD = 0.8


@dataclass(frozen=True, kw_only=True)
class EconomicsPlan:
    """What the command line was given.

    Parameters
    ----------
    cost
        Document of `mithridate cost --json`; ``None`` models the methods by their passes.
    runs
        Run folders of one method, one per seed, or batteries.
    parameters
        Of the model that everything is priced at.
    constants
        YAML that overrides some of ours.
    threshold
        Useful harm from which on a model counts as broken; ``None`` takes half of what the attack
        gets from the undefended model.
    draws, seed
        Of the distributions.
    """

    cost: Path | None = None
    runs: tuple[Path, ...] = ()
    parameters: float = LLAMA_2_7B
    constants: Path | None = None
    threshold: float | None = None
    draws: int = 10_000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_values(self)
        require(
            0 < self.parameters < math.inf,
            f"a model of {self.parameters} parameters",
            "give their number, for example 7e9",
        )
        require(self.draws >= 100, f"{self.draws} draws give no interval", "draw 100 or more")
        require(
            self.threshold is None or 0 < self.threshold <= 1,
            f"the threshold {self.threshold} is no share above 0",
            "useful harm goes from 0 to 1; .05 is strict",
        )


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """A method's time over plain fine-tuning's, with its 95 % interval."""

    value: float
    low: float
    high: float

    def draw(self, count: int, rng: np.random.Generator) -> Draws:
        deviation = (self.high - self.low) / (2 * _WITHIN)
        if count == 1 or deviation == 0:
            return np.full(count, self.value)
        return np.asarray(np.maximum(rng.normal(self.value, deviation, count), 1e-3))


def run_economics(plan: EconomicsPlan) -> dict[str, Any]:
    """Return the account as one document.

    Every quantity is ``{"value", "median", "low", "high", "infinite"}``: at the constants' values
    (and the middle run), the median and the central 95 % of the draws, and the share of draws
    without a finite value, which stand as ``None`` (a break-even: never; a model: not broken).

    Raises
    ------
    InputError
        Something given cannot be used.
    GateError
        A run whose control attack is not valid.
    """
    constants = read_constants(plan.constants)
    measured, not_timed = _read_costs(plan.cost) if plan.cost else ({}, {})
    runs = [run for path in plan.runs for run in read_measured(path, threshold=plan.threshold)]
    names = {run.method for run in runs}
    require(
        len(names) <= 1,
        f"the run folders hold several methods: {', '.join(sorted(names))}",
        "give the runs of one method, one per seed",
    )
    spread = _account(plan, constants.draw(plan.draws, seed=plan.seed), measured, runs)
    point = _account(plan, constants.defaults(), measured, runs)
    document = {
        "parameters": plan.parameters,
        "draws": plan.draws,
        "seed": plan.seed,
        **_merge(point, spread),
        "not_timed": not_timed,
        "runs": [_describe(run) for run in runs],
        "constants": constants.document(),
    }
    document["does_not_hold"] = failures(document)
    document["caveats"] = caveats(document)
    return document


def _account(
    plan: EconomicsPlan,
    values: Values,
    measured: Mapping[str, _Ratio],
    runs: Sequence[MeasuredRun],
) -> dict[str, Any]:
    """Return every quantity as draws, in the document's shape."""
    rng = np.random.default_rng([plan.seed, 1])
    lost = max(0.0, float(np.mean([run.utility[0] - run.utility[1] for run in runs] or [0.0])))
    methods = _methods(plan.parameters, values, measured, rng)
    watching = per_query_costs(plan.parameters, values)
    plain = methods[BASELINE]
    account: dict[str, Any] = {
        "alignment": {name: _bill(cost, values) for name, cost in methods.items()},
        "filtered_pretraining": dollars(
            values["pretraining.filtering_share"]
            * training_flops(plan.parameters, values["pretraining.tokens"]),
            values,
        ),
        "per_query": watching,
        "break_even": {
            name: {
                rival: _break_evens(cost, plain, per_query, values, lost)
                for rival, per_query in watching.items()
            }
            for name, cost in methods.items()
            if name != BASELINE
        },
    }
    fires, slower = _fires(runs, values), values["fine_tune.slowdown"]
    user_run = dollars(
        training_flops(
            plan.parameters,
            values["fine_tune.rows"] * values["fine_tune.tokens_per_row"],
            values["fine_tune.epochs"],
        ),
        values,
    )
    account["users"] = {"fine_tune": user_run}
    chosen, within = np.full(values.count, float(_middle(runs))), np.full(values.count, 0.5)
    if values.count > 1 and runs:
        chosen = rng.integers(len(runs), size=values.count).astype(float)
        within = rng.random(values.count)
    fired = fires[chosen.astype(int)] if runs else fires
    carried = values["fine_tune.runs"] * user_run * (slower + fired)
    account["users"] |= {"false_fire_rate": fired, "cost": carried}
    account["users"]["externalised_share"] = {
        name: carried / (carried + cost.total) for name, cost in methods.items() if name != BASELINE
    }
    if runs:
        # A run that fired is paid for twice: the lost one and the one that replaces it.
        legitimate = 1.0 + slower + fired
        costs = attack_costs(runs, chosen, within, plan.parameters, values)
        account["attacker"] = _attacker(costs, values)
        account["asymmetry"] = _asymmetries(costs, legitimate)
        own = methods.get(runs[0].method)
        if own is not None:
            account["leverage"] = _leverage(costs, own, plain, carried, values)
    return account


def _methods(
    parameters: float,
    values: Values,
    measured: Mapping[str, _Ratio],
    rng: np.random.Generator,
) -> dict[str, AlignmentCost]:
    """Return every method's one-time cost: by the clock where it was timed, else by its passes."""
    found = {}
    modelled = [key.removeprefix("passes.") for key in values if key.startswith("passes.")]
    for name in dict.fromkeys([BASELINE, *modelled, "tokenbuncher", *measured]):
        if name in measured:
            ratio: Draws | None = measured[name].draw(values.count, rng)
        else:
            ratio = None if name == "tokenbuncher" else values[f"passes.{name}"]
        found[name] = alignment_cost(
            name,
            parameters,
            values,
            source="measured" if name in measured else "modelled",
            ratio=ratio,
        )
    return found


def _bill(cost: AlignmentCost, values: Values) -> dict[str, Any]:
    times = values["lifetime.re_immunisations_per_year"] * values["lifetime.years"]
    return {
        "source": cost.source,
        "ratio": cost.ratio,
        "gpus": cost.gpus,
        "flops": cost.flops,
        "seconds": seconds(cost.flops, values),
        "compute": cost.compute,
        "tuning": cost.tuning,
        "review": cost.review,
        "battery": cost.battery,
        "total": cost.total,
        "re_immunisations": times * cost.again,
    }


def _break_evens(
    cost: AlignmentCost, plain: AlignmentCost, per_query: Draws, values: Values, lost: float
) -> dict[str, Draws]:
    """Return Q* with ever more of the bill in it; the last is the honest one."""
    nothing = np.zeros_like(per_query)
    extra = cost.compute - plain.compute
    in_full = extra + cost.tuning + cost.review + cost.battery
    return {
        name: break_even(paid, again, per_query, values, utility_loss=lost)
        for name, paid, again in (
            ("compute_only", extra, nothing),
            ("with_battery", extra + cost.battery, nothing),
            ("in_full_once", in_full, nothing),
            ("in_full", in_full, cost.again),
        )
    }


def _fires(runs: Sequence[MeasuredRun], values: Values) -> Draws:
    """Return the false-fire rate of each run, or the constant's draws where no run measured it."""
    if not runs:
        return values["fine_tune.false_fire_rate"]
    assumed = float(np.median(values["fine_tune.false_fire_rate"]))
    return np.array([assumed if run.fires is None else run.fires for run in runs])


def _middle(runs: Sequence[MeasuredRun]) -> int:
    """Return the number of the run in the middle by how much longer its immunised model took."""
    order = sorted(
        range(len(runs)), key=lambda one: runs[one].immunised.steps / runs[one].undefended.steps
    )
    return order[(len(order) - 1) // 2] if order else 0


def _attacker(costs: AttackCosts, values: Values) -> dict[str, Any]:
    bills = {
        "undefended": costs.undefended,
        "immunised": costs.immunised,
        "immunised_at_least": costs.immunised_at_least,
        "immunised_with_search": costs.search,
        "base": costs.base,
        "base_realigned": costs.realigned,
        "sibling_edited": costs.edit,
        "pretraining": costs.pretraining,
        **costs.shortcuts,
    }
    return {
        name: {"flops": flops, "dollars": dollars(flops, values)} for name, flops in bills.items()
    }


def _asymmetries(costs: AttackCosts, legitimate: Draws) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for available in AVAILABILITIES:
        times, times_bound, cap = multiplier(costs, available)
        index, index_bound = asymmetry(costs, available, legitimate)
        found[available] = {
            "index": index,
            "index_at_least": index_bound,
            "multiplier": times,
            "multiplier_at_least": times_bound,
            "cap": cap,
        }
    return found


def _leverage(
    costs: AttackCosts,
    own: AlignmentCost,
    plain: AlignmentCost,
    carried: Draws,
    values: Values,
) -> dict[str, Draws]:
    """Return Lambda: the attackers' extra dollars for one of the developer's and users'."""
    once = own.total - plain.compute
    times = values["lifetime.re_immunisations_per_year"] * values["lifetime.years"]
    paid = once + times * own.again + carried
    before = dollars(costs.undefended, values)
    found: dict[str, Draws] = {}
    for available in AVAILABILITIES:
        bound = multiplier(costs, available)[1]
        found[available] = (bound - 1.0) * before * values["attack.attackers"] / paid
    return found


def _read_costs(path: Path) -> tuple[dict[str, _Ratio], dict[str, str]]:
    """Return the ratios of the methods that were timed, and why the others were not."""
    mend = "give what `mithridate cost --json` printed"
    where = str(path)
    rows = schema.read_object(path, mend=mend).get("methods")
    if not isinstance(rows, dict) or not rows:
        raise InputError("it holds no methods", where=where, mend=mend)
    ratios, not_timed = {}, {}
    for name, row in rows.items():
        at = f"{where}: methods.{quoted(name)[1:-1]}"
        if not isinstance(row, dict):
            raise InputError(f"{quoted(row)} is no measured cost", where=at, mend=mend)
        if "not_timed" in row:
            not_timed[name] = str(row["not_timed"])
            continue
        value: Any = row.get("clock_ratio")
        interval = row.get("clock_ratio_interval") or [value, value]
        if not _above_zero(value):
            raise InputError(
                f"clock_ratio is {quoted(value)}, not a number above 0", where=at, mend=mend
            )
        if not (
            isinstance(interval, list)
            and len(interval) == 2
            and all(map(_above_zero, interval))
            and interval[0] <= interval[1]
        ):
            raise InputError(
                f"clock_ratio_interval is {quoted(interval)}, not two numbers above 0, the lower "
                "first",
                where=at,
                mend=mend,
            )
        low, high = interval
        ratios[name] = _Ratio(value=float(value), low=float(low), high=float(high))
    return ratios, not_timed


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _describe(run: MeasuredRun) -> dict[str, Any]:
    def broken(one: Broken | None) -> dict[str, Any] | None:
        return None if one is None else dict(vars(one))

    return {
        "path": str(run.path),
        "kind": "battery" if run.battery else "run",
        "seed": run.seed,
        "method": run.method,
        "testbed": run.testbed,
        "threshold": run.threshold,
        "undefended": broken(run.undefended),
        "immunised": broken(run.immunised),
        "base": broken(run.base),
        "shortcuts": {name: broken(one) for name, one in run.shortcuts.items()},
        "failed": run.failed,
        "utility_before": {"undefended": run.utility[0], "immunised": run.utility[1]},
        "dead_on_arrival": run.utility[1] < _DEAD * run.utility[0],
        "false_fire": run.fires,
    }


def _merge(point: Any, spread: Any) -> Any:
    """Return the document: each array of draws as its value and its distribution."""
    if isinstance(point, Mapping):
        return {key: _merge(point[key], spread[key]) for key in point}
    if not isinstance(point, np.ndarray):
        return point
    # Interpolating between a number and infinity gives neither.
    low, median, high = np.quantile(spread, (0.025, 0.5, 0.975), method="inverted_cdf")
    named = {"value": point[0], "median": median, "low": low, "high": high}
    found: dict[str, float | None] = {
        name: float(one) if np.isfinite(one) else None for name, one in named.items()
    }
    return {**found, "infinite": float(np.mean(np.isinf(spread)))}
