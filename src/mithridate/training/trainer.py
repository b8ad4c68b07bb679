"""`immunise`: drives a method over its streams on top of `transformers.Trainer`.

The method leaves one combined gradient in ``.grad``; clipping, optimiser, schedule, logging,
trackers, checkpoints and multi-process launch are the Trainer's. What is ours is that the method's
own streams, state and counters are saved too, that only complete checkpoints are resumed, and
that a term which does nothing stops the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import mithridate
from mithridate import lengths
from mithridate.chat import Batch, ChatFormat
from mithridate.configs import require
from mithridate.errors import InputError, NonFiniteError, RunInterruptedError, RunStoppedError
from mithridate.examples import Example, fingerprint, with_shuffled_answers
from mithridate.files import sha256_of, write_json
from mithridate.folders import run_folder
from mithridate.methods import Method, RunContext
from mithridate.release import merged, round_weights, sampled, save_release, weights_hash
from mithridate.training.checkpoints import discard_all_but, seal, step_of
from mithridate.training.config import TrainingConfig
from mithridate.training.launch import refuse_unsupported_launch, stop_on_signal
from mithridate.training.lora import attach_lora, describe_space, with_adapter_of
from mithridate.training.monitors import ChangeCheck, TermMonitor
from mithridate.training.recompute import recomputed
from mithridate.training.rewording import with_rewordings
from mithridate.training.runs import ImmunisationResult, Recorder, Row, RunFolder
from mithridate.training.streams import StreamSampler
from mithridate.weights import GradientOracle, PassCount

if TYPE_CHECKING:
    from peft import PeftModel

_MOST_ROUNDED_AWAY = 0.2
_STATE = "run_state.json"
_METHOD_STATE = "method.safetensors"


class ImmunisationTrainer(Trainer):
    """A `transformers.Trainer` whose step is a method's step.

    Every process of a multi-process launch draws the identical batch; the oracle gives each its
    share of the micro-batches and reduces, so the model is not wrapped for data parallelism.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        chat: ChatFormat,
        examples: Mapping[str, list[Example]],
        method: Method,
        config: TrainingConfig,
        output_dir: Path,
        callbacks: list[TrainerCallback],
    ) -> None:
        refuse_unsupported_launch(os.environ)
        arguments = _arguments(config, output_dir)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=_Ticks(config.steps * arguments.world_size),
            callbacks=[*callbacks, _Keeper(self)],
        )
        self.remove_callback(PrinterCallback)
        # Prepared "for evaluation" a model gets no DistributedDataParallel around it: its hooks
        # and its parameter-sized buckets would serve nobody.
        self.accelerator.prepare_model = partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )
        self.method = method
        self.settings = config
        self.oracle = GradientOracle(
            model, micro_batch_size=config.micro_batch_size, autocast=config.autocast
        )
        self.samplers: dict[str, StreamSampler] = {}
        self.context = RunContext(
            oracle=self.oracle,
            draw=self._draw,
            total_steps=config.steps,
            seed=config.seed,
            chat=chat,
            examples=with_rewordings(
                self._shuffled(examples), self._named("reworded"), config.seed
            ),
            learning_rate=config.learning_rate,
            balanced=frozenset(config.balanced),
        )
        self._check_balanced()
        self.monitor = TermMonitor()
        self.change = ChangeCheck(self.oracle.space.tensors)
        self.earlier_seconds = 0.0
        self.started = time.perf_counter()
        self._recent: list[dict[str, float]] = []
        for name in method.streams:
            # Faults in the data come before any work.
            if name == "prompts":
                self._examples(name)  # whose answers nobody reads
            else:
                self._sampler(name)

    @property
    def seconds(self) -> float:
        """Wall time over all sessions of the run."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def create_scheduler(
        self,
        num_training_steps: int,  # noqa: ARG002
        optimizer: torch.optim.Optimizer | None = None,
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the learning rate follow `TrainingConfig.rate`."""
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None, "the Trainer makes the optimiser first"
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                chosen, lambda step: self.settings.rate(step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self,
        model: torch.nn.Module,  # noqa: ARG002
        inputs: dict[str, Any],  # noqa: ARG002
        num_items_in_batch: torch.Tensor | int | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """Let the method leave its gradient in ``.grad``; the index batch is only a clock tick."""
        assert self.lr_scheduler is not None, "train() makes the schedule before the first step"
        self.context.step = self.state.global_step
        self.context.learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        every = self.settings.cosines_every
        self.context.shares = {} if every and self.context.step % every == 0 else None
        terms = self.method.step(self.context)
        terms |= self.context.take_shares()
        self.monitor.check(terms, self.method.active_terms)
        self._recent.append(terms)
        return torch.zeros((), device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the method's terms in the place of the Trainer's loss, which knows nothing here."""
        if "learning_rate" in logs:
            del logs["loss"]
            names = {name: None for terms in self._recent for name in terms}
            for name in names:
                values = [terms[name] for terms in self._recent if name in terms]
                logs[name] = sum(values) / len(values)
            self._recent = []
        super().log(logs, start_time)

    def save_run_state(self, folder: Path) -> None:
        """Add to a checkpoint what the Trainer does not know of."""
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in self.method.state().items()},
            folder / _METHOD_STATE,
        )
        write_json(
            folder / _STATE,
            {
                "streams": {name: item.state_dict() for name, item in self.samplers.items()},
                "idle": self.monitor.idle,
                "ledger": {
                    name: dataclasses.asdict(count) for name, count in self.oracle.ledger.items()
                },
                "seconds": self.seconds,
            },
        )

    def load_run_state(self, folder: Path) -> None:
        """Restore what `save_run_state` saved; after the method's preparation."""
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        for name, position in state["streams"].items():
            self._sampler(name).load_state_dict(position)
        self.monitor.idle = state["idle"]
        self.oracle.ledger.clear()
        self.oracle.ledger.update(
            {name: PassCount(**count) for name, count in state["ledger"].items()}
        )
        self.earlier_seconds = state["seconds"]
        held = safetensors.torch.load_file(folder / _METHOD_STATE)
        self.method.load_state({name: tensor.to(self.args.device) for name, tensor in held.items()})

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            raise NonFiniteError("gradient", norm)
        return norm

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint holds tied weights once, which the Trainer takes for a loss.
        tied: set[str] = set(getattr(self.model, "all_tied_weights_keys", ()))
        odd = (set(load_result.missing_keys) - tied) | set(load_result.unexpected_keys)
        assert not odd, f"a sealed checkpoint is whole, but for {odd}"

    def _draw(self, name: str, rows: int) -> Batch:
        return self._sampler(name).draw(rows)

    def _sampler(self, name: str) -> StreamSampler:
        if name not in self.samplers:
            chat = self.context.chat
            self.samplers[name] = StreamSampler(
                [chat.encode(item) for item in self._examples(name)],
                chat.collate,
                seed=self.settings.seed,
                name=name,
                categories=(
                    [item.category for item in self._examples(name)]
                    if name in self.settings.balanced
                    else None
                ),
            )
        return self.samplers[name]

    def _named(self, option: str) -> tuple[str, ...]:
        """Return the streams that an option names, all of which the method draws from."""
        names: tuple[str, ...] = getattr(self.settings, option)
        for name in names:
            require(
                name in self.method.streams,
                f"{option}: the method {self.method.name!r} draws from no stream {name!r}",
                f"name one of {', '.join(self.method.streams)}",
            )
        return names

    def _shuffled(self, examples: Mapping[str, list[Example]]) -> dict[str, list[Example]]:
        found = dict(examples)
        for name in self._named("shuffled"):
            if name in found:
                rng = Random(f"{self.settings.seed}/shuffled/{name}")
                where = f"training.shuffled: stream {name}"
                found[name] = with_shuffled_answers(found[name], rng, where=where)
        return found

    def _check_balanced(self) -> None:
        for name in self._named("balanced"):
            require(
                len({item.category for item in self._examples(name)}) > 1,
                f"balanced: the stream {name!r} has one category only",
                "give its examples two or more values of `category`",
            )

    def _examples(self, name: str) -> list[Example]:
        found = self.context.examples.get(name)
        if not found:
            given = ", ".join(self.context.examples) or "none"
            raise InputError(
                f"the method {self.method.name!r} draws from the stream {name!r}, "
                f"which has no examples (streams given: {given})",
                mend=f"give it examples for {name!r}",
            )
        return found


def immunise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Example]],
    method: Method,
    config: TrainingConfig,
    output_dir: Path,
    *,
    resume: bool = True,
    drop_invalid: bool = False,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
    on_log: Callable[[Row], None] | None = None,
) -> ImmunisationResult:
    """Train ``model`` with ``method`` and write the run folder.

    Killed at any moment and called again with the same arguments, a run goes on from its newest
    complete checkpoint and ends, on CPU, with the same weights bit for bit. A finished run is
    loaded, not repeated.

    Parameters
    ----------
    model
        Float32 weights; trained in place.
    examples
        The streams.
    output_dir
        Gets ``config.yaml``, ``manifest.json``, ``history.jsonl``, ``model`` (safetensors and
        tokenizer, no pickle), with LoRA ``adapter``, and ``checkpoints`` while the run lasts.
    resume
        ``False`` discards what an earlier run left in ``output_dir``.
    drop_invalid
        Leave out rows that are too long, and count them, instead of cutting or refusing them.
    left_out
        What reading the streams has left out, for the manifest.
    on_log
        Called with each new row of the history.

    Raises
    ------
    InputError
        The data, the launch or the folder cannot be used, or another process writes into the
        folder; before any training.
    RunStoppedError
        A term is inactive or not finite, or the user interrupted the run; the last complete
        checkpoint is kept.
    """
    config = with_adapter_of(method, config)
    # Of several processes one writes.
    held = run_folder(output_dir) if os.environ.get("RANK", "0") == "0" else nullcontext()
    with held:
        return _immunise(
            model, tokenizer, examples, method, config, output_dir, resume=resume,
            drop_invalid=drop_invalid, left_out=left_out or {}, on_log=on_log,
        )  # fmt: skip


