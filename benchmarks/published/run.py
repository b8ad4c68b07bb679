"""`make claims`: measure what is cheap, read what is there, judge every claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

import mithridate
from mithridate.errors import InputError, RunInterruptedError, RunStoppedError
from mithridate.events import Event, Listener, silent
from mithridate.files import sha256_of, write_json
from mithridate.folders import run_folder
from mithridate.provenance import provenance
from mithridate.testbeds import TESTBEDS
from mithridate.testbeds.base import Testbed, code_version
from published import (
    accounts,
    benchmarks,
    collapse,
    concerns,
    contexts,
    costs,
    counts,
    leaks,
    products,
    rounding,
)
from published.files import read_results
from published.judging import VERDICTS, Judged, Measurement, from_record, judge
from published.statements import KINDS, TAGS, read_claims

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A measurement that the command makes itself, in minutes at most on a small testbed.

    Attributes
    ----------
    claims
        What it measures.
    """

    name: str
    claims: tuple[str, ...]
    module: ModuleType
    measure: Callable[[Testbed, Listener], list[Measurement]]


PROBES = (
    Probe(name="passes of SDD", claims=("A1",), module=counts, measure=counts.sdd),
    Probe(name="passes of CTRAP", claims=("A2",), module=counts, measure=counts.ctrap),
    Probe(name="passes of SEAM", claims=("A3",), module=counts, measure=counts.seam),
    Probe(name="finite difference", claims=("F4",), module=products,
          measure=products.finite_difference),
    Probe(name="rounding", claims=("F5",), module=rounding, measure=rounding.adamw_step),
    Probe(name="collapse loss", claims=("F11",), module=collapse, measure=collapse.direction),
    Probe(name="break-even", claims=("A18",), module=accounts, measure=accounts.break_even),
    Probe(name="clock and memory", claims=("A1", "A5", "A6", "A7"), module=costs,
          measure=costs.steps),
    Probe(name="rollouts", claims=("A4",), module=costs, measure=costs.rollouts),
    Probe(name="exposure", claims=("A22",), module=leaks, measure=leaks.exposure),
)  # fmt: skip

FILES: dict[str, Callable[[Path, str], list[Measurement]]] = {
    "spine": benchmarks.read,
    "methods": benchmarks.read,
    "concerns": concerns.read,
    "economics": accounts.read,
}
"""Result files by the start of their names, and what reads them."""


@dataclass(frozen=True, kw_only=True)
class ClaimsPlan:
    """What the command line was given.

    Parameters
    ----------
    testbed
        Name of a registered testbed.
    results
        Folder of the benchmarks' result files; what is measured here is kept there too.
    """

    testbed: str
    results: Path = RESULTS


def run_claims(plan: ClaimsPlan, *, on_event: Listener = silent) -> dict[str, Any]:
    """Judge every claim and return the document.

    A probe that cannot be made leaves its claims unmeasured and takes nothing else with it.

    Raises
    ------
    InputError
        An unknown testbed, a result file that cannot be used, or another process that writes into
        the folder; before any measurement.
    """
    bed = cast(Testbed, TESTBEDS.load(plan.testbed)())
    with run_folder(plan.results):
        return _run(plan, bed, on_event)


def _run(plan: ClaimsPlan, bed: Testbed, on_event: Listener) -> dict[str, Any]:
    claims = read_claims()
    measured, sources = _from_files(plan)
    failed: dict[str, str] = {}
    probed = _probed(plan, bed, failed, on_event)
    for part in probed.values():
        measured += [from_record(record) for record in part["measured"]]
    origins: dict[str, dict[str, Any]] = {}
    for name, part in probed.items():
        source = _described("claims", plan, part)
        origins.setdefault(str(source), source | {"measured": []})["measured"].append(name)
    sources += origins.values()
    missing = {one.id: f"needs `{one.measured_by.format(testbed=plan.testbed)}`" for one in claims}
    missing |= {name: failed[p.name] for p in PROBES if p.name in failed for name in p.claims}
    judged = [
        judge(
            claim,
            [one for one in measured if one.claim == claim.id],
            missing=missing[claim.id],
        )
        for claim in claims
    ]
    return {
        "testbed": plan.testbed,
        "version": mithridate.__version__,
        "counts": {name: sum(one.verdict == name for one in judged) for name in VERDICTS},
        "claims": [_entry(one, plan.testbed) for one in judged],
        "sources": sources,
        "failed": failed,
        "kinds": KINDS,
        "tags": TAGS,
    }


def _from_files(plan: ClaimsPlan) -> tuple[list[Measurement], list[dict[str, Any]]]:
    sources = []
    for name in FILES:
        document = read_results(plan.results, f"{name}-{plan.testbed}", plan.testbed)
        if document is not None:
            sources.append(_described(name, plan, document))
    found: list[Measurement] = []
    for read in dict.fromkeys(FILES.values()):
        try:
            found += read(plan.results, plan.testbed)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"a result file is not of this version: {type(error).__name__} {error}",
                where=f"{plan.results}, {', '.join(k for k, v in FILES.items() if v is read)}",
                mend="make it again with the command that it holds",
            ) from None
    return found, sources


def _described(name: str, plan: ClaimsPlan, document: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("command", "date", "commit", "machine", "seeds")
    told = {key: document[key] for key in shown if key in document}
    if name == "economics":
        runs = " ".join(f"--run {run['path']}" for run in document.get("runs", ()))
        told["command"] = f"mithridate economics {runs} --json"
    return {"file": f"{name}-{plan.testbed}.json", **told}


def _probed(
    plan: ClaimsPlan, bed: Testbed, failed: dict[str, str], on_event: Listener
) -> dict[str, dict[str, Any]]:
    """Return what each probe found: kept from before where nothing that it depends on changed."""
    on_event(Event(stage="making the aligned model (kept in the cache)"))
    model = bed.aligned_model().name
    path = plan.results / f"claims-{plan.testbed}.json"
    kept = read_results(plan.results, path.stem, plan.testbed) or {}
    parts: dict[str, dict[str, Any]] = dict(kept.get("probes", {}))
    for probe in PROBES:
        key = sha256_of([code_version(probe.module, contexts), model, torch.__version__])
        if parts.get(probe.name, {}).get("key") == key:
            continue
        parts.pop(probe.name, None)
        try:
            found = probe.measure(bed, on_event)
        except RunInterruptedError:
            raise
        except (InputError, RunStoppedError, ImportError) as error:
            failed[probe.name] = f"{probe.name}: {str(error).splitlines()[0]}"
            continue
        parts[probe.name] = {
            "key": key,
            **provenance(
                f"python benchmarks/claims.py --testbed {plan.testbed}", Path(__file__).parent
            ),
            "measured": [one.record() for one in found],
        }
        write_json(path, {"testbed": plan.testbed, "probes": parts})
    return {probe.name: parts[probe.name] for probe in PROBES if probe.name in parts}


def _entry(one: Judged, testbed: str) -> dict[str, Any]:
    claim = one.claim
    return {
        "claim": claim.id,
        "kind": claim.kind,
        "statement": claim.statement,
        "published": [dataclasses.asdict(figure) for figure in claim.published],
        "refuted_if": claim.refuted_if,
        "verdict": one.verdict,
        "reason": one.reason,
        "preliminary": one.preliminary,
        "note": claim.note.strip(),
        "measured_by": claim.measured_by.format(testbed=testbed),
        "measured": [measurement.record() for measurement in one.measured],
    }
