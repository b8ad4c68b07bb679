"""Immunising a user's own model: everything is checked before the first step."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mithridate import models
from mithridate.configs import from_mapping, read_yaml, require
from mithridate.errors import InputError
from mithridate.events import Event, Listener, silent
from mithridate.examples import AS_PUBLISHED, Reading, check_disjoint, read_source
from mithridate.judges.answers import check_kinds
from mithridate.methods import METHODS, Method
from mithridate.model_folders import adapter_parameters
from mithridate.training.config import TrainingConfig
from mithridate.training.lora import with_adapter_of
from mithridate.training.trainer import immunise

_SECTIONS = ("method", "training")
_SUBSTITUTES = {"general": "benign", "prompts": "harmful"}
"""Which stream serves where a method's own is not given."""


@dataclass(frozen=True, kw_only=True)
class ImmunisationPlan:
    """What the command line was given.

    Parameters
    ----------
    model, revision
        Folder or Hub id of the aligned model.
    method
        Name of a registered method.
    streams
        Source of each stream, as `read_examples` takes it.
    config
        YAML file with the sections ``method`` and ``training``.
    steps, seed
        Override ``training.steps`` and ``training.seed``.
    reading
        How the streams are read.
    output_dir
        The run folder.
    """

    model: str
    method: str
    streams: Mapping[str, str]
    output_dir: Path
    revision: str | None = None
    config: Path | None = None
    steps: int | None = None
    seed: int | None = None
    reading: Reading = AS_PUBLISHED


def run_immunisation(plan: ImmunisationPlan, *, on_event: Listener = silent) -> dict[str, Any]:
    """Plant the method and return what was done, for a machine to read.

    Where ``general`` or ``prompts`` is needed and not given, ``benign`` or ``harmful`` serves.

    Raises
    ------
    InputError
        Anything that was given cannot be used; before any training.
    RunStoppedError
        The run stopped itself; the last complete checkpoint is kept.
    """
    method, training = read_settings(plan)
    method.check(None)
    if method.one_shot and plan.steps is not None:
        warnings.warn(f"{method.name} takes no steps: --steps has no effect", stacklevel=2)
    steps = 0 if method.one_shot else training.steps
    substituted = _substitutes(method, plan.streams)
    stored = models.check(plan.model, plan.revision)
    if stored is not None:
        _check_room(plan, method, training, stored.shapes.values())
    on_event(Event(stage="reading data"))
    found = {
        name: read_source(source, stream=name, reading=plan.reading)
        for name, source in plan.streams.items()
    }
    examples = {name: one.examples for name, one in found.items()}
    check_disjoint(examples)
    check_kinds(examples)
    left_out = {name: one.left_out for name, one in found.items()}
    left_out |= {name: left_out[other] for name, other in substituted.items()}
    examples |= {name: examples[other] for name, other in substituted.items()}
    unused = [name for name in plan.streams if name not in method.streams]
    unused = [name for name in unused if name not in substituted.values()]
    if unused:
        warnings.warn(f"{method.name} does not use the stream {', '.join(unused)}", stacklevel=2)
    examples = {name: rows for name, rows in examples.items() if name in method.streams}
    on_event(Event(stage="loading the model"))
    model, tokenizer = models.load(plan.model, revision=plan.revision)
    if stored is None:
        _check_room(plan, method, training, [tuple(p.shape) for p in model.parameters()])
    if training.save_dtype is None:
        dtype: Any = models.stored_dtype(plan.model, plan.revision)
        training = dataclasses.replace(training, save_dtype=dtype)

    stage = f"planting {method.name}"

    def on_log(row: Mapping[str, float]) -> None:
        on_event(Event(stage=stage, step=int(row["step"]), total=steps, metrics=row))

    on_event(Event(stage=stage, total=steps))
    result = immunise(
        model,
        tokenizer,
        examples,
        method,
        training,
        plan.output_dir,
        drop_invalid=plan.reading.drop_invalid,
        left_out=left_out,
        on_log=on_log,
    )
    return {
        "method": method.name,
        "model": str(plan.output_dir / "model"),
        "output_dir": str(plan.output_dir),
        "steps": steps,
        "seed": training.seed,
        "substituted_streams": substituted,
        "seconds": result.seconds,
        "passes": {
            purpose: {"forwards": count.forwards, "backwards": count.backwards}
            for purpose, count in result.ledger.items()
        },
        "last": result.history[-1] if result.history else {},
    }


def _substitutes(method: Method, given: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in method.streams if name not in given]
    substituted = {name: _SUBSTITUTES[name] for name in missing if _SUBSTITUTES.get(name) in given}
    lacking = [name for name in missing if name not in substituted]
    if lacking:
        raise InputError(
            f"the method {method.name!r} needs the streams {', '.join(method.streams)}; "
            f"{', '.join(lacking)} not given",
            mend="add " + " ".join(f"--{name} FILE" for name in lacking),
        )
    for name, other in substituted.items():
        warnings.warn(f"--{name} not given: the stream {other} serves as {name}", stacklevel=3)
    return substituted


def read_settings(plan: ImmunisationPlan) -> tuple[Method, TrainingConfig]:
    """Return the method and the training configuration of ``plan``.

    Raises
    ------
    InputError
        An unknown method, section or key, or a value out of range.
    """
    method_class = METHODS.load(plan.method)
    where = str(plan.config) if plan.config else "defaults"
    given = read_yaml(plan.config) if plan.config else {}
    unknown = [key for key in given if key not in _SECTIONS]
    require(
        not unknown,
        f"{where}: unknown section {', '.join(map(repr, unknown))}",
        f"known sections: {', '.join(_SECTIONS)}",
    )
    sections = {name: _section(given, name, where) for name in _SECTIONS}
    # The configuration that a run writes names its method too, and can be given again.
    named = sections["method"].pop("name", plan.method)
    require(
        named == plan.method,
        f"{where}: the configuration is for the method {named!r}, not {plan.method!r}",
        "give the matching --method or --config",
    )
    if plan.steps is not None:
        sections["training"]["steps"] = plan.steps
    if plan.seed is not None:
        sections["training"]["seed"] = plan.seed
    method = method_class(
        from_mapping(method_class.config_class, sections["method"], where=f"{where}: method")
    )
    training = from_mapping(TrainingConfig, sections["training"], where=f"{where}: training")
    return method, with_adapter_of(method, training)


def _section(given: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = given.get(name) or {}
    require(
        isinstance(value, Mapping),
        f"{where}: the section {name!r} is not a mapping",
        "write key: value lines under it",
    )
    return dict(value)


def _check_room(
    plan: ImmunisationPlan,
    method: Method,
    training: TrainingConfig,
    shapes: Collection[tuple[int, ...]],
) -> None:
    rank = training.lora_rank
    light = rank is not None or method.one_shot
    needed = models.requirements(
        sum(map(prod, shapes)),
        # An adapter's gradients, moments and buffers are small beside the frozen weights.
        copies=1 if light else 4 + method.parameter_buffers,
        # The older checkpoint goes only once the newer one is complete.
        checkpoints=2 if training.save_every and not method.one_shot else 0,
        adapter=None if rank is None else adapter_parameters(shapes, rank),
    )
    models.check_room(needed, plan.output_dir)