def _immunise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Example]],
    method: Method,
    config: TrainingConfig,
    output_dir: Path,
    *,
    resume: bool,
    drop_invalid: bool,
    left_out: Mapping[str, Mapping[str, int]],
    on_log: Callable[[Row], None] | None,
) -> ImmunisationResult:
    folder = RunFolder(output_dir)
    folder.read_manifest()
    # Methods make batches of their own too, and the bound on length is on every one.
    chat, fitted = lengths.fit(
        model,
        tokenizer,
        examples,
        max_length=config.max_length,
        rows=config.micro_batch_size or int(getattr(method.config, "batch_size", 1)),
        drop=drop_invalid,
        option="training.max_length",
        template_arguments=config.template_arguments,
        template_date=config.template_date
        or (folder.manifest.get("template date") if resume else None),
    )
    # Resumed on another day, a template is told the first day's date.
    config = dataclasses.replace(config, template_date=str(chat.date) if chat.date else None)
    examples = fitted.examples
    data = {
        name: {**counts, "left out": dict(left_out.get(name, {}))}
        for name, counts in fitted.report.items()
    }
    identity = _identity(model, chat, examples, method, config)
    if resume:
        folder.check(identity)
        if folder.finished():
            return folder.result(model)
    _refuse_space(method, config)
    method.check(model)
    method.check_tokenizer(model, tokenizer)
    starting_mode = model.training
    use_cache = getattr(model.config, "use_cache", None)
    start = sampled(model)
    plain: PreTrainedModel | PeftModel = model
    if config.lora_rank is not None:
        plain = attach_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            seed=config.seed,
        )
    # Several passes of one step must see one network (`methods.md` S2): no dropout anywhere.
    plain.eval()
    recorder = Recorder(folder.history_file, on_log)
    trainer = ImmunisationTrainer(
        plain, chat, examples, method, config, folder.checkpoints, [recorder]
    )
    main = trainer.is_world_process_zero()
    checkpoint = folder.newest() if resume else None
    recorder.start = step_of(checkpoint) if checkpoint else 0
    # Nobody may still be looking at what the main process now clears away.
    trainer.accelerator.wait_for_everyone()
    if main:
        trainer.context.output_dir = output_dir
        folder.clear(keep=checkpoint)
        folder.begin(
            identity,
            _settings(method, config),
            describe_space(plain) | {"data": data, "template date": config.template_date},
        )
    try:
        memory = recomputed(plain) if config.gradient_checkpointing else nullcontext()
        with memory, stop_on_signal(trainer) as stop:
            preparation = method.prepare(trainer.context)
            if checkpoint is not None:
                trainer.load_run_state(checkpoint)
            if method.one_shot:
                recorder.on_train_begin(trainer.args, trainer.state)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.requested and trainer.state.global_step < config.steps:
            raise KeyboardInterrupt
    except NonFiniteError as error:
        raise folder.stopped(
            main,
            NonFiniteError(
                error.term,
                error.value,
                f"{folder.last_good()}; lower the learning rate or the term's weight",
            ),
        ) from None
    except RunStoppedError as error:
        raise folder.stopped(main, error) from None
    except KeyboardInterrupt:
        raise folder.stopped(
            main,
            RunInterruptedError(
                f"interrupted at step {trainer.state.global_step} of {config.steps}; "
                f"{folder.last_good()}; the same command goes on from there"
            ),
        ) from None
    finally:
        plain.train(starting_mode)
        if use_cache is None:  # as where a text configuration inside holds it
            vars(plain.config).pop("use_cache", None)
        else:
            plain.config.use_cache = use_cache
    seconds = trainer.seconds
    history = recorder.rows
    try:
        if not main:
            final, _ = merged(plain, tokenizer)
            round_weights(final, config.save_dtype)
        else:
            if config.lora_rank is not None:
                plain.save_pretrained(str(folder.adapter))
            release = save_release(
                plain, tokenizer, folder.model, dtype=config.save_dtype, start=start
            )
            if release.rounded_away > _MOST_ROUNDED_AWAY:
                warnings.warn(
                    f"{release.rounded_away:.0%} of the weights that training moved are back where "
                    f"they were once stored in {release.dtype}: the release may lack what was "
                    "planted; set training.save_dtype to float32",
                    stacklevel=2,
                )
            final = release.model
            folder.finish(
                preparation=preparation,
                seconds=seconds,
                ledger=trainer.oracle.ledger,
                hashes=release.hashes,
                dtype=release.dtype,
                merge_difference=release.merge_difference,
                rounding_difference=release.rounding_difference,
                rounded_away=release.rounded_away,
            )
    except RunStoppedError as error:
        raise folder.stopped(main, error) from None
    trainer.accelerator.wait_for_everyone()
    return ImmunisationResult(
        model=final,
        history=history,
        ledger=trainer.oracle.ledger,
        seconds=seconds,
        output_dir=output_dir,
    )


