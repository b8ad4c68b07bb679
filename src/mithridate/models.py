"""Opening a model that a user named, with every fault found before any work is done."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mithridate.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GIB = 1024**3
_GROUP = Path("/sys/fs/cgroup")
_BYTES = 4  # float32 weights, gradients and optimiser state (`style.md`, trap 6)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a planned run needs at its peak, in bytes."""

    memory: int
    disk: int


def check_model_folder(folder: Path) -> None:
    """Refuse a model folder that cannot be loaded safely, naming everything it lacks.

    Raises
    ------
    InputError
        No configuration, no tokenizer, no weights, weights only as pickle, or an index that names
        shards that are not there.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            "an adapter without its model",
            where=str(folder),
            mend="merge it into its base model (peft: merge_and_unload) and save that",
        )
    faults = []
    if not (folder / "config.json").is_file():
        faults.append("no config.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        faults.append("no tokenizer (tokenizer.json)")
    mend = "save the model and its tokenizer there with save_pretrained"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            faults.append(f"weights only as pickle ({pickles[0].name}), which can run any code")
            mend = (
                "convert it where you trust its origin: load it there and save it again with "
                "save_pretrained, which writes safetensors"
            )
        else:
            faults.append("no weights (*.safetensors)")
    faults += [f"the index names {name}, which is not there" for name in _missing_shards(folder)]
    if faults:
        raise InputError("; ".join(faults), where=str(folder), mend=mend)


def count_parameters(folder: Path) -> int:
    """Return the number of stored parameters, read from the safetensors headers alone."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in _header(path).items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total


def load(
    source: str, *, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the float32 model and tokenizer at a folder or Hub id; no code of theirs is run.

    Raises
    ------
    InputError
        The folder lacks something, the weights are pickled, damaged or do not fit, or there is no
        such model.
    """
    folder = Path(source)
    if folder.is_dir():
        check_model_folder(folder)
    elif folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError("no such model folder", where=source, mend="check the path")

    from transformers import AutoModelForCausalLM

    model, tokenizer, missing = load_as(
        AutoModelForCausalLM,
        source,
        revision,
        what="model",
        mend="give a folder that from_pretrained loads, or a Hub id with a causal language "
        "model in safetensors (a private or missing one, or no network, looks the same)",
    )
    _check_fit(source, model, tokenizer, missing)
    return model, tokenizer


def load_as(
    kind: Any, source: str, revision: str | None, *, what: str, mend: str
) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """Return a float32 model and its tokenizer, and the names of weights that no file holds.

    Parameters
    ----------
    kind
        One of `transformers`' Auto classes.
    what, mend
        For the message: what was to be loaded, and what to give instead.

    Raises
    ------
    InputError
        The weights are pickled, damaged or do not fit, or there is no such model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        model, report = kind.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(
            f"this {what} cannot be loaded: {reason}", where=source, mend=mend
        ) from error
    return model, tokenizer, sorted(report["missing_keys"])


def positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens ``model`` takes at a time, where its configuration says so."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def requirements(parameters: int, *, copies: int, checkpoints: int) -> Requirements:
    """Return what training ``parameters`` weights in float32 needs at its peak.

    Parameters
    ----------
    copies
        Parameter-sized buffers in all: AdamW on all weights takes four (weights, gradient, two
        moments) and a method's own on top; an adapter leaves one.
    checkpoints
        Checkpoints kept at a time, each with weights and optimiser state, beside the final model.

    Notes
    -----
    Activations of a small batch are allowed a fifth of that, and the libraries 1 GiB.
    """
    size = parameters * _BYTES
    return Requirements(memory=int(size * copies * 1.2) + _GIB, disk=size * (1 + 3 * checkpoints))


def check_room(needed: Requirements, output_dir: Path) -> None:
    """Refuse a run that this machine has too little memory or disk for.

    Raises
    ------
    InputError
        Naming what is needed and what is free; or nothing can be written there at all.
    """
    place = _existing(output_dir)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"nothing can be written there: {place} is "
            + ("not writable" if place.is_dir() else "not a folder"),
            where=str(output_dir),
            mend="choose another --output-dir",
        )
    free_memory, free_disk = available_memory(), free_space(output_dir)
    if needed.memory > free_memory:
        raise InputError(
            f"too little memory: this run needs about {needed.memory / _GIB:.1f} GiB, "
            f"{free_memory / _GIB:.1f} GiB are free",
            mend="end other programs, use a smaller model, set lora_rank in the configuration, or "
            "use a larger machine",
        )
    if needed.disk > free_disk:
        raise InputError(
            f"too little disk: this run needs about {needed.disk / _GIB:.1f} GiB, "
            f"{free_disk / _GIB:.1f} GiB are free",
            where=str(output_dir),
            mend="free some space or choose another --output-dir",
        )


def available_memory() -> int:
    """Return the bytes of memory that can still be used, within the control group's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        rows = (line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # The group's account includes the file cache, which is given up on demand.
        cache = next(int(value) for name, value in rows if name == "file")
    except (OSError, ValueError, StopIteration):
        return free
    return min(free, limit - used + cache)


def free_space(path: Path) -> int:
    """Return the free bytes of the file system that ``path`` is or will be on."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _check_fit(
    source: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    missing: list[str],
) -> None:
    import torch

    if missing:
        # `transformers` fills them with random numbers and only warns.
        raise InputError(
            f"{len(missing)} weights of the model are not in its files (first: {missing[0]})",
            where=source,
            mend="give the folder of the whole model, with its causal language model head",
        )
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor), "a causal language model embeds token ids"
    rows = embedding.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}",
            where=source,
            mend="give the tokenizer that belongs to this model",
        )


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(name for name in shards if not (folder / name).is_file())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "not an index of weights", where=str(index), mend="copy or download it again"
        ) from None


def _header(path: Path) -> dict[str, dict[str, list[int]]]:
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header: dict[str, dict[str, list[int]]] = json.loads(handle.read(length))
    except (struct.error, ValueError) as error:
        raise InputError(
            "not a whole safetensors file", where=str(path), mend="copy or download it again"
        ) from error
    return header
