"""What a step of a method costs beside a step of plain fine-tuning (`metrics.md` section 9).

All methods share one model, one optimiser and one run: a step of plain fine-tuning (SFT) stands
before and after every timed step of a method, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.errors import InputError, RunStoppedError
from mithridate.events import Event, Listener, silent
from mithridate.examples import Example
from mithridate.measures.memory import MemoryBook, bytes_of
from mithridate.methods import METHODS, Method, RunContext
from mithridate.training.config import TrainingConfig
from mithridate.training.streams import StreamSampler
from mithridate.weights import GradientOracle, PassCount

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASELINE = "sft"
FEWEST_ROUNDS = 3
_WARMUP = 5
_MEASURED = 3  # steps of the warm-up that measure something themselves
_ROUNDS = 20
_RESAMPLES = 2000
# What ends the timing of one method and not the meter. Anything else is a fault of ours.
_CANNOT_BE_TIMED = (InputError, RunStoppedError, ImportError, torch.OutOfMemoryError)

Row = dict[str, Any]
"""What a step costs. Counts and seconds are per optimiser step.

``passes_per_step`` backward calls, ``extra_passes`` more than SFT; ``forwards_per_step``,
``extra_forwards``; ``batch_equivalents`` (forwards + 2 x graphs walked backwards) / 3;
``clock_ratio`` median over the timed steps of the ratio to the SFT steps beside each,
``clock_ratio_interval`` (bootstrap, 95 %), ``clock_ratio_of_minima``, ``cpu_ratio`` the same of
processor time; ``step_seconds`` (median), ``step_seconds_min``, ``step_cpu_seconds``;
``peak_memory_bytes`` on all devices together, weights and optimiser state included,
``peak_memory_ratio``, ``memory_time_ratio`` their product with the clock ratio, ``extra_bytes``
more than SFT in all, ``extra_bytes_per_device``, ``peak_reserved_bytes`` (GPU);
``parameter_buffers`` declared by the method, ``extra_buffers`` the extra bytes measured in sizes
of the trainable weights; ``tokens``, ``generated_tokens``, ``flops``, ``flops_ratio``,
``flops_6nd`` 6 x parameters x tokens of a pass x batch equivalents; ``preparation_seconds`` once;
``rounds`` timed.
"""


def measure_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Example]],
    method: Method,
    config: TrainingConfig,
    *,
    warmup: int = _MEASURED,
    pairs: int = _ROUNDS,
    seconds: float = 60.0,
) -> Row:
    """Measure one method; SFT takes as many rows as the method's retain loss.

    Parameters
    ----------
    pairs
        Most steps of the method to time.

    Returns
    -------
    dict
        The method's `Row`, with ``sft_passes_per_step``, ``sft_step_seconds`` and ``pairs``.

    Raises
    ------
    InputError, RunStoppedError
        See `measure_costs`; also where the method cannot be timed.
    """
    settings = method.config
    rows = settings.batch_size if hasattr(settings, "batch_size") else settings.retain_rows
    found = measure_costs(
        model, tokenizer, examples, {"method": method}, config,
        rows=int(rows), warmup=warmup, rounds=pairs, seconds=seconds,
    )  # fmt: skip
    row, sft = found["method"], found[BASELINE]
    if "not_timed" in row:
        raise RunStoppedError(f"{method.name} cannot be timed: {row['not_timed']}")
    return {
        **row,
        "sft_passes_per_step": sft["passes_per_step"],
        "sft_step_seconds": sft["step_seconds"],
        "pairs": row["rounds"],
    }


def measure_costs(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Example]],
    methods: Mapping[str, Method],
    config: TrainingConfig,
    *,
    rows: int,
    warmup: int = _WARMUP,
    rounds: int = _ROUNDS,
    seconds: float = 600.0,
    on_event: Listener = silent,
) -> dict[str, Row]:
    """Measure a step of every method, and of SFT, in one interleaved run.

    Clipping and the optimiser's step are part of a step. A method's second step measures memory
    and its third counts floating point operations; both are warm-up. The weights are changed;
    nothing is saved.

    Parameters
    ----------
    model
        With the trainable weights to measure in, full or an adapter's.
    methods
        By the name of their row.
    rows
        Rows of an SFT step.
    warmup
        Steps of a method before its clock starts, at least three.
    rounds
        Most timed steps of a method.
    seconds
        Shared evenly: a method that has used its share is timed no more, once it has three steps.

    Returns
    -------
    dict
        For ``sft`` and each method a `Row`, or ``{"not_timed": reason}``.

    Raises
    ------
    InputError
        If fewer than three rounds or steps of warm-up are asked for.
    RunStoppedError
        If SFT itself cannot be timed.
    """
    require(
        rounds >= FEWEST_ROUNDS and warmup >= _MEASURED,
        f"{rounds} rounds after {warmup} steps of warm-up are too few for a median",
        f"time at least {FEWEST_ROUNDS} after at least {_MEASURED}",
    )
    model.eval()
    chat = ChatFormat(tokenizer, max_length=config.max_length)
    with tempfile.TemporaryDirectory(prefix="mithridate-cost-") as scratch:
        meter = _Meter(
            model,
            lambda: _context(model, chat, examples, config, warmup + rounds, Path(scratch)),
            _plain_sft(rows, examples),
            config,
        )
        names = [BASELINE, *methods]
        racing: list[_Contender] = []
        refused: dict[str, str] = {}
        for done, name in enumerate(names):
            on_event(Event(stage="warming up", step=done, total=len(names)))
            try:
                method = meter.sft.method if name == BASELINE else methods[name]
                _check(method, examples)
                one = meter.sft if name == BASELINE else meter.enter(method)
                meter.warm_up(one, warmup, seconds / (4 * len(names)))
                racing.append(one)
            except _CANNOT_BE_TIMED as error:
                refused[name] = str(error).splitlines()[0]
                meter.clear()
        if BASELINE in refused:
            raise RunStoppedError(f"plain fine-tuning cannot be timed: {refused[BASELINE]}")
        entered = dict(zip([name for name in names if name not in refused], racing, strict=True))
        for number in range(rounds):
            on_event(Event(stage="timing", step=number, total=rounds))
            for name, one in entered.items():
                if name in refused or one.done(seconds / len(entered)):
                    continue
                try:
                    meter.time(one)
                except _CANNOT_BE_TIMED as error:
                    refused[name] = str(error).splitlines()[0]
                    meter.clear()
    return {
        name: {"not_timed": refused[name]} if name in refused else meter.row(entered[name])
        for name in names
    }


@dataclass
class _Contender:
    """One method in the run, and what has been measured of it."""

    method: Method
    context: RunContext
    preparation_seconds: float = 0.0
    flops: int = 0
    memory: MemoryBook = field(default_factory=MemoryBook)
    counted: PassCount = field(default_factory=PassCount)
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    wall_ratios: list[float] = field(default_factory=list)
    processor_ratios: list[float] = field(default_factory=list)
    spent: float = 0.0

    def ledger(self) -> PassCount:
        """Return what the oracle has counted so far, over all purposes."""
        total = PassCount()
        for count in self.context.oracle.ledger.values():
            _add(total, count)
        return total

    def done(self, share: float) -> bool:
        """Whether the method has used its share of the time, and has a median."""
        return len(self.wall) >= FEWEST_ROUNDS and self.spent > share


class _Operations(TorchDispatchMode):
    """Counts floating point operations by torch's formulas.

    Torch's own counter also tracks modules, by hooks that forbid `torch.autograd.grad` inside a
    forward pass.
    """

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(function._overloadpacket)
        if formula is None:
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = function(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class _Meter:
    """One model and one optimiser, and the contenders that take turns on them."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        context: Callable[[], RunContext],
        sft: Method,
        config: TrainingConfig,
    ) -> None:
        self.model = model
        self.config = config
        self._new_context = context
        self.optimiser = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # The optimiser's state must be there before anything is measured.
        self._step(self.enter(sft))
        self.sft = self.enter(sft)
        self._before: tuple[float, float] | None = None

    def enter(self, method: Method) -> _Contender:
        """Return a method that has not done anything yet."""
        return _Contender(method, self._new_context())

    def clear(self) -> None:
        """Drop what a method left in ``.grad`` when it failed."""
        self.optimiser.zero_grad(set_to_none=True)
        self._before = None

    def warm_up(self, one: _Contender, steps: int, seconds: float) -> None:
        """Prepare the method; count its operations, then its memory; then go on for a while."""
        started = time.perf_counter()
        with one.memory.watch():
            one.method.prepare(one.context)
            one.preparation_seconds = time.perf_counter() - started
            self._step(one)
        with one.memory.watch():
            self._step(one)
        # Fused attention is not in the counter's books on every device.
        with _Operations() as counted, sdpa_kernel(SDPBackend.MATH):
            self._step(one)
        one.flops = counted.total
        started = time.perf_counter()
        for _ in range(steps - _MEASURED):
            if time.perf_counter() - started > seconds:
                break
            self._step(one)

    def time(self, one: _Contender) -> None:
        """Time a step of the method and the SFT step after it; the one before has been timed."""
        before = self._before or self._step(self.sft)
        count = one.ledger()
        took = self._step(one)
        _add(one.counted, one.ledger(), count)
        self._before = after = took if one is self.sft else self._step(self.sft)
        one.wall.append(took[0])
        one.processor.append(took[1])
        one.wall_ratios.append(2 * took[0] / (before[0] + after[0]))
        one.processor_ratios.append(2 * took[1] / (before[1] + after[1]))
        one.spent += took[0] + after[0]

    def _step(self, one: _Contender) -> tuple[float, float]:
        """Return the seconds of wall and processor that a whole optimiser step takes."""
        context = one.context
        _wait(context)
        started, busy = time.perf_counter(), time.process_time()
        one.method.step(context)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(context.space.tensors, self.config.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        context.step += 1
        _wait(context)
        return time.perf_counter() - started, time.process_time() - busy

    def row(self, one: _Contender) -> Row:
        """Return the contender's row."""
        steps, sft_steps = len(one.wall), len(self.sft.wall)
        mine, plain = self._peaks(one), self._peaks(self.sft)
        extra = {name: mine.get(name, 0) - plain.get(name, 0) for name in {**mine, **plain}}
        ratios = [1.0] * steps if one is self.sft else one.wall_ratios
        processor = [1.0] * steps if one is self.sft else one.processor_ratios
        clock = statistics.median(ratios)
        memory = sum(mine.values()) / sum(plain.values())
        count, sft_count = one.counted, self.sft.counted
        forwards, backwards = count.forwards / steps, count.backwards / steps
        equivalents = (count.forwards + 2 * count.walks) / 3 / steps
        tokens = count.tokens / steps
        return {
            "passes_per_step": backwards,
            "extra_passes": backwards - sft_count.backwards / sft_steps,
            "forwards_per_step": forwards,
            "extra_forwards": forwards - sft_count.forwards / sft_steps,
            "batch_equivalents": equivalents,
            "clock_ratio": clock,
            "clock_ratio_interval": _interval(ratios),
            "clock_ratio_of_minima": min(one.wall) / min(self.sft.wall),
            "cpu_ratio": statistics.median(processor),
            "step_seconds": statistics.median(one.wall),
            "step_seconds_min": min(one.wall),
            "step_cpu_seconds": statistics.median(one.processor),
            "peak_memory_bytes": sum(mine.values()),
            "peak_memory_ratio": memory,
            "memory_time_ratio": memory * clock,
            "extra_bytes": sum(extra.values()),
            "extra_bytes_per_device": extra,
            "peak_reserved_bytes": sum(one.memory.reserved.values()) or None,
            "parameter_buffers": one.method.parameter_buffers,
            "extra_buffers": sum(extra.values()) / one.context.space.bytes,
            "tokens": tokens,
            "generated_tokens": count.generated / steps,
            "flops": one.flops,
            "flops_ratio": one.flops / self.sft.flops,
            "flops_6nd": 6 * self.model.num_parameters() * tokens / forwards * equivalents,
            "preparation_seconds": one.preparation_seconds,
            "rounds": steps,
        }

    def _peaks(self, one: _Contender) -> dict[str, int]:
        """Return the peak bytes of a step on each device: what all share, and the method's own."""
        states = [value for state in self.optimiser.state.values() for value in state.values()]
        moments = [value for value in states if isinstance(value, torch.Tensor)]
        shared = bytes_of([*self.model.parameters(), *self.model.buffers(), *moments])
        own = one.memory.peak
        return {name: shared.get(name, 0) + own.get(name, 0) for name in {**shared, **own}}


def _add(total: PassCount, count: PassCount, less: PassCount | None = None) -> None:
    for name in ("forwards", "backwards", "walks", "tokens", "generated"):
        change = getattr(count, name) - (getattr(less, name) if less else 0)
        setattr(total, name, getattr(total, name) + change)


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(0).choice(ratios, size=(_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _check(method: Method, examples: Mapping[str, list[Example]]) -> None:
    require(not method.one_shot, "takes no step: its work is done once", "time its one run")
    missing = [name for name in method.streams if not examples.get(name)]
    require(not missing, f"needs the streams {', '.join(missing)}", "give them")


def _plain_sft(rows: int, examples: Mapping[str, list[Example]]) -> Method:
    """Return SFT on as many rows, of the streams that are there."""
    kind = METHODS.load(BASELINE)
    retain = tuple(name for name in kind.config_class().retain if examples.get(name))
    sft: Method = kind(kind.config_class(batch_size=rows, retain=retain[:rows]))
    return sft


def _wait(context: RunContext) -> None:
    device = context.space.tensors[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _context(
    model: PreTrainedModel | PeftModel,
    chat: ChatFormat,
    examples: Mapping[str, list[Example]],
    config: TrainingConfig,
    steps: int,
    scratch: Path,
) -> RunContext:
    samplers = {
        name: StreamSampler(
            [chat.encode(row) for row in rows if row.answer],
            chat.collate,
            seed=config.seed,
            name=name,
        )
        for name, rows in examples.items()
        if any(row.answer for row in rows)
    }
    return RunContext(
        oracle=GradientOracle(
            model, micro_batch_size=config.micro_batch_size, autocast=config.autocast
        ),
        draw=lambda stream, count: samplers[stream].draw(count),
        # A method whose steps change along a run goes through all kinds of them.
        total_steps=steps,
        seed=config.seed,
        chat=chat,
        examples=dict(examples),
        learning_rate=config.learning_rate,
        output_dir=scratch,
    )
