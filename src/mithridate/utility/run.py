"""A model's utility by tasks, beside its reference's: what a defence costs before any attack."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mithridate import models
from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.events import Event, Listener, silent
from mithridate.files import read_kept, sha256_of, write_json, write_kept
from mithridate.folders import run_folder
from mithridate.measures.rows import Limits
from mithridate.measures.statistics import equivalence, paired_difference
from mithridate.measures.trajectory import wilson
from mithridate.provenance import versions
from mithridate.release import weights_hash
from mithridate.testbeds import TESTBEDS, load_testbed
from mithridate.testbeds.base import resolve_model
from mithridate.utility.choosing import choose
from mithridate.utility.harness import Asked, Scores, check_installed, open_task, score, wrap

_AT_ONCE = 64  # items between two signs of life, and between two saves
_TOST = 0.9
_ROOM, _ERRORS = 0.1, 3.0


@dataclass(frozen=True, kw_only=True)
class UtilityPlan:
    """What the command line was given.

    Parameters
    ----------
    model, reference
        Folder, Hub id or ``lattice:aligned`` and the like. The reference is the model before
        immunisation: it decides which tasks count, and what "kept" means.
    tasks
        As `choose` reads them.
    data
        Folder of the public data; ``None``: that of each task file.
    limit
        The first so many items of each task; ``None``: all.
    batch_size
        Requests that the model reads at a time; results change in rounding with it.
    plain
        Leave the chat template out.
    output_dir
        Any run folder; ``utility.json`` and ``utility/`` are added to it.
    """

    model: str
    tasks: tuple[str, ...]
    output_dir: Path
    reference: str | None = None
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    plain: bool = False

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}", "give 1 or more")


def run_utility(plan: UtilityPlan, *, on_event: Listener = silent) -> dict[str, Any]:
    """Measure, write ``utility.json`` and return it.

    Raises
    ------
    InputError
        Something that was given cannot be used, or another process writes into the folder;
        before any model is asked.
    """
    harness = check_installed()
    with run_folder(plan.output_dir):
        return _run(plan, harness, on_event)


def _run(plan: UtilityPlan, harness: str, on_event: Listener) -> dict[str, Any]:
    started = time.perf_counter()
    sources = {"reference": plan.reference, "model": plan.model}
    folders = {name: _folder(source) for name, source in sources.items() if source is not None}
    for source in folders.values():
        models.check(source)
    on_event(Event(stage="reading the tasks"))
    tasks = [task.first(plan.limit) for task in choose(plan.tasks, plan.data)]
    for task in tasks:
        open_task(task, plain=True)
    scores: dict[str, dict[str, Scores]] = {}
    asked: dict[str, Asked] = {}
    described: dict[str, dict[str, Any]] = {}
    for target, source in folders.items():
        on_event(Event(stage=f"opening the {target}"))
        model, tokenizer = models.load(source)
        models.check_room(
            models.requirements(model.num_parameters(), copies=1, checkpoints=0), plan.output_dir
        )
        if torch.accelerator.is_available():
            torch.nn.Module.to(model, torch.accelerator.current_accelerator())
        chat = ChatFormat(tokenizer)
        plain = plan.plain or not chat.templated
        digest = weights_hash(model)
        described[target] = {
            "source": sources[target],
            "weights": digest,
            "chat_template": None if plain else chat.template_hash,
        }
        lm = wrap(model, chat, batch_size=plan.batch_size)
        scores[target] = {}
        for task in tasks:
            one = asked[task.name] = open_task(task, plain=plain)
            key = sha256_of(
                {
                    "weights": digest,
                    "task": task.hash,
                    "chat_template": described[target]["chat_template"],
                    "batch_size": plan.batch_size,
                    "at_once": _AT_ONCE,
                    "harness": harness,
                    "transformers": transformers.__version__,
                }
            )
            path = plan.output_dir / "utility" / f"{key}.json"
            scores[target][task.name] = _score(
                lm, one, chat, path, plain=plain,
                stage=f"{task.name} on the {target}", on_event=on_event,
            )  # fmt: skip
    rows = [_row(one, {name: found[one.task.name] for name, found in scores.items()})
            for one in asked.values()]  # fmt: skip
    document = {
        **described,
        "tasks": rows,
        "utility": _utility(rows),
        "limit": plan.limit,
        "batch_size": plan.batch_size,
        "versions": {"lm_eval": harness, **versions()},
        "seconds": time.perf_counter() - started,
    }
    write_json(plan.output_dir / "utility.json", document)
    return document


def _folder(source: str) -> str:
    """Return where a model is, for a testbed's own by its name."""
    name, colon, _ = source.partition(":")
    if colon and name in TESTBEDS.names():
        return str(resolve_model(source, load_testbed(name)))
    return source


