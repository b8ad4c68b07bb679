"""`mithridate cost`: every method's step beside plain fine-tuning, on a model or a bare shape."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from mithridate import models
from mithridate.chat import ChatFormat
from mithridate.configs import from_mapping, require
from mithridate.errors import InputError
from mithridate.events import Event, Listener, silent
from mithridate.measures.cost import BASELINE, measure_costs
from mithridate.measures.shapes import find_shape, random_streams
from mithridate.methods import METHODS, Method
from mithridate.provenance import versions
from mithridate.training.config import TrainingConfig
from mithridate.training.lora import attach_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GIB = 1024**3
_ROWS_PER_STREAM = 64
_LORA_RANK = 32
_ADAPTED = ("q_proj", "k_proj", "v_proj")  # where CTRAP and Booster are published
# Far too small to change what is computed; AdamW costs the same at any rate.
_LEARNING_RATE = 1e-8
_COPIES = 4  # weights, gradient and AdamW's two moments

# What preparation would look for, and gates that random weights do not pass. A step costs the same
# at any value, and neither an embedding model nor a simulated attack is needed to time it.
_NOT_SOUGHT = {
    "lookahead_radius": 0.1,
    "epsilon": 1e-3,
    "encoder": "tfidf",
    "pairs": _ROWS_PER_STREAM,
    "min_refusal": 0.0,
    "min_group_std": 0.0,
}
_ROWS = ("batch_size", "_rows")
_TOKENS = {"prompt_length": 1.0, "response_length": 0.5}  # of a row


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the published cost table, and what its cells leave open."""

    extra_gradient_evaluations: str
    memory: str
    clock: str
    notes: tuple[str, ...]


PUBLISHED = {
    "sdd": Published(
        extra_gradient_evaluations="0",
        memory="none",
        clock="none",
        notes=("of the step: pairing prompts with answers takes one embedding pass before",),
    ),
    "ctrap": Published(
        extra_gradient_evaluations="3",
        memory="+6.72 GB, 3.5x",
        clock="2.8x",
        notes=(
            "3 evaluations are a whole step, retain loss included: 2 more than SFT",
            "+6.72 GB and 3.5x are not one memory ratio: the baseline would be 6.72 / 2.5 = 2.7 "
            "GB, too little for any model of 7B. As memory x time, 3.5 / 2.8 = 1.25 in memory, on "
            "a baseline of about 26.9 GB",
            "which model is not said; the released code logs what the allocator reserved",
        ),
    ),
    "seam": Published(
        extra_gradient_evaluations="4",
        memory="moderate",
        clock="moderate",
        notes=(
            "4 evaluations are the coupling term alone; the released step makes 6, 5 more than SFT",
            "moderate is no figure: the released code holds 6 parameter-sized buffers and needs "
            "three GPUs, two of them only to park tensors",
        ),
    ),
    "tokenbuncher": Published(
        extra_gradient_evaluations="K = 4 rollouts per query",
        memory="-",
        clock="RL overhead",
        notes=(
            "rollouts are generated tokens, not gradient evaluations; no clock or memory is given",
            "the released step makes 4 updates on quarters of 128 rollouts",
        ),
    ),
}
"""The published costs that the measured ones are shown beside."""


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """What the command line was given.

    Parameters
    ----------
    model, shape
        Folder or Hub id of a model, or the name of a shape in `measures.shapes`; one of them.
    methods
        Names of registered methods; empty takes them all.
    space
        Train all weights, or a LoRA adapter of rank 32.
    batch_size, length
        Rows of every batch, and tokens of every row; ``None`` takes the shape's.
    seconds
        About how long to time for.
    """

    model: str | None = None
    shape: str | None = None
    methods: tuple[str, ...] = ()
    space: Literal["full", "lora"] = "full"
    batch_size: int | None = None
    length: int | None = None
    seconds: float = 600.0


