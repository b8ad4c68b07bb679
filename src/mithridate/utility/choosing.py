"""Which tasks are asked for: task files with local data, and a testbed's own questions."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mithridate.configs import read_yaml, require
from mithridate.errors import InputError
from mithridate.examples import Example, fingerprint
from mithridate.files import sha256_file, sha256_of
from mithridate.judges.outcomes import Outcome
from mithridate.testbeds import TESTBEDS, load_testbed

_KEYS = frozenset(
    {
        "task", "task_alias", "tag", "dataset_path", "dataset_kwargs", "training_split",
        "validation_split", "test_split", "fewshot_split", "fewshot_config", "num_fewshot",
        "doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix",
        "target_delimiter", "fewshot_delimiter", "output_type", "generation_kwargs", "filter_list",
        "metric_list", "repeats", "should_decontaminate", "doc_to_decontamination_query",
        "metadata",
    }
)  # fmt: skip
"""What a task file may say; all else that the harness knows runs code or needs the network."""

_KINDS = ("multiple_choice", "generate_until")
_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Those that say right or wrong of each item; of others the harness asks the network for code."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task whose data are read.

    Attributes
    ----------
    config
        The harness's configuration, without its data.
    splits
        The rows of every split.
    split
        The one that is asked.
    where
        The file of each split's rows, for messages.
    chance
        Accuracy of guessing; None: to be found from the rows.
    hash
        SHA-256 of definition and data.
    """

    name: str
    config: Mapping[str, Any]
    splits: Mapping[str, list[dict[str, Any]]]
    split: str
    hash: str
    where: Mapping[str, str] = field(default_factory=dict)
    chance: float | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are asked."""
        return self.splits[self.split]

    def first(self, limit: int | None) -> Task:
        """Return the task with its first ``limit`` rows."""
        return replace(self, splits={**self.splits, self.split: self.rows[:limit]})


def choose(names: Sequence[str], data: Path | None) -> list[Task]:
    """Return the tasks that ``names`` ask for.

    Parameters
    ----------
    names
        Each one of ours (``piqa``), a task file (``mine.yaml``), or a testbed's questions
        (``lattice:permitted``, ``lattice:unnamed``, or a category such as ``lattice:add``).
    data
        Folder that the data files of task files are found in; by default that of the task file.

    Raises
    ------
    InputError
        An unknown name, a task file that cannot be used, or data that are not there.
    """
    require(bool(names), "no task", f"give --tasks, for example {', '.join(packaged()[:2])}")
    tasks = [_choose(name, data) for name in dict.fromkeys(names)]
    seen: set[str] = set()
    for task in tasks:
        require(task.name not in seen, f"two tasks are called {task.name!r}", "rename one of them")
        seen.add(task.name)
    return tasks


def packaged() -> list[str]:
    """Return the names of the task files that the package holds."""
    return sorted(path.name.removesuffix(".yaml") for path in _room().glob("*.yaml"))


def _room() -> Path:
    return Path(str(files("mithridate.utility") / "tasks"))


def _choose(name: str, data: Path | None) -> Task:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError("no such task file", where=name, mend="check the path")
        return _from_file(path, data or path.parent)
    if ":" in name:
        return _of_testbed(name)
    if name not in packaged():
        near = difflib.get_close_matches(name, packaged(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"unknown task {name!r}",
            where="--tasks",
            mend=f"{hint}known: {', '.join(packaged())}; or a task file of your own (.yaml), or a "
            "testbed's questions, for example lattice:permitted",
        )
    path = _room() / f"{name}.yaml"
    if data is None:
        raise InputError(
            f"nobody says where the data of the task {name!r} are",
            where="--data",
            mend=f"give the folder that holds {', '.join(_data_files(path).values())}",
        )
    return _from_file(path, data)


def _data_files(path: Path) -> dict[str, str]:
    """Return the data file of each split, as the task file names it."""
    named = (read_yaml(path).get("dataset_kwargs") or {}).get("data_files")
    if not isinstance(named, Mapping) or not all(isinstance(one, str) for one in named.values()):
        raise InputError(
            "the task file does not name its data",
            where=f"{path}: dataset_kwargs: data_files",
            mend="name one JSON Lines file for each split: {test: folder/test.jsonl}",
        )
    return {str(split): str(name) for split, name in named.items()}


def _from_file(path: Path, data: Path) -> Task:
    config = read_yaml(path)
    foreign = sorted(map(str, set(config) - _KEYS))
    faults = [f"the key {name!r} is not read from task files" for name in foreign]
    if config.get("dataset_path") != "json":
        faults.append(f"dataset_path is {config.get('dataset_path')!r}: data are read offline")
    if config.get("output_type", "generate_until") not in _KINDS:
        faults.append(f"output_type is {config.get('output_type')!r}")
    for entry in config.get("metric_list") or ():
        metric = entry.get("metric") if isinstance(entry, Mapping) else entry
        if metric not in _METRICS or (isinstance(entry, Mapping) and entry.get("hf_evaluate")):
            faults.append(f"the metric {metric!r} is not counted here")
    if faults:
        raise InputError(
            "; ".join(faults),
            where=str(path),
            mend=f"use dataset_path: json, output_type: {' or '.join(_KINDS)}, the metrics "
            f"{', '.join(_METRICS)}, and of the harness's keys: {', '.join(sorted(_KEYS))}",
        )
    named = _data_files(path)
    split = config.get("test_split") or config.get("validation_split")
    needed = [split, config.get("fewshot_split")]
    for one in needed:
        if one not in named and (one is not None or split is None):
            raise InputError(
                f"no data file is named for the split {one!r}",
                where=str(path),
                mend="name test_split (or validation_split), and its file under data_files",
            )
    sources = {one: data / named[one] for one in needed if one is not None}
    return Task(
        name=str(config.get("task") or path.stem),
        config={key: value for key, value in config.items() if not key.startswith("dataset_")},
        splits={one: _rows(source) for one, source in sources.items()},
        split=str(split),
        hash=sha256_of([config, {one: sha256_file(source) for one, source in sources.items()}]),
        where={one: str(source) for one, source in sources.items()},
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            "no such data file",
            where=str(path),
            mend="--data names the folder that the task file's data_files are found in; "
            "docs/utility.md says where each set comes from",
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not text: {error}", where=str(path), mend="give JSON Lines") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"not valid JSON: {error}", where=f"{path}: line {number}", mend="correct the line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                "the line is no JSON object", where=f"{path}: line {number}", mend="give JSON Lines"
            )
        rows.append(row)
    if not rows:
        raise InputError("the file holds no row", where=str(path), mend="give another file")
    return rows


def _of_testbed(name: str) -> Task:
    bed_name, _, part = name.partition(":")
    bed_class = TESTBEDS.load(bed_name)
    bed = load_testbed(bed_name)
    by_category: dict[str, list[Example]] = {}
    for item in bed.data.permitted:
        by_category.setdefault(item.category, []).append(item)
    sets = {"permitted": bed.data.permitted, "unnamed": bed.data.unnamed, **by_category}
    known = [one for one, items in sets.items() if items]
    if part not in known:
        raise InputError(
            f"the testbed {bed_class.name} has no questions {part!r}",
            where="--tasks",
            mend=f"known: {', '.join(f'{bed_name}:{one}' for one in known)}",
        )
    items = sets[part]

    def judged(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
        outcome = bed.judge(items[doc["index"]], answers[0].strip())
        return {"exact": float(outcome is Outcome.EXACT)}

    return Task(
        name=name,
        config={
            "task": name,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "process_results": judged,
            "generation_kwargs": {"do_sample": False, "max_gen_toks": bed.max_new_tokens},
            "metric_list": [{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
        },
        splits={
            "test": [
                {"index": n, "prompt": item.prompt, "answer": item.answer,
                 "category": item.category}
                for n, item in enumerate(items)
            ]
        },
        split="test",
        hash=sha256_of([name, fingerprint(items), bed.max_new_tokens]),
        chance=sum(bed.chance.get(item.category, 0.0) for item in items) / len(items),
    )  # fmt: skip
