"""Writing models: a release folder is complete, loads anywhere and holds no pickle."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mithridate.files import sha256_file, sync

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE = "The quick brown fox jumps over the lazy dog. What is the capital of France? 12 + 30 ="


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A model folder that was written.

    Attributes
    ----------
    model
        The plain model in it: an adapter is merged.
    folder
        Where it lies.
    hashes
        SHA-256 of each file.
    merge_difference
        Largest difference between the logits of the adapter model and of the merged one on a
        fixed sentence; 0 without an adapter.
    """

    model: PreTrainedModel
    folder: Path
    hashes: dict[str, str]
    merge_difference: float


def save_release(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Release:
    """Write ``model`` and ``tokenizer`` to ``folder``, replacing what is there, atomically.

    An adapter is merged in float32 (in bfloat16 the merge moves the logits); ``model`` is then
    used up.
    """
    plain, difference = merged(model, tokenizer)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in [*files, partial]:
        sync(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    sync(folder.parent)
    return Release(
        model=plain,
        folder=folder,
        hashes={
            path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()
        },
        merge_difference=difference,
    )


def weights_hash(model: torch.nn.Module) -> str:
    """Return the SHA-256 of every weight and buffer with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def merged(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, float]:
    """Return ``model`` with its adapter, if it has one, merged in float32.

    The second value is the largest difference that made to the logits of a fixed sentence.
    """
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        return cast("PreTrainedModel", model), 0.0
    model.float()
    before = _probe_logits(model, tokenizer)
    plain: PreTrainedModel = merge(safe_merge=True)
    return plain, float((_probe_logits(plain, tokenizer) - before).abs().max())


def _probe_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = tokenizer(_PROBE, return_tensors="pt").input_ids.to(device)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    model.train(training)
    return logits
