"""A18 and A19: break-even and the asymmetry index, from the economics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mithridate.configs import require
from mithridate.economics import EconomicsPlan, run_economics
from mithridate.events import Event, Listener
from published.files import read_results
from published.judging import Measurement

if TYPE_CHECKING:
    from mithridate.testbeds.base import Testbed

RIVAL = "monitor_listed"
_METHODS = ("sdd", "ctrap", "seam", "tokenbuncher")


def break_even(bed: Testbed, on_event: Listener) -> list[Measurement]:  # noqa: ARG001
    """A18: queries until each method has paid for itself, at the default constants."""
    on_event(Event(stage="break-even"))
    document = run_economics(EconomicsPlan())
    found = []
    for name in _METHODS:
        quantity = document["break_even"][name][RIVAL]["in_full"]
        shared: dict[str, Any] = {
            "claim": "A18", "subject": name, "n": None,
            "setting": "with review, battery, tuning and re-immunisations, against a guard model "
            "at its list price; no measured run",
            "model": f"{document['parameters']:.3g} parameters, modelled",
        }  # fmt: skip
        never = quantity["infinite"]
        found.append(
            Measurement(
                quantity="share of draws in which it never pays",
                estimate=never, low=never, high=never, **shared,
            )
        )  # fmt: skip
        if quantity["value"] is not None:
            found.append(
                Measurement(
                    quantity="queries to break even",
                    estimate=quantity["value"],
                    low=_number(quantity["low"], math.inf),
                    high=_number(quantity["high"], math.inf), **shared,
                )
            )  # fmt: skip
    return found


def read(results: Path, testbed: str) -> list[Measurement]:
    """A19: the asymmetry index that measured runs give, with nothing else public."""
    document = read_results(results, f"economics-{testbed}", testbed)
    if document is None:
        return []
    runs = document["runs"]
    require(
        bool(runs) and all(run["testbed"] == testbed for run in runs),
        f"{results / f'economics-{testbed}.json'}: holds no run on {testbed}",
        f"make it by `mithridate economics --run DIR --json` from runs on {testbed}",
    )
    index: Mapping[str, Any] = document["asymmetry"]["none"]["index_at_least"]
    dead = sum(run["dead_on_arrival"] for run in runs)
    return [
        Measurement(
            claim="A19",
            quantity="asymmetry index",
            subject=runs[0]["method"],
            estimate=_number(index["value"], -math.inf),
            low=_number(index["low"], -math.inf),
            high=_number(index["high"], math.inf),
            n=len(runs),
            unit="orders of magnitude",
            setting="constants and runs drawn together",
            model=testbed,
            void=f"dead on arrival in {dead} of {len(runs)} runs" if dead else "",
        )
    ]


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else float(value)
