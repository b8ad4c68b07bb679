"""Supervised fine-tuning, with the stock `transformers.Trainer`, as an attacker would do it.

Nothing here knows of any defence: a shuffled data loader, the model's own loss, any optimiser,
learning rate and schedule, all weights or a LoRA adapter. Between steps a probe looks at the model.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import mithridate
from mithridate.chat import ChatFormat, Encoded
from mithridate.configs import Seed, check_values, require
from mithridate.errors import InputError, NonFiniteError
from mithridate.examples import Example, fingerprint
from mithridate.files import sha256_file, sha256_of, sync, write_atomic, write_json
from mithridate.release import weights_hash
from mithridate.templates import day
from mithridate.weights.maps import adapted_coverage, adapter_targets

Row = dict[str, float]
Probe = Callable[[PreTrainedModel, int], dict[str, float]]
Progress = Callable[[int, int, Row], None]
Status = Literal["ok", "diverged"]

_ROWS = "attack.jsonl"
_RECORD = "attack.json"
_ANSWERS = "answers-*.json"
_UNUSABLE_SCHEDULES = {"reduce_lr_on_plateau", "greedy"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The attacker's choices.

    Parameters
    ----------
    learning_rate
        Peak learning rate.
    steps
        Optimiser steps.
    batch_size
        Rows per step.
    optimiser
        By the Trainer's names (``adamw_torch``, ``sgd``, ``adafactor``, ...).
    weight_decay
        The optimiser's.
    schedule
        Of the learning rate, by the Trainer's names.
    warmup_steps
        Of linear warm-up.
    lora_rank
        Train a fresh adapter on every linear map of the decoder layers, fused experts among them
        (alpha twice the rank); ``None`` trains all weights.
    probe_every
        Steps between probes; the first and the last model are always probed.
    seed
        Of the order of the rows and the adapter.
    autocast
        Run passes in bfloat16 autocast; weights stay float32.
    max_grad_norm
        Clipping bound on the gradient's L2 norm; 0 turns clipping off.
    max_length
        Most tokens of a row; of a longer one the prompt is cut. ``None`` follows the data, up to
        what the model takes.
    template_arguments
        Given to the chat template (``enable_thinking``, ...); ``chat_template`` names one of
        several.
    template_date
        Day that a chat template is told that asks for it; ``None`` takes today.
    """

    learning_rate: float = 2e-5
    steps: int = 60
    batch_size: int = 8
    optimiser: str = "adamw_torch"
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    lora_rank: int | None = None
    probe_every: int = 5
    seed: Seed = 0
    autocast: bool = False
    max_grad_norm: float = 1.0
    max_length: int | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    template_date: str | datetime.date | None = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.template_date is not None:
            object.__setattr__(self, "template_date", day(self.template_date).isoformat())
        for name in ("steps", "batch_size", "probe_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", f"raise {name}")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm"):
            require(getattr(self, name) >= 0, f"{name} is negative", f"make {name} 0 or more")
        require(
            0 < self.learning_rate < math.inf,
            f"learning_rate {self.learning_rate} is not a positive number",
            "1e-6 to 1e-2 are usual",
        )
        for name, otherwise in (("lora_rank", "all weights"), ("max_length", "what fits")):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"{name} must be at least 1",
                f"or null for {otherwise}",
            )
        optimisers = [item.value for item in OptimizerNames]
        require(
            self.optimiser in optimisers,
            f"unknown optimiser {self.optimiser!r}",
            f"known: {', '.join(optimisers)}",
        )
        schedules = [item.value for item in SchedulerType if item.value not in _UNUSABLE_SCHEDULES]
        require(
            self.schedule in schedules,
            f"unknown schedule {self.schedule!r}",
            f"known: {', '.join(schedules)}",
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttackRecord:
    """What is kept of a finished attack beside its rows; the attacked weights are not kept.

    Attributes
    ----------
    key
        SHA-256 of everything that decides the rows: weights, data, template, configuration,
        what the probe measures, version.
    status
        ``diverged`` when the loss stopped being a number; the rows end before that.
    seconds
        Wall time, probes included.
    probe_seconds
        Wall time of the probes.
    weights
        SHA-256 of the attacked weights.
    coverage
        Share of the decoder layers' weights that the attack could change.
    rows
        How many rows the attack has.
    files
        SHA-256 of every file beside the record, by name.
    """

    key: str
    status: Status
    seconds: float
    probe_seconds: float
    weights: str
    rows: int
    files: dict[str, str]
    coverage: float = 1.0


def finetune(
    model: PreTrainedModel | str | Path,
    chat: ChatFormat,
    examples: Sequence[Example],
    config: FinetuneConfig,
    *,
    probe: Probe,
    probe_key: str | None = None,
    on_progress: Progress | None = None,
    output_dir: Path,
) -> list[Row]:
    """Fine-tune a copy of ``model`` on ``examples`` and return what the probes saw.

    Parameters
    ----------
    model
        A model, which is left as it was, or a folder to load one from.
    examples
        The attacker's rows.
    probe
        ``probe(model, step)`` returns metrics of the model after ``step`` steps.
    probe_key
        Names what the probe measures (for example a hash of its items). Where it is given, a
        finished attack in ``output_dir`` with the same key is not repeated.
    on_progress
        Called as ``on_progress(step, steps, newest)`` after every step.
    output_dir
        Gets ``attack.jsonl`` (rows as they come) and at the end ``attack.json`` (`AttackRecord`).

    Returns
    -------
    list of dict
        Rows ``{step, loss, **metrics}``, with ``coverage`` where an adapter leaves some of the
        decoder layers' weights alone. ``loss`` is the mean over the rows of the training step
        just done; at step 0 the mean over all the attacker's rows, batch by batch.
    """
    require(len(examples) > 0, "the attack has no examples", "give it at least one row")
    attacked = own_copy(model)
    key = sha256_of(
        {
            "model": weights_hash(attacked),
            "examples": fingerprint(examples),
            "template": chat.template_hash,
            "config": decisive(config),
            "probe": probe_key,
            "version": mithridate.__version__,
        }
    )
    if probe_key is not None and is_finished(output_dir, key):
        return read_rows(output_dir)
    rows = [chat.encode(example, max_length=config.max_length) for example in examples]
    # The Trainer seeds everything too, but only after the adapter is drawn.
    set_seed(config.seed)
    if config.lora_rank is not None:
        attacked = with_adapter(attacked, config.lora_rank)
    watcher = Watcher(config, probe, output_dir, on_progress)
    trainer = Trainer(
        model=attacked,
        args=arguments_for(config, output_dir, rows=config.batch_size),
        train_dataset=_Rows(rows),
        data_collator=lambda items: _inputs(chat, items),
        callbacks=[watcher],
    )
    trainer.remove_callback(PrinterCallback)
    watcher.start(attacked, mean_loss(trainer, chat, rows, autocast=config.autocast))
    trainer.train()
    watcher.finish(key, attacked)
    return watcher.rows


def decisive(config: FinetuneConfig) -> dict[str, Any]:
    """Return what of ``config`` decides an attack beside the chat format, which is hashed."""
    chosen = dataclasses.asdict(config)
    del chosen["template_arguments"], chosen["template_date"]
    return chosen


def is_finished(output_dir: Path, key: str) -> bool:
    """Whether ``output_dir`` holds, undamaged, the finished attack that ``key`` names."""
    record = read_record(output_dir)
    if record is None or record.key != key:
        return False
    damaged = [
        name for name, digest in record.files.items() if _digest(output_dir / name) != digest
    ]
    if damaged:
        warnings.warn(
            f"{output_dir / damaged[0]} is not what the attack wrote: it is made again",
            stacklevel=2,
        )
    return not damaged


def read_record(output_dir: Path) -> AttackRecord | None:
    """Return the record of the finished attack in ``output_dir``, or ``None``.

    One that cannot be read is none, with a warning: the attack is made again.
    """
    path = output_dir / _RECORD
    try:
        record = AttackRecord(**json.loads(path.read_text(encoding="utf-8")))
        whole = isinstance(record.files, dict) and _ROWS in record.files
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        warnings.warn(f"{path} is no record of an attack: it is made again", stacklevel=2)
        return None
    return record


def _digest(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def read_rows(output_dir: Path) -> list[Row]:
    """Return the rows that the attack in ``output_dir`` has written so far."""
    lines = (output_dir / _ROWS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Watcher(TrainerCallback):
    """Probes on schedule, writes each row as it comes, and ends a diverged attack.

    It listens to the log of every step, the first event that knows the step's loss. What an
    earlier attack left in ``output_dir`` is discarded.
    """

    def __init__(
        self, config: FinetuneConfig, probe: Probe, output_dir: Path, on_progress: Progress | None
    ) -> None:
        self.rows: list[Row] = []
        self.status: Status = "ok"
        self.probe_seconds = 0.0
        self._config = config
        self._probe = probe
        self._output_dir = output_dir
        self._on_progress = on_progress
        self._started = time.perf_counter()
        (output_dir / _RECORD).unlink(missing_ok=True)
        for path in output_dir.glob(_ANSWERS):
            path.unlink()
        write_atomic(output_dir / _ROWS, "")

    def start(self, model: PreTrainedModel, loss: float) -> None:
        """Probe the model before the attack.

        Raises
        ------
        NonFiniteError
            If its loss is not a number.
        """
        if not math.isfinite(loss):
            raise NonFiniteError("loss", loss, "the model is broken before the attack")
        self._add(model, 0, loss)

    def finish(self, key: str, model: PreTrainedModel) -> None:
        """Write the record of the attack that ``key`` names, once all else is on disk."""
        files = [path for path in sorted(self._output_dir.glob("*.json*")) if path.is_file()]
        for path in (*files, self._output_dir):
            sync(path)
        record = AttackRecord(
            key=key,
            status=self.status,
            seconds=time.perf_counter() - self._started,
            probe_seconds=self.probe_seconds,
            weights=weights_hash(model),
            coverage=adapted_coverage(model, trained=True),
            rows=len(self.rows),
            files={path.name: sha256_file(path) for path in files},
        )
        write_json(self._output_dir / _RECORD, dataclasses.asdict(record))

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **event: Any,
    ) -> None:
        """Take in one finished step."""
        logged = event["logs"]
        if "loss" not in logged:
            return  # the summary at the end
        step, loss = state.global_step, logged["loss"]
        if not math.isfinite(loss) or not math.isfinite(logged.get("grad_norm", 0.0)):
            self.status = "diverged"
            control.should_training_stop = True
            return
        if step % self._config.probe_every == 0 or step == self._config.steps:
            self._add(event["model"], step, loss)
        elif self._on_progress is not None:
            self._on_progress(step, self._config.steps, {"step": step, "loss": loss})

    def _add(self, model: PreTrainedModel, step: int, loss: float) -> None:
        started = time.perf_counter()
        row = {"step": step, "loss": loss} | self._probe(model, step)
        coverage = adapted_coverage(model, trained=True)
        if step > 0 and coverage < 1:
            row["coverage"] = coverage
        self.probe_seconds += time.perf_counter() - started
        self.rows.append(row)
        with (self._output_dir / _ROWS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        if self._on_progress is not None:
            self._on_progress(step, self._config.steps, row)


class _Rows(torch.utils.data.Dataset[Encoded]):
    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]


def own_copy(model: PreTrainedModel | str | Path) -> PreTrainedModel:
    """Return a trainable model that nobody else holds."""
    if isinstance(model, PreTrainedModel):
        own = copy.deepcopy(model)
    else:
        from transformers import AutoModelForCausalLM

        if not (Path(model) / "config.json").is_file():
            raise InputError(
                "no model here", where=str(model), mend="give a folder written by save_pretrained"
            )
        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
    return own.requires_grad_(True)


def with_adapter(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Attach a fresh adapter to every linear map of the decoder layers, alpha twice its rank."""
    # peft needs seconds to import, and most attacks never use it.
    from peft import LoraConfig, TaskType, get_peft_model

    modules, parameters = adapter_targets(model)
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=modules,
        target_parameters=parameters or None,
    )
    # It forwards and generates like the model inside it, which is all that the attack asks.
    return cast("PreTrainedModel", get_peft_model(model, adapter))


def arguments_for(
    config: FinetuneConfig,
    output_dir: Path,
    *,
    rows: int,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """Return the Trainer's arguments for an attack: one process, one device, nothing saved.

    Parameters
    ----------
    rows
        Rows per step.
    kind, more
        The class of arguments, and those that are its own.
    """
    arguments = kind(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=rows,
        learning_rate=config.learning_rate,
        optim=config.optimiser,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.autocast,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **more,
    )
    # Several devices would each take a batch: another attack than the one asked for.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    require(
        arguments.world_size == 1,
        f"an attack was launched as {arguments.world_size} processes",
        "launch it as one; run several attacks side by side instead",
    )
    return arguments


def _inputs(chat: ChatFormat, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    batch = chat.collate(rows)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
    }


def mean_loss(
    trainer: Trainer, chat: ChatFormat, rows: Sequence[Encoded], *, autocast: bool
) -> float:
    """Return the mean loss over the attacker's rows, batch by batch."""
    size = trainer.args.train_batch_size
    model = trainer.model
    assert model is not None, "the Trainer was given one"
    model.eval()
    losses = []
    with (
        torch.no_grad(),
        torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=autocast),
    ):
        for start in range(0, len(rows), size):
            inputs = _inputs(chat, rows[start : start + size])
            moved = {name: tensor.to(trainer.args.device) for name, tensor in inputs.items()}
            losses.append(float(model(**moved).loss))
    return sum(losses) / len(losses)