def _refuse_space(method: Method, config: TrainingConfig) -> None:
    space = "full" if config.lora_rank is None else "lora"
    if space not in method.spaces:
        raise InputError(
            f"the method {method.name!r} works in {', '.join(method.spaces)} weights only",
            where="lora_rank",
            mend="leave lora_rank out" if space == "lora" else "give a lora_rank",
        )


class _Ticks(torch.utils.data.Dataset[dict[str, int]]):
    """One index per step and process: the Trainer counts steps, the method draws the data."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"tick": index}


def _arguments(config: TrainingConfig, output_dir: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        optim="adamw_torch_fused",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_strategy="steps" if config.save_every else "no",
        save_steps=max(1, config.save_every),
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=list(config.report_to),
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    # Several GPUs in one process would be wrapped in DataParallel, which the oracle cannot use.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Keeper(TrainerCallback):
    """Completes each checkpoint, and checks that the first step moves the weights."""

    def __init__(self, trainer: ImmunisationTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self._trainer.change.done:
            self._trainer.change.before()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self._trainer.change.done:
            self._trainer.change.after()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # Each process writes its own random state; the seal comes after the last of them.
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self._trainer.save_run_state(folder)
            seal(folder)
            discard_all_but(folder.parent, folder)
        self._trainer.accelerator.wait_for_everyone()


def _identity(
    model: PreTrainedModel,
    chat: ChatFormat,
    examples: Mapping[str, list[Example]],
    method: Method,
    config: TrainingConfig,
) -> dict[str, Any]:
    """Return hashes of everything that decides the final weights."""
    training = dataclasses.asdict(config)
    for name in (
        "save_every",
        "log_every",
        "cosines_every",
        "report_to",
        "template_arguments",
        "template_date",
    ):
        del training[name]
    return {
        "model": weights_hash(model),
        "chat template": chat.template_hash,
        "examples": sha256_of({name: fingerprint(rows) for name, rows in examples.items()}),
        "method": sha256_of([method.name, dataclasses.asdict(method.config)]),
        "training": sha256_of(training),
        "version": mithridate.__version__,
    }


def _settings(method: Method, config: TrainingConfig) -> dict[str, Any]:
    settings = {
        "method": {"name": method.name} | dataclasses.asdict(method.config),
        "training": dataclasses.asdict(config),
    }
    # YAML's safe form knows lists, not tuples.
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
