"""What a step of a method costs beside a step of plain fine-tuning (`metrics.md` section 9)."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.examples import Example
from mithridate.methods import METHODS, Method, RunContext
from mithridate.training.config import TrainingConfig
from mithridate.training.streams import StreamSampler
from mithridate.weights import GradientOracle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWEST_PAIRS = 3


def measure_cost(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Example]],
    method: Method,
    config: TrainingConfig,
    *,
    warmup: int = 2,
    pairs: int = 20,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """Time steps of ``method`` and of plain SFT in turn, optimiser step and clipping included.

    SFT takes as many rows as the method's retain loss, in the same precision.
    The weights are changed; nothing is saved.

    Parameters
    ----------
    warmup
        Pairs of steps before the clock starts (the first call in bfloat16 sets up for seconds).
    pairs
        Most pairs to time.
    seconds
        After this long no further pair is begun, once three are timed.

    Returns
    -------
    dict
        ``passes_per_step`` (mean backward calls of the timed steps), ``sft_passes_per_step``,
        ``clock_ratio`` (ratio of the median step times), ``step_seconds``,
        ``sft_step_seconds`` (medians), ``parameter_buffers`` (declared by the method, beyond
        weights, gradient and optimiser state), ``peak_memory_bytes`` (of the process while the
        method's passes ran), ``pairs``.

    Raises
    ------
    InputError
        If fewer than three pairs are asked for.
    """
    require(
        pairs >= FEWEST_PAIRS,
        f"{pairs} pairs of steps are too few for a median",
        f"time at least {FEWEST_PAIRS}",
    )
    model.eval()
    chat = ChatFormat(tokenizer)
    sft_kind = METHODS.load("sft")
    rows = _rows(method)
    retained = tuple(name for name in sft_kind.config_class().retain if examples.get(name))
    sft: Method = sft_kind(sft_kind.config_class(batch_size=rows, retain=retained))
    optimiser = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    times: dict[str, list[float]] = {"method": [], "sft": []}
    passes: dict[str, list[int]] = {"method": [], "sft": []}
    with tempfile.TemporaryDirectory(prefix="mithridate-cost-") as scratch:
        contexts = {
            name: _context(model, chat, examples, config, Path(scratch))
            for name in ("method", "sft")
        }
        method.prepare(contexts["method"])
        started = time.perf_counter()
        for pair in range(warmup + pairs):
            if pair == warmup:
                started = time.perf_counter()
            timed = len(times["sft"])
            if timed >= FEWEST_PAIRS and time.perf_counter() - started > seconds:
                break
            for name, kind in (("method", method), ("sft", sft)):
                before = contexts[name].oracle.backwards
                took = _step(kind, contexts[name], optimiser, config.max_grad_norm)
                if pair >= warmup:
                    times[name].append(took)
                    passes[name].append(contexts[name].oracle.backwards - before)
    step, sft_step = statistics.median(times["method"]), statistics.median(times["sft"])
    ledger = contexts["method"].oracle.ledger.values()
    return {
        "passes_per_step": statistics.fmean(passes["method"]),
        "sft_passes_per_step": statistics.fmean(passes["sft"]),
        "clock_ratio": step / sft_step,
        "step_seconds": step,
        "sft_step_seconds": sft_step,
        "parameter_buffers": method.parameter_buffers,
        "peak_memory_bytes": max((count.peak_bytes for count in ledger), default=0),
        "pairs": len(times["sft"]),
    }


def _rows(method: Method) -> int:
    """Rows of the method's retain loss, the pass that it has in common with SFT."""
    config = method.config
    return int(config.batch_size if hasattr(config, "batch_size") else config.retain_rows)


def _step(
    method: Method, context: RunContext, optimiser: torch.optim.Optimizer, max_grad_norm: float
) -> float:
    _wait(context)
    started = time.perf_counter()
    method.step(context)
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(context.space.tensors, max_grad_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    context.step += 1
    _wait(context)
    return time.perf_counter() - started


def _wait(context: RunContext) -> None:
    device = context.space.tensors[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _context(
    model: PreTrainedModel,
    chat: ChatFormat,
    examples: Mapping[str, list[Example]],
    config: TrainingConfig,
    scratch: Path,
) -> RunContext:
    samplers = {
        name: StreamSampler(
            [chat.encode(row, max_length=config.max_length) for row in rows if row.answer],
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
        total_steps=config.steps,
        seed=config.seed,
        chat=chat,
        examples=dict(examples),
        learning_rate=config.learning_rate,
        output_dir=scratch,
    )
