"""LoRA: the other space a trap can be planted in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mithridate.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | None = None,
    targets: Sequence[str] = (),
    seed: int,
) -> PeftModel:
    """Freeze ``model`` and put a fresh float32 adapter on it, equal for equal seeds.

    Parameters
    ----------
    alpha
        Scaling numerator: the update is ``alpha / rank * B @ A``; ``None`` takes ``2 * rank``.
    targets
        Names of the modules to adapt; empty adapts every linear layer except the head.

    Raises
    ------
    InputError
        If no module has a name in ``targets``.
    """
    # peft needs seconds to import, and runs in the full space never use it.
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=list(targets) or "all-linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: PeftModel = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"the adapter does not fit this model: {error}",
                where="lora_targets",
                mend="name linear modules of the model, for example q_proj, or leave it empty",
            ) from None
    return adapted


def describe_space(model: torch.nn.Module) -> dict[str, Any]:
    """Return where a trap in ``model`` lives (`methods.md` S1): all weights, or which adapter."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = getattr(model, "peft_config", None)
    if adapters is None:
        return {"space": "full", "trainable_weights": trainable}
    (adapter,) = adapters.values()
    return {
        "space": "lora",
        "trainable_weights": trainable,
        "rank": adapter.r,
        "alpha": adapter.lora_alpha,
        "targets": sorted({name.rpartition(".")[2] for name in adapter.target_modules}),
    }
