"""The records of a run folder: read strictly, with every fault named by file, line and field.

Numbers are finite, text can be written as UTF-8 and nothing is nested without end, whatever the
field; the fields that something is computed from have a type each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mithridate.errors import InputError
from mithridate.files import sha256_file
from mithridate.printable import quoted

_MOST_BYTES = 1 << 30
_MOST_DEPTH = 64
_AGAIN = "run the same command again: finished work is kept"

R = TypeVar("R", bound="Record")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise ValueError("not a finite number")
    return value


def _whole(value: Any) -> Any:
    if _number(value) != int(value):
        raise ValueError("not a whole number")
    return int(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=0)]
Share = Annotated[Number, Field(ge=-1e-9, le=1 + 1e-9)]
Target = Literal["undefended", "defended"]


class Record(BaseModel):
    """A JSON object; fields that nothing here reads are let through."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Moment(Record):
    """A model before the attack, or at the attacker's best checkpoint."""

    refusal: Share | None = None
    useful_harm: Share | None = None
    utility: Share | None = None
    learning_rate: Number | None = None
    step: Number | None = None


class TargetSummary(Record):
    """One attacked model."""

    before: Moment = Moment()
    after: Moment = Moment()
    per_learning_rate: list[Moment] = []


class Named(Record):
    """Something with a name, a judge for example."""

    name: str = "exact"


class AttackSummary(Record):
    """The attack in the words of its configuration."""

    kind: str = "sft"
    judge: Named = Named()
    diverged: list[str] = []


class Learnt(Record):
    """One model's benign fine-tuning."""

    accuracy: Share | None = None
    accuracy_before: Share | None = None
    utility: Share
    utility_before: Share
    refusal: Share | None = None
    n: Annotated[Whole, Field(ge=1)] = 1


class BenignSummary(Record):
    """Benign fine-tuning of both models; a report needs the accuracy of each."""

    undefended: Share | None = None
    defended: Share | None = None
    detail: dict[Target, Learnt] | None = None


class Unnamed(Record):
    """Accuracy on permitted items that no training row names."""

    n: Annotated[Whole, Field(ge=1)]
    undefended: Share
    defended: Share


class Cost(Record):
    """What a step costs."""

    passes_per_step: Number | None = None
    clock_ratio: Number | None = None
    parameter_buffers: Number | None = None


class Failure(Record):
    """A run of a battery's attack that failed."""

    attack: str
    target: str = "defended"
    configuration: str = ""
    learning_rate: Number = 0.0
    seed: Whole = 0
    error: str = ""


class SearchSummary(Record):
    """What a search spent."""

    attack: str
    target: str
    flops: Number


class Summary(Record):
    """``summary.json`` of a demo, an attack or a battery."""

    testbed: str = ""
    method: str = ""
    tier: str | None = None
    seed: Whole | None = None
    seeds: Count | list[Whole] | None = None
    undefended: TargetSummary | None = None
    defended: TargetSummary | None = None
    benign_finetuning: BenignSummary | None = None
    unnamed_permitted: Unnamed | None = None
    cost: Cost | None = None
    attack: AttackSummary | None = None
    judge: Named | None = None
    seconds: dict[str, Any] | None = None
    failed: list[Failure] = []
    searches: list[SearchSummary] = []


class TrajectoryRow(Record):
    """One probe of ``trajectory.jsonl``."""

    target: str
    learning_rate: Number
    step: Count
    refusal: Share
    useful_harm: Share
    utility: Share
    loss: Number | None = None
    outcomes: dict[str, Number] | None = None
    n_restricted: Count | None = None
    n_permitted: Count | None = None


class PlantingRow(Record):
    """One logged step of a planting."""

    step: Number = 0


class Change(Record):
    """The difference of two models on a task, with its interval."""

    estimate: Number
    low: Number
    high: Number
    answer: str = ""


class Accuracy(Record):
    """One model's accuracy on a task."""

    accuracy: Number


class TaskRow(Record):
    """One task of ``utility.json``."""

    task: str
    metric: str
    n: Annotated[Whole, Field(ge=1)]
    chance: Number
    counts: bool
    difference: Change | None
    model: Accuracy | None = None
    reference: Accuracy | None = None


class Weighed(Record):
    """A model whose utility was measured."""

    weights: str


class Utility(Record):
    """``utility.json``."""

    tasks: list[TaskRow]
    model: Weighed | None = None
    reference: Weighed | None = None


class Manifest(Record):
    """``manifest.json`` of a demo, an attack or a battery."""

    version: Any = Field(default=1, alias="schema")
    models: dict[str, str] = {}


class Passes(Record):
    """What one purpose has cost."""

    model_config = ConfigDict(extra="forbid")

    forwards: Count = 0
    backwards: Count = 0
    walks: Count = 0
    tokens: Count = 0
    generated: Count = 0
    seconds: Number = 0.0
    peak_bytes: Count = 0


