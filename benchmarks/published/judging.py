"""From measurements to a verdict, by the claim's rule and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mithridate.measures.statistics import over_seeds
from mithridate.verdicts.gates import REPORT_SEEDS
from published.statements import Claim, Rule

Verdict = Literal["reproduced", "refuted", "inconclusive", "not_comparable", "not_run"]
VERDICTS: tuple[Verdict, ...] = (
    "reproduced",
    "refuted",
    "inconclusive",
    "not_comparable",
    "not_run",
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number that was measured for a claim.

    Attributes
    ----------
    claim
        Its identifier.
    quantity
        What was measured, in words; a rule names the quantity that it judges.
    subject
        Method, variant or model that it was measured of.
    estimate
        In ``unit``.
    low, high
        The 95 % interval; infinite where it is open, None where there is none.
    n
        Number of ``over`` (seeds, runs, batches) behind it; None: counted, alike every time.
    setting, model
        How and on what.
    void
        Why it says nothing about the claim; empty where it does.
    """

    claim: str
    quantity: str
    subject: str
    estimate: float
    low: float | None
    high: float | None
    n: int | None
    over: str = "seeds"
    unit: str = ""
    setting: str = ""
    model: str = ""
    void: str = ""

    @property
    def preliminary(self) -> bool:
        """Whether fewer seeds are behind it than a report needs."""
        return self.n is not None and self.n < REPORT_SEEDS

    def record(self) -> dict[str, Any]:
        """Return it for JSON; what is infinite is None."""
        interval = None
        if self.low is not None and self.high is not None:
            interval = [end if math.isfinite(end) else None for end in (self.low, self.high)]
        named = {name: value for name, value in vars(self).items() if name not in _ENDS}
        estimate = self.estimate if math.isfinite(self.estimate) else None
        return {**named, "estimate": estimate, "ci95": interval}


_ENDS = ("low", "high")


def from_record(record: Mapping[str, Any]) -> Measurement:
    """Return what `Measurement.record` wrote of a finite estimate."""
    ends = record["ci95"] or (None, None)
    low, high = ends
    if record["ci95"] is not None:
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
    rest = {name: value for name, value in record.items() if name != "ci95"}
    return Measurement(**rest, low=low, high=high)


def counted(value: float) -> dict[str, Any]:
    """Return estimate, bounds and n of what is counted and the same every time."""
    return {"estimate": value, "low": value, "high": value, "n": None}


def over_repeats(values: Sequence[float]) -> dict[str, Any]:
    """Return estimate, bounds and n of a mean over repeats; one alone has no interval."""
    low, high = over_seeds(values) if len(values) > 1 else (None, None)
    mean = math.fsum(values) / len(values)
    return {"estimate": mean, "low": low, "high": high, "n": len(values)}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with what follows from its measurements.

    Attributes
    ----------
    reason
        Why, in words and numbers.
    preliminary
        Whether a number that decides has fewer seeds than a report needs.
    """

    claim: Claim
    measured: tuple[Measurement, ...]
    verdict: Verdict
    reason: str
    preliminary: bool


def judge(
    claim: Claim, measured: Sequence[Measurement], *, missing: str = "nothing was measured"
) -> Judged:
    """Judge one claim.

    One subject that refutes is enough; all of them must reproduce. A subject whose measurement is
    void does not count.

    Parameters
    ----------
    measured
        Of this claim.
    missing
        Why there is no measurement, for a claim that has none.
    """
    own = tuple(measured)
    assert all(one.claim == claim.id for one in own), "a measurement of another claim"

    def judged(verdict: Verdict, reason: str, decisive: Sequence[Measurement] = ()) -> Judged:
        return Judged(
            claim=claim,
            measured=own,
            verdict=verdict,
            reason=reason,
            preliminary=any(one.preliminary for one in decisive),
        )

    if not own:
        return judged("not_run", missing)
    if not claim.rules:
        return judged(
            "not_comparable",
            "a value of the published model, data and judge: no small model refutes it",
            own,
        )
    pairs = [(rule, one) for rule in claim.rules for one in own if one.quantity == rule.of]
    absent = [rule.of for rule in claim.rules if rule.of not in {one.quantity for one in own}]
    if not pairs:
        return judged("not_run", f"not measured: {', '.join(absent)}")
    valid = [(rule, one) for rule, one in pairs if not one.void]
    voids = list(dict.fromkeys(f"{one.subject}: {one.void}" for _, one in pairs if one.void))
    if not valid:
        return judged("inconclusive", "; ".join(voids), [one for _, one in pairs])
    found = [_of_one(rule, one) for rule, one in valid]
    verdict: Verdict = "inconclusive"
    if "refuted" in found:
        verdict = "refuted"
    elif not absent and all(one == "reproduced" for one in found):
        verdict = "reproduced"
    subjects: dict[str, list[str]] = {}
    for (rule, one), each in zip(valid, found, strict=True):
        subjects.setdefault(_words(rule, one, each), []).append(one.subject)
    said = [f"{' and '.join(named)}: {words}" for words, named in subjects.items()]
    said += [f"not counted: {void}" for void in voids]
    said += [f"not measured: {quantity}" for quantity in absent]
    return judged(verdict, "; ".join(said), [one for _, one in valid])


def _of_one(rule: Rule, one: Measurement) -> Verdict:
    if one.low is None or one.high is None:
        return "inconclusive"
    if rule.refuted.holds(one.low, one.high):
        return "refuted"
    if rule.reproduced is not None and rule.reproduced.holds(one.low, one.high):
        return "reproduced"
    return "inconclusive"


def _words(rule: Rule, one: Measurement, found: Verdict) -> str:
    if one.low is None:
        return f"{rule.of} without an interval"
    if found == "refuted":
        return f"{rule.of} is {rule.refuted}"
    if found == "reproduced":
        return f"{rule.of} is {rule.reproduced}"
    if rule.reproduced is None:
        return f"{rule.of} is not {rule.refuted}, and no measurement here could confirm it"
    return f"{rule.of} is neither {rule.refuted} nor {rule.reproduced}"
