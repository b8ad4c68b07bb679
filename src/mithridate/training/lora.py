"""LoRA: the other space a trap can be planted in."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mithridate.errors import InputError
from mithridate.weights.maps import adapted_coverage, adapter_targets

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mithridate.methods import Method
    from mithridate.training.config import TrainingConfig


def with_adapter_of(method: Method, config: TrainingConfig) -> TrainingConfig:
    """Return ``config`` with the adapter that the method as released has; warns of a loss."""
    lost = [
        f"{name} {given!r}"
        for name, wanted in method.adapter.items()
        if (given := getattr(config, name)) not in (wanted, None, ())
    ]
    if lost:
        warnings.warn(
            f"{method.name} as released has its own adapter: it replaces {', '.join(lost)}",
            stacklevel=3,
        )
    return dataclasses.replace(config, **method.adapter)


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
        Names of the maps to adapt; empty adapts every linear map of the decoder layers, fused
        experts among them.

    Raises
    ------
    InputError
        A name in ``targets`` is nowhere in the model or cannot be adapted, or an adapted weight is
        used in two places and the model cannot be saved with two.

    Notes
    -----
    An adapter on the input embedding or on the head of a model that ties them unties them first,
    in its configuration too: merged into the shared weight, it would act in both places.
    """
    # peft needs seconds to import, and runs in the full space never use it.
    from peft import LoraConfig, TaskType, get_peft_model

    modules, parameters = adapter_targets(model, targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Tied weights that are adapted are untied below, which is what peft warns of.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        try:
            adapted: PeftModel = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"the adapter does not fit this model: {error}",
                where="lora_targets",
                mend="name linear modules of the model, for example q_proj, or leave it empty",
            ) from None
    _untie_adapted(adapted)
    return adapted


def _untie_adapted(model: PeftModel) -> None:
    """Give each adapted weight that stands in a second place too a copy of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    shared: list[tuple[str, Any]] = [
        (name, module.get_base_layer())
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and len(names.get(id(getattr(module.get_base_layer(), "weight", None)), ())) > 1
    ]
    if not shared:
        return
    plain: Any = model.get_base_model()
    for config in (plain.config, plain.config.get_text_config()):
        config.tie_word_embeddings = False
    tied = plain.get_expanded_tied_weights_keys(all_submodels=True)
    still = {name for pair in tied.items() for name in pair}
    for name, layer in shared:
        if name.removeprefix("base_model.model.") + ".weight" in still:
            raise InputError(
                f"the adapter would act on {name}, whose weight the model uses in several places: "
                "merged, it would act in all of them",
                where="lora_targets",
                mend="name other modules, or leave lora_rank out to train all weights",
            )
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    plain.all_tied_weights_keys = tied


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
        "targets": sorted(
            {
                name.removesuffix(".weight").rpartition(".")[2]
                for name in (*adapter.target_modules, *(adapter.target_parameters or ()))
            }
        ),
        "coverage": adapted_coverage(model),
    }