class Written(Record):
    """How many rows a file has, and its SHA-256."""

    rows: Count
    sha256: str


class RunManifest(Record):
    """``manifest.json`` of an immunisation."""

    identity: dict[str, Any]
    status: Literal["running", "stopped", "finished"] = "running"
    hashes: dict[str, str] = {}
    history: Written | None = None
    ledger: dict[str, Passes] = {}
    seconds: Number = 0.0


class ListedAttack(Record):
    """An attack of ``battery.yaml``."""

    id: str
    family: str
    tier: str | list[str]


class BatteryFile(Record):
    """``battery.yaml`` of a run folder."""

    control: str | None = None
    attacks: list[ListedAttack] | None = None


class Criterion(Record):
    """One criterion of the acceptance card."""

    name: str
    state: Literal["passed", "failed", "not shown"]
    why: list[str]


def check(
    kind: type[R], value: Mapping[str, Any], *, where: str, mend: str = _AGAIN
) -> dict[str, Any]:
    """Return ``value`` if it is a record of ``kind``.

    Raises
    ------
    InputError
        Naming the first fields that are not what they should be.
    """
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise InputError(_told(error), where=where, mend=mend) from None
    return dict(value)


def _told(error: ValidationError) -> str:
    faults = []
    for one in error.errors(include_url=False, include_context=False)[:3]:
        field = ".".join(map(str, one["loc"])) or "the record"
        told = one["msg"].removeprefix("Value error, ")
        if one["type"] == "model_type":
            told = "not a JSON object"
        if one["type"] == "missing":
            faults.append(f"{quoted(field)[1:-1]} is missing")
        else:
            faults.append(f"{quoted(field)[1:-1]} is {quoted(one['input'])}, {told}")
    return "; ".join(faults)


def read_document(path: Path, *, mend: str = _AGAIN) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    InputError
        It is missing, cannot be read, or holds something that no run writes.
    """
    return parse(_text(path, mend), where=str(path), mend=mend)


def read_object(path: Path, *, mend: str = _AGAIN) -> dict[str, Any]:
    """Return the JSON object that a file holds; raises as `read_document` does."""
    value = read_document(path, mend=mend)
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path), mend=mend)
    return value


def read_rows(path: Path, *, mend: str = _AGAIN) -> list[tuple[str, dict[str, Any]]]:
    """Return each object of a JSON Lines file, with the place it stands at."""
    rows = []
    for number, line in enumerate(_text(path, mend).split("\n"), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        value = parse(line, where=where, mend=mend)
        if not isinstance(value, dict):
            raise InputError("the line is no JSON object", where=where, mend=mend)
        rows.append((where, value))
    return rows


def parse(text: str, *, where: str, mend: str = _AGAIN) -> Any:
    """Return the value of JSON text, in which every number is finite and all text is whole."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError("nested without end", where=where, mend=mend) from None
    except ValueError as error:  # digits without end, too
        raise InputError(f"not valid JSON: {quoted(str(error))[1:-1]}", where=where, mend=mend) \
            from None  # fmt: skip
    fault = _fault(value)
    if fault is not None:
        raise InputError(fault, where=where, mend=mend)
    return value


def _fault(value: Any) -> str | None:
    """Return what is wrong with a parsed document, or None."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(value, ())]
    while waiting:
        one, place = waiting.pop()
        if isinstance(one, str):
            if not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one):
                return f"half a character (a lone surrogate) in {quoted(one)}"
        elif isinstance(one, int | float):
            if not _finite(one):
                name = quoted(": ".join(place) or "the value")[1:-1]
                return f"{name} is {quoted(one)}, not a finite number"
        elif isinstance(one, dict | list):
            if len(place) == _MOST_DEPTH:
                return f"nested deeper than {_MOST_DEPTH} levels"
            if isinstance(one, dict):
                waiting += ((key, place) for key in one)
                waiting += ((part, (*place, key)) for key, part in one.items())
            else:
                waiting += ((part, (*place, str(n))) for n, part in enumerate(one))
    return None


def hash_of(path: Path, *, mend: str = _AGAIN) -> str:
    """Return the SHA-256 of a file of a run folder; raises as `read_document` does."""
    return _read(path, sha256_file, mend)


def _text(path: Path, mend: str) -> str:
    return _read(path, lambda path: path.read_text(encoding="utf-8"), mend)


def _read(path: Path, how: Callable[[Path], str], mend: str) -> str:
    where = str(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError("not a file", where=where, mend=mend)
        if path.stat().st_size > _MOST_BYTES:
            raise InputError("larger than any run writes it", where=where, mend=mend)
        return how(path)
    except FileNotFoundError:
        raise InputError(
            "the run is not finished: this file is missing", where=where, mend=mend
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=where, mend=mend) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not text: {quoted(str(error))[1:-1]}", where=where, mend=mend) from None
