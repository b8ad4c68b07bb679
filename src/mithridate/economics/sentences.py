"""What the account says in words: where the asymmetry does not hold, and what Q* hides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def failures(document: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each way in which the asymmetry fails, computed from the numbers."""
    said = []
    if "asymmetry" not in document:
        said.append(
            "Nothing is known of the attacker: give a run folder with --run. Without one there is "
            "no asymmetry to speak of."
        )
    else:
        said += _of_attacks(document)
    said += _of_break_even(document)
    return said


def _of_attacks(document: Mapping[str, Any]) -> list[str]:
    said = []
    runs, attacker = document["runs"], document["attacker"]
    base, sibling, none = (document["asymmetry"][name] for name in ("base", "sibling", "none"))
    dead = sum(run["dead_on_arrival"] for run in runs)
    if dead:
        said.append(
            f"In {dead} of {len(runs)} runs the defence itself cost more than a fifth of the "
            "utility: dead on arrival, and no attacker's bill makes up for it."
        )
    said.append(
        f"Base model public: making a useful harmful model from it costs "
        f"{_usd(attacker['base_realigned']['dollars'])}, so no immunisation lifts the attacker's "
        f"compute above {_number(base['cap'])} times that of breaking the undefended model "
        f"({_usd(attacker['undefended']['dollars'])}). What is left rests on finding and handling "
        "the base, not on compute."
    )
    said += _of_shortcuts(document)
    if not any(run["base"] for run in runs):
        said.append(
            "No run attacked the base model: it is counted as harmful for nothing, because it was "
            "never taught to refuse."
        )
    said.append(
        "Unprotected sibling public: the attacker takes that one, and immunisation adds nothing "
        f"(index {_number(sibling['index'])})."
    )
    broken = [run for run in runs if not run["immunised"]["held"]]
    open_already = sum(run["immunised"]["steps"] == 0 for run in broken)
    if open_already:
        said.append(
            f"In {open_already} of {len(runs)} runs the immunised model answered before any "
            "attack: breaking it costs nothing and the index is minus infinity."
        )
    elif broken:
        steps = max(run["immunised"]["steps"] for run in broken)
        said.append(
            f"Nothing public: the immunised model broke within {show(steps)} steps in "
            f"{len(broken)} of {len(runs)} runs; index {_number(none['index_at_least'])}."
        )
    if len(broken) < len(runs):
        longest = max(run["immunised"]["steps"] for run in runs if run["immunised"]["held"])
        trained = any("immunised_edited" in run["shortcuts"] for run in runs)
        said.append(
            f"Nothing public: it held for {show(longest)} steps at the attacks "
            f"{'by training ' * trained}that were run in "
            f"{len(runs) - len(broken)} of {len(runs)} runs. That is a lower bound (index at least "
            f"{_number(none['index_at_least'])}); nothing beyond those steps, and no other attack, "
            "was paid for."
        )
    low = none["index_at_least"]["low"]
    if low is None or low <= 0:
        said.append(
            "Even with nothing public the interval of the index reaches 0: the asymmetry is not "
            "established."
        )
    if len(runs) == 1:
        said.append(
            "One run: the intervals hold the constants' uncertainty, none over seeds. Preliminary."
        )
    if all(run["false_fire"] is None for run in runs):
        said.append(
            "No run measured benign fine-tuning: the false-fire rate is the constant "
            "fine_tune.false_fire_rate."
        )
    return said


def _of_shortcuts(document: Mapping[str, Any]) -> list[str]:
    """Say which edits break the immunised model, and what they need."""
    said, runs = [], document["runs"]
    for kind, public, how in (
        ("merged", "base", "Base model public: {} by putting it together with the base model"),
        ("edited", "none", "Nothing public: {} by editing its weights"),
    ):
        name = f"immunised_{kind}"
        found = [run["shortcuts"][name] for run in runs if name in run["shortcuts"]]
        if not found:
            continue
        by = ", ".join(sorted({one["by"] for one in found}))
        broke = f"{by} broke the immunised model in {len(found)} of {len(runs)} runs"
        untrained = all(one["steps"] == 0 for one in found)
        said.append(
            f"{how.format(broke)}{', without any training' if untrained else ''}, for "
            f"{_usd(document['attacker'][name]['dollars'])}; index "
            f"{_number(document['asymmetry'][public]['index_at_least'])}."
        )
    failed = sum({run["path"]: run["failed"] for run in runs}.values())
    if failed:
        said.append(
            f"Runs of the battery's attacks that failed: {failed}; nothing here is about them."
        )
    return said


def _of_break_even(document: Mapping[str, Any]) -> list[str]:
    said = []
    for rival in document["per_query"]:
        never = [
            name
            for name, rivals in document["break_even"].items()
            if rivals[rival]["in_full"]["value"] is None
        ]
        if never:
            said.append(
                f"Against {rival.replace('_', ' ')} no number of queries pays for "
                f"{', '.join(never)}: it costs no more per query than the utility that the defence "
                "loses."
            )
    return said


def caveats(document: Mapping[str, Any]) -> list[str]:
    """Return what belongs beside every break-even."""
    modelled = sorted(
        name for name, bill in document["alignment"].items() if bill["source"] == "modelled"
    )
    published = document["constants"]["attack.published_cost"]["value"]
    said = [
        "Compute is a small part of the bill: evaluation and gathering the data dominate, and a "
        "method that is 'free' by the clock pays both.",
        "With open weights a monitor protects nothing, because the attacker deletes it: break-even "
        "has a meaning only for fine-tuning as a service, where the monitor also sees what a trap "
        "does not.",
        "One payment is not the end of it: the harmful data drift, released weights cannot be "
        "called back, and every size and variant needs a run and a battery of its own.",
        f"Published attacks on real models cost under {published:g} USD.",
        "Filtering the pre-training data costs "
        f"{_usd(document['filtered_pretraining'])} once, and is published to resist 10,000 steps "
        "of fine-tuning.",
    ]
    if "attacker" in document:
        said.append(
            f"Steps measured on small models are priced at {document['parameters']:.3g} "
            "parameters: that they carry over is an assumption."
        )
        if any(run["kind"] == "battery" for run in document["runs"]):
            said.append(
                "A battery's FLOPs are its own, counted in steps of its plain fine-tuning; an edit "
                "or a merge costs attack.edit_forwards forward passes besides. Its seeds are the "
                "attacker's: no interval is over immunisations."
            )
        methods = {run["method"] or "this defence" for run in document["runs"]}
        costless = methods - set(document["alignment"])
        if costless:
            said.append(
                f"What {', '.join(sorted(costless))} costs is not known, so there is no leverage: "
                "measure it with `mithridate cost --json` and give --cost."
            )
    if modelled:
        said.append(
            f"Modelled by passes and not timed: {', '.join(modelled)}. `mithridate cost --json` "
            "measures them."
        )
    return said


def _usd(quantity: Mapping[str, float | None]) -> str:
    return f"{_number(quantity)} USD"


def _number(quantity: Mapping[str, float | None]) -> str:
    value, low, high = (show(quantity[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def show(value: float | None, infinite: str = "inf") -> str:
    """Return a number in three significant digits without an exponent where that stays short."""
    if value is None:
        return infinite
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    return f"{value:.2g}"