def run_cost(
    plan: CostPlan,
    *,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    on_event: Listener = silent,
) -> dict[str, Any]:
    """Measure what ``plan`` asks for and return the document for a machine to read.

    Parameters
    ----------
    variants
        Rows beside those of the plan's methods: a method's name, and options of it.

    Raises
    ------
    InputError
        Something that was given cannot be used, or does not fit into memory; before any work.
    RunStoppedError
        Plain fine-tuning itself cannot be timed.
    """
    require((plan.model is None) != (plan.shape is None), "give a model or a shape",
            "use either --model or --shape")  # fmt: skip
    require(plan.seconds >= 0, "seconds is negative", "give 0 or more")
    names = plan.methods or tuple(METHODS.names())
    for name in names:
        if name not in METHODS.names():
            METHODS.load(name)  # an error with the nearest name
    shape = find_shape(plan.shape or "smollm2-135m")
    rows = plan.batch_size or shape.batch_size
    length = plan.length or shape.length
    require(rows >= 1 and length >= 1, "an empty batch", "give a row and a token at least")
    wanted: dict[str, tuple[str, Mapping[str, Any]]] = {
        name: (name, {}) for name in names if name != BASELINE
    }
    wanted |= variants or {}
    methods, refused = _methods(wanted, rows, length)
    device = _device()
    buffers = max((method.parameter_buffers for method in methods.values()), default=0)
    model, tokenizer = _open(plan, length, buffers, device, on_event)
    parameters = int(model.num_parameters())
    streams = random_streams(ChatFormat(tokenizer), rows=max(_ROWS_PER_STREAM, rows), length=length)
    training = TrainingConfig(
        learning_rate=_LEARNING_RATE,
        max_length=length,
        lora_rank=_LORA_RANK if plan.space == "lora" else None,
    )
    trained = model if plan.space == "full" else _adapted(model)
    found = measure_costs(
        trained, tokenizer, streams, methods, training,
        rows=rows, seconds=plan.seconds, on_event=on_event,
    )  # fmt: skip
    measured = {label: found.get(label, refused.get(label)) for label in (BASELINE, *wanted)}
    return {
        "model": plan.model,
        "shape": plan.shape,
        "space": plan.space,
        "parameters": parameters,
        "trainable": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "batch_size": rows,
        "length": length,
        "precision": "float32",
        "machine": _machine(device),
        "methods": measured,
        "published": {
            name: dataclasses.asdict(entry) for name, entry in PUBLISHED.items() if name in names
        },
    }


def configured(name: str, rows: int, length: int, **options: Any) -> Method:
    """Return a method with every batch of ``rows`` rows, and with ``options``.

    Raises
    ------
    InputError
        If the method does not exist, or cannot do with so few rows.
    """
    kind = METHODS.load(name)
    values = _options(kind.config_class, rows, length) | options
    made: Method = kind(from_mapping(kind.config_class, values, where=f"{name} on {rows} rows"))
    return made


def _options(config_class: Any, rows: int, length: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in dataclasses.fields(config_class):
        if each.name.endswith(_ROWS):
            values[each.name] = rows
        elif each.name in _TOKENS:
            values[each.name] = int(length * _TOKENS[each.name])
        elif each.name in _NOT_SOUGHT:
            values[each.name] = _NOT_SOUGHT[each.name]
        elif each.name == "retain":
            values[each.name] = tuple(each.default)[:rows]  # type: ignore[arg-type]
        elif each.name == "parts":  # of a composition
            values[each.name] = {
                label: _options(METHODS.load(member).config_class, rows, length)
                for label, member in config_class.members.items()
            }
    return values


def _methods(
    wanted: Mapping[str, tuple[str, Mapping[str, Any]]], rows: int, length: int
) -> tuple[dict[str, Method], dict[str, dict[str, str]]]:
    """Return the methods that can be set up, and why the others cannot."""
    methods: dict[str, Method] = {}
    refused: dict[str, dict[str, str]] = {}
    for label, (name, options) in wanted.items():
        try:
            methods[label] = configured(name, rows, length, **options)
        except (InputError, ImportError) as error:
            refused[label] = {"not_timed": str(error).splitlines()[0]}
    return methods, refused


def _open(
    plan: CostPlan, length: int, buffers: int, device: torch.device, on_event: Listener
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and its tokenizer, once it is known that they fit."""
    copies = _COPIES + buffers if plan.space == "full" else 1
    if plan.shape is not None:
        shape = find_shape(plan.shape)
        config: Any = shape.config()
        limit = config.max_position_embeddings
        require(length <= limit, f"the shape reads {limit} tokens at most", "lower --length")
        _check_room(shape.parameters(), copies, plan, device)
        on_event(Event(stage="making random weights"))
        return shape.build(device)
    assert plan.model is not None, "run_cost requires one of the two"
    stored = models.check(plan.model)
    if stored is not None:
        _check_room(stored.parameters, copies, plan, device)
    on_event(Event(stage="loading the model"))
    model, tokenizer = models.load(plan.model)
    _check_room(model.num_parameters(), copies, plan, device)
    moved: Any = model
    return moved.to(device), tokenizer


def _check_room(parameters: int, copies: int, plan: CostPlan, device: torch.device) -> None:
    needed = models.requirements(parameters, copies=copies, checkpoints=0).memory
    free = models.available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise InputError(
            f"too little memory: {parameters / 1e9:.2f} billion float32 weights, trained in the "
            f"{plan.space} space, need about {needed / _GIB:.1f} GiB; {free / _GIB:.1f} GiB are "
            f"free on {device}",
            where=plan.shape or plan.model,
            mend="choose a smaller shape or a larger machine"
            + (", or measure in an adapter with --space lora" if plan.space == "full" else ""),
        )


def _adapted(model: PreTrainedModel) -> Any:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = _ADAPTED if present.issuperset(_ADAPTED) else ()
    return attach_lora(model, rank=_LORA_RANK, targets=targets, seed=0)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _machine(device: torch.device) -> Mapping[str, Any]:
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        **versions(),
    }