def _score(
    lm: Any,
    asked: Asked,
    chat: ChatFormat,
    path: Path,
    *,
    plain: bool,
    stage: str,
    on_event: Listener,
) -> Scores:
    """Return what the task's items score; those that a former run finished are kept."""
    total = len(asked.task.rows)
    found = Scores()
    kept = read_kept(path, path.stem)
    if kept is not None:
        found = Scores(**kept)
    metric = asked.metrics[0]
    done = len(found.right.get(metric, ()))
    if done < total:
        # Whole portions only: an answer may change in rounding with what is asked beside it.
        done -= done % _AT_ONCE
        found = _first(found, done)
    on_event(Event(stage=stage, step=min(done, total), total=total))
    while done < total:
        portion = score(lm, asked, chat, done, min(done + _AT_ONCE, total), plain=plain)
        for name, right in portion.right.items():
            found.right.setdefault(name, []).extend(right)
        found.truncated += portion.truncated
        done = len(found.right[metric])
        write_kept(path, path.stem, dataclasses.asdict(found))
        accuracy = sum(found.right[metric]) / done
        on_event(Event(stage=stage, step=done, total=total, metrics={metric: accuracy}))
    return _first(found, total)


def _first(scores: Scores, count: int) -> Scores:
    return Scores(
        right={name: right[:count] for name, right in scores.right.items()},
        truncated=scores.truncated[: math.ceil(count / _AT_ONCE)],
    )


def _row(asked: Asked, scores: dict[str, Scores]) -> dict[str, Any]:
    metric = asked.metrics[0]
    right = {target: found.right[metric] for target, found in scores.items()}
    n = len(right["model"])
    judged = right.get("reference", right["model"])
    accuracy = sum(judged) / n
    needed = max(_ROOM, _ERRORS * math.sqrt(accuracy * (1 - accuracy) / n))
    difference = None
    if "reference" in right:
        margin = Limits().margin(n)
        estimate, low, high = paired_difference(right["model"], right["reference"], level=_TOST)
        difference = {
            "estimate": estimate,
            "low": low,
            "high": high,
            "margin": margin,
            "answer": equivalence(low, high, margin),
        }
    return {
        "task": asked.task.name,
        "metric": metric,
        "n": n,
        "chance": asked.chance,
        "counts": accuracy - asked.chance >= needed,
        "needs": asked.chance + needed,
        **{target: _found(asked, found) for target, found in scores.items()},
        "difference": difference,
        "hash": asked.task.hash,
    }


def _found(asked: Asked, found: Scores) -> dict[str, Any]:
    metric, *others = asked.metrics
    right = found.right[metric]
    n = len(right)
    low, high = wilson(sum(right), n)
    return {
        "accuracy": sum(right) / n,
        "low": low,
        "high": high,
        "other_metrics": {
            name: sum(found.right[name]) / n for name in others if name in found.right
        },
        "truncated": sum(found.truncated),
    }


def _utility(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return U, the mean over the tasks that count; None where none does.

    The interval of the difference recovers its variance from those of the tasks: about the mean,
    the root of the summed squares of their arms over their number (Zou and Donner 2008).
    """
    counted = [row for row in rows if row["counts"]]
    if not counted:
        return None
    found: dict[str, Any] = {"tasks": [row["task"] for row in counted]}
    for target in ("reference", "model"):
        if target in counted[0]:
            found[target] = math.fsum(row[target]["accuracy"] for row in counted) / len(counted)
    found["difference"] = None
    if "reference" in counted[0]:
        parts = [row["difference"] for row in counted]
        estimate = math.fsum(part["estimate"] for part in parts) / len(parts)
        below, above = (
            math.sqrt(math.fsum((part["estimate"] - part[side]) ** 2 for part in parts))
            / len(parts)
            for side in ("low", "high")
        )
        margin = Limits().margin(sum(row["n"] for row in counted))
        found["difference"] = {
            "estimate": estimate,
            "low": estimate - below,
            "high": estimate + above,
            "margin": margin,
            "answer": equivalence(estimate - below, estimate + above, margin),
        }
    return found
