"""The folder of one immunisation run: what it is, how far it got, what it found."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from mithridate import schema
from mithridate.errors import InputError, RunStoppedError
from mithridate.files import remove_tree, sha256_file, sync, write_atomic, write_json
from mithridate.provenance import versions
from mithridate.training.checkpoints import (
    checkpoints,
    discard_all_but,
    newest_complete,
    step_of,
)
from mithridate.weights import PassCount

Row = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImmunisationResult:
    """What a finished run leaves.

    Attributes
    ----------
    model
        The immunised model; an adapter is merged in float32.
    history
        The logged rows: step, learning rate, gradient norm and the method's terms (means since
        the row before).
    ledger
        What each purpose has cost, over all sessions of the run.
    seconds
        Wall time of preparation and training, over all sessions of the run.
    output_dir
        The run folder; the model's folder is ``output_dir / "model"``.
    """

    model: PreTrainedModel
    history: list[Row]
    ledger: dict[str, PassCount]
    seconds: float
    output_dir: Path


class RunFolder:
    """The files of one run and what they say about it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model"
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"
        self.history_file = root / "history.jsonl"
        self._manifest_file = root / "manifest.json"
        self.manifest: dict[str, Any] = {}

    def read_manifest(self) -> None:
        """Read the manifest of an earlier session.

        Raises
        ------
        InputError
            The folder holds a model or a manifest that no immunisation wrote, which `clear` and
            `begin` would destroy.
        """
        if self._manifest_file.exists():
            foreign = []
            try:
                self.manifest = schema.check(
                    schema.RunManifest,
                    schema.read_object(self._manifest_file),
                    where=str(self._manifest_file),
                )
            except InputError:
                foreign = [self._manifest_file.name]
        else:
            foreign = [path.name for path in (self.model, self.adapter) if path.exists()]
        if foreign:
            raise InputError(
                f"this folder holds a {' and a '.join(foreign)} that no immunisation has written",
                where=str(self.root),
                mend="choose another output folder",
            )

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse an earlier session that was another run's, where there is anything to lose."""
        earlier = self.manifest.get("identity", identity)
        differing = [name for name in identity if earlier.get(name) != identity[name]]
        if differing and (self.model.exists() or newest_complete(self.checkpoints)):
            raise InputError(
                f"this folder holds another run: {', '.join(differing)} differ",
                where=str(self.root),
                mend="choose another output folder, or remove this one",
            )

    def finished(self) -> bool:
        """Tell whether the run is done and its model and history are still what was written."""
        if self.manifest.get("status") != "finished":
            return False
        listed = self.manifest.get("hashes", {})
        hashes = {self.model / name: digest for name, digest in listed.items()}
        if self.manifest.get("history"):
            hashes[self.history_file] = self.manifest["history"]["sha256"]
        damaged = [
            path
            for path, digest in (hashes or {self.model: ""}).items()
            if not path.is_file() or sha256_file(path) != digest
        ]
        if damaged:
            warnings.warn(
                f"{damaged[0]} is not what the finished run wrote: the run is made again",
                stacklevel=3,
            )
        return not damaged

    def result(self, model: PreTrainedModel) -> ImmunisationResult:
        """Return the finished run's result."""
        return ImmunisationResult(
            model=type(model).from_pretrained(self.model, dtype=torch.float32),
            history=[row for _, row in schema.read_rows(self.history_file)],
            ledger={
                name: PassCount(**one) for name, one in self.manifest.get("ledger", {}).items()
            },
            seconds=self.manifest.get("seconds", 0.0),
            output_dir=self.root,
        )

    def clear(self, keep: Path | None) -> None:
        """Remove what earlier sessions left, except the checkpoint ``keep``."""
        discard_all_but(self.checkpoints, keep)
        for path in (self.model, self.adapter):
            remove_tree(path)

    def begin(
        self, identity: dict[str, Any], settings: dict[str, Any], space: dict[str, Any]
    ) -> None:
        """Write ``config.yaml`` and the manifest."""
        write_atomic(self.root / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        self.manifest = {
            "status": "running",
            "identity": identity,
            **space,
            "seeds": [settings["training"]["seed"]],
            "versions": versions(),
        }
        write_json(self._manifest_file, self.manifest)

    def newest(self) -> Path | None:
        """Return the checkpoint to go on from, and say which newer ones are damaged."""
        found = newest_complete(self.checkpoints)
        for path in checkpoints(self.checkpoints):
            if path == found:
                break
            then = f"step {step_of(found)}" if found else "the beginning"
            warnings.warn(f"{path} is incomplete or damaged: going on from {then}", stacklevel=3)
        return found

    def finish(self, *, ledger: Mapping[str, PassCount], **results: Any) -> None:
        """Record the results; the checkpoints have served."""
        counts = {name: dataclasses.asdict(count) for name, count in ledger.items()}
        sync(self.history_file)
        rows = self.history_file.read_bytes().count(b"\n")
        history = {"rows": rows, "sha256": sha256_file(self.history_file)}
        write_json(
            self._manifest_file,
            self.manifest | {"status": "finished", "ledger": counts, "history": history} | results,
        )
        discard_all_but(self.checkpoints, None)
        # Trackers that write files (TensorBoard) write them there too.
        if self.checkpoints.exists() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()

    def stopped(self, main: bool, error: RunStoppedError) -> RunStoppedError:
        """Record why the run stopped and return ``error``."""
        if main:
            write_json(
                self._manifest_file, self.manifest | {"status": "stopped", "reason": str(error)}
            )
        return error

    def last_good(self) -> str:
        """Say which checkpoint a stopped run can go on from."""
        checkpoint = newest_complete(self.checkpoints)
        if checkpoint is None:
            return "no checkpoint was complete yet"
        return f"the last good checkpoint is step {step_of(checkpoint)} ({checkpoint})"


class Recorder(TrainerCallback):
    """Keeps ``history.jsonl`` equal to the rows of the steps that count.

    Attributes
    ----------
    start
        The step of the checkpoint that is gone on from.
    """

    def __init__(self, path: Path, on_log: Callable[[Row], None] | None) -> None:
        self.rows: list[Row] = []
        self.start = 0
        self._path = path
        self._on_log = on_log

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        *_: Any,
        **__: Any,
    ) -> None:
        """Start the file with the rows of the resumed checkpoint.

        Raises
        ------
        RunStoppedError
            The Trainer is at another step than the checkpoint.
        """
        if state.global_step != self.start:
            raise RunStoppedError(
                f"the checkpoint is of step {self.start}, and the run would go on from step "
                f"{state.global_step}: remove {self._path.parent / 'checkpoints'} and start again"
            )
        # Steps after the resumed checkpoint are done again: their rows go.
        self.rows = [_row(row) for row in state.log_history if "learning_rate" in row]
        if state.is_world_process_zero:
            write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        *_: Any,
        **__: Any,
    ) -> None:
        """Append the newest row."""
        newest = state.log_history[-1]
        if "learning_rate" not in newest or not state.is_world_process_zero:
            return
        row = _row(newest)
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        if self._on_log is not None:
            self._on_log(row)


def _row(logged: Mapping[str, float]) -> Row:
    return {"step": logged["step"]} | {
        name: value for name, value in logged.items() if name not in ("step", "epoch")
    }
