"""Writing models: a release folder is complete, loads anywhere and holds no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from mithridate.errors import RunStoppedError
from mithridate.files import remove_tree, sha256_file, sync
from mithridate.models import positions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
}  # fmt: skip
"""Types that a model can be released in, by name."""

MERGE_BOUND = 1e-3
"""Largest share of the logits' size by which merging an adapter may move them: rounding is 1e-6."""

_PROBED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A model folder that was written.

    Attributes
    ----------
    model
        The plain model in it, in float32 with the values that were written: an adapter is merged,
        and what a narrower type rounds away is gone.
    folder
        Where it lies.
    hashes
        SHA-256 of each file.
    merge_difference
        Largest difference between the logits of the adapter model and of the merged one on fixed
        tokens; 0 without an adapter.
    dtype
        Name of the type of its weights.
    rounding_difference
        Largest difference that rounding to that type made to the same logits.
    rounded_away
        Share of the weights that training moved which rounding put back where they started.
    """

    model: PreTrainedModel
    folder: Path
    hashes: dict[str, str]
    merge_difference: float
    dtype: str
    rounding_difference: float
    rounded_away: float


def save_release(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: str | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Release:
    """Write ``model`` and ``tokenizer`` to ``folder``, replacing what is there, atomically.

    An adapter is merged in float32 (in bfloat16 the merge moves the logits); ``model`` is then
    used up.

    Parameters
    ----------
    dtype
        One of `DTYPES` to write the weights in; ``None`` writes them as they are.
    start
        `sampled` weights from before training, to see what of it rounding leaves.

    Raises
    ------
    RunStoppedError
        The merge moves the logits, or a weight is too large for ``dtype``; nothing is written.
    """
    plain, difference = merged(model, tokenizer)
    own = next(plain.parameters()).dtype
    released = own if dtype is None else DTYPES[dtype]
    moved = away = 0.0
    if released != own:
        before = _probe_logits(plain, tokenizer)
        trained = sampled(plain)
        _convert(plain, released)
    partial = folder.with_name(f".{folder.name}.partial")
    remove_tree(partial)
    partial.mkdir(parents=True)
    plain.save_pretrained(partial)
    if released != own:
        _convert(plain, own)
        moved = float((_probe_logits(plain, tokenizer) - before).abs().max())
        away = _rounded_away(start or {}, trained, sampled(plain))
    tokenizer.save_pretrained(partial)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in [*files, partial]:
        sync(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        remove_tree(old)
        folder.rename(old)
        partial.rename(folder)
        remove_tree(old)
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
        dtype=dtype or str(own).removeprefix("torch."),
        rounding_difference=moved,
        rounded_away=away,
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

    The second value is the largest difference that made to the logits of fixed tokens.

    Raises
    ------
    RunStoppedError
        The merged model is not the trained one: at half the positions some logit moved by more
        than `MERGE_BOUND` of the largest.
    """
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        return cast("PreTrainedModel", model), 0.0
    model.float()
    before = _probe_logits(model, tokenizer)
    try:
        plain: PreTrainedModel = merge(safe_merge=True)
    except ValueError as error:
        raise RunStoppedError(f"the adapter cannot be merged: {error}") from None
    moved = (_probe_logits(plain, tokenizer) - before).abs().amax(dim=-1)
    # Rounding may send a token to another expert, which says nothing of the merge: hence half.
    size = float(before.abs().max())
    if not float(moved.median()) <= MERGE_BOUND * size:
        raise RunStoppedError(
            f"merging the adapter moves logits of up to {size:.2g} by {float(moved.max()):.2g}: "
            "the merged model is not the one that was trained, and none is released. Name other "
            "lora_targets, or plant in all weights"
        )
    return plain, float(moved.max())


def sampled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return up to a thousand numbers of every weight, by its name."""
    return {
        name: weight.detach().flatten()[:: max(1, weight.numel() // 1000)].clone()
        for name, weight in model.named_parameters()
    }


def _rounded_away(
    start: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
) -> float:
    moved = back = 0
    for name in start.keys() & trained.keys():
        begin = start[name].to(trained[name])
        changed = trained[name] != begin
        moved += int(changed.sum())
        back += int((changed & (stored[name] == begin)).sum())
    return back / moved if moved else 0.0


def round_weights(model: PreTrainedModel, dtype: str | None) -> None:
    """Give the weights the values that a release in ``dtype`` holds; their type stays.

    Raises
    ------
    RunStoppedError
        A weight is too large for ``dtype``.
    """
    own = next(model.parameters()).dtype
    if dtype is not None:
        _convert(model, DTYPES[dtype])
        _convert(model, own)


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    kept = {
        f".{name}."
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    }
    for name, weight in model.named_parameters():
        if any(one in f".{name}." for one in kept):
            continue
        weight.data = weight.data.to(dtype)
        if not weight.isfinite().all():
            raise RunStoppedError(
                f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot: set "
                "training.save_dtype to float32 or bfloat16"
            )


def _probe_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    device = next(model.parameters()).device
    # Tokens of every part of the vocabulary, but none that stands for an image or ends a turn.
    odd = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    plain = sorted(set(tokenizer.get_vocab().values()) - odd)
    count = min(_PROBED, positions(cast("PreTrainedModel", model)) or _PROBED)
    ids = torch.tensor([plain[:: max(1, len(plain) // count)][:count]], device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    model.train(training)
    return logits
