"""Gradient checkpointing: inner activations are made again in the backward pass, not kept.

`transformers` does it in training mode only, where many models are another network on every pass:
dropout, skipped layers, noise in a router. Several passes of one step must see one network
(`methods.md` S2), so only what is run again is put into training mode, with all its chances at 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from mithridate.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_CHANCE = ("drop", "jitter", "noise")
_TOKENS = 8


@contextmanager
def recomputed(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Run the body with ``model``, which is in evaluation mode, checkpointing its layers.

    Raises
    ------
    InputError
        If it does not, or computes something else then.
    """
    get_base: Any = getattr(model, "get_base_model", None)
    plain: Any = model if get_base is None else get_base()
    repeated = [module for module in plain.modules() if hasattr(module, "gradient_checkpointing")]
    before, calls = _try(model)
    with ExitStack() as stack:
        for module in repeated:
            stack.callback(_restore, module, dict(vars(module)))
            module.gradient_checkpointing = module.training = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for holder in (*repeated, plain.config, plain.config.get_text_config()):
            chances = {
                name: value
                for name, value in vars(holder).items()
                if isinstance(value, float) and any(word in name for word in _CHANCE)
            }
            stack.callback(_put, holder, chances)
            _put(holder, dict.fromkeys(chances, 0.0))
        after, calls_again = _try(model)
        if calls_again <= calls:
            raise InputError(
                f"{type(plain).__name__} does not run its layers again",
                where="gradient_checkpointing",
                mend="leave it out, and lower micro_batch_size to save memory",
            )
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
            raise InputError(
                f"{type(plain).__name__} computes something else while it trains: its logits move "
                f"by up to {float((before - after).abs().max()):.3g}",
                where="gradient_checkpointing",
                mend="leave it out, and lower micro_batch_size to save memory",
            )
        yield


def _put(holder: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(holder, name, value)


def _restore(module: torch.nn.Module, values: dict[str, Any]) -> None:
    for name in set(vars(module)) - set(values):
        delattr(module, name)
    _put(module, values)


def _try(model: Any) -> tuple[torch.Tensor, int]:
    """Return the logits of a few tokens, and how often modules were called for their gradient."""
    weight = next(p for p in model.parameters() if p.requires_grad)
    count = min(_TOKENS, model.config.get_text_config().vocab_size)
    calls = 0

    def called(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handles = [module.register_forward_pre_hook(called) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = model(
                input_ids=torch.arange(count, device=weight.device)[None], use_cache=False
            ).logits
        torch.autograd.grad(logits.float().sum(), weight, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach(), calls
