"""Where the matrices of a model are: its decoder layers, and the linear maps inside them.

By structure, over every causal language model that transformers builds: linear layers, GPT-2's
transposed ones, routers, and the experts of a layer that are kept in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mithridate.errors import InputError, NotApplicableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Their fused kernels read the weight of `out_proj` past an adapter.
_PEFT_REFUSES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """One matrix of a decoder layer, or one tensor of as many matrices as there are experts.

    Attributes
    ----------
    name
        Of the weight in the model, without an adapter around it.
    owner
        The module that holds the weight.
    weight
        Shape (outputs, inputs), (experts, outputs, inputs), or with ``transposed`` the last two
        the other way round.
    """

    name: str
    owner: nn.Module
    weight: nn.Parameter
    transposed: bool

    @property
    def inputs(self) -> int:
        """Width of what it reads."""
        return int(self.weight.shape[-2 if self.transposed else -1])

    @property
    def outputs(self) -> int:
        """Width of what it writes."""
        return int(self.weight.shape[-1 if self.transposed else -2])

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of a tensor of the weight's shape as (..., outputs, inputs)."""
        return tensor.mT if self.transposed else tensor


def innermost(model: nn.Module) -> Any:
    """Return the causal language model inside an adapter's wrapper, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of the model's text part.

    They are the outermost list of as many modules as its text configuration has layers; towers
    of another configuration, such as those for images, are not looked into.

    Raises
    ------
    NotApplicableError
        There is no such list, or several side by side.
    """
    inner = innermost(model)
    config = inner.config.get_text_config()
    depth = int(config.num_hidden_layers)
    found = list(_lists(inner, depth, {type(inner.config), type(config)}))
    if len(found) == 1:
        return found[0]
    raise NotApplicableError(
        f"{f'{len(found)} lists' if found else 'no list'} of {depth} layers found in "
        f"{type(inner).__name__}",
        mend="choose a method or attack that does not look into layers, for example ctrap",
    )


def _lists(module: nn.Module, depth: int, known: set[type]) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            if any(True for _ in child.parameters()):
                yield child
        elif not hasattr(child, "config") or type(child.config) in known:
            yield from _lists(child, depth, known)


def linear_maps(model: nn.Module) -> list[LinearMap]:
    """Return every linear map of the decoder layers, in the order of the model's parameters.

    Raises
    ------
    NotApplicableError
        The decoder layers are not found, or hold no linear map.
    """
    inner = innermost(model)
    blocks = blocks_of(model)
    width = int(inner.config.get_text_config().hidden_size)
    prefix = next(name for name, module in inner.named_modules() if module is blocks)
    owners = {f"{prefix}.{name}" if name else prefix: m for name, m in blocks.named_modules()}
    found = []
    for name, weight in blocks.named_parameters(prefix=prefix):
        path, _, leaf = name.rpartition(".")
        owner = owners[path]
        if _is_map(owner, leaf, weight):
            found.append(LinearMap(name, owner, weight, _is_transposed(owner, weight, width)))
    if not found:
        raise NotApplicableError(f"the layers of {type(inner).__name__} hold no linear map",
                                 mend="choose another method or attack")  # fmt: skip
    return found


def _is_map(owner: nn.Module, leaf: str, weight: nn.Parameter) -> bool:
    """Whether a parameter is a matrix that maps, not a kernel, a table, a scale or a bias."""
    if isinstance(owner, nn.Embedding | nn.modules.conv._ConvNd) or not weight.is_floating_point():
        return False
    if weight.dim() == 2:
        return leaf == "weight"
    return weight.dim() == 3 and min(weight.shape[1:]) > 1 and "bias" not in leaf


def _is_transposed(owner: nn.Module, weight: nn.Parameter, width: int) -> bool:
    """Whether a map's weight is kept as (..., inputs, outputs).

    The first tensor of experts reads the residual stream and the last writes to it, so that
    whichever has one side of that width tells how all of them are kept.
    """
    if weight.dim() == 2:
        return _is_gpt2_linear(owner)
    known = getattr(owner, "is_transposed", None)
    if known is not None:
        return bool(known)
    siblings = [w for w in owner.parameters(recurse=False) if w.dim() == 3]
    if len(siblings) < 2:
        return False
    for tensor, reads in ((siblings[0], True), (siblings[-1], False)):
        before, after = (size == width for size in tensor.shape[1:])
        if before != after:
            return before if reads else after
    return False


def _is_gpt2_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def coverage(model: nn.Module, weights: Iterable[nn.Parameter]) -> float:
    """Return which share of the decoder layers' weights some weights are."""
    own = {id(weight): weight.numel() for weight in blocks_of(model).parameters()}
    return sum(own.get(id(weight), 0) for weight in weights) / sum(own.values())


def adapter_targets(
    model: PreTrainedModel, names: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the modules and the bare parameters that an adapter of linear maps is put on.

    A linear layer that maps in its own way, or whose weight a state space's fused kernel reads, is
    named by its parameter. So is every map where experts are kept in one tensor: peft takes the
    names of modules there for those of an older layout. What peft refuses is left out, and
    `adapted_coverage` tells how much that is.

    Parameters
    ----------
    names
        The last parts of the names of the maps to take (``q_proj``), or of other modules of the
        model; empty takes every map.

    Raises
    ------
    InputError
        A name is nowhere in the model.
    """
    modules, parameters = list[str](), list[str]()
    holders = dict(innermost(model).named_modules())
    met = set[str]()
    # What RecurrentGemma's blocks set on their unit, a wrapper around it would take in its place.
    maps = [one for one in linear_maps(model) if not hasattr(one.owner, "recurrent_states")]
    stacked = any(one.weight.dim() == 3 for one in maps)
    for one in maps:
        short = one.name.removesuffix(".weight")
        asked = {name for name in names if f".{short}".endswith(f".{name}")}
        met |= asked
        if names and not asked:
            continue
        if short.endswith(".out_proj") and model.config.model_type in _PEFT_REFUSES:
            continue
        plain = type(one.owner).forward is nn.Linear.forward or _is_gpt2_linear(one.owner)
        if plain and not stacked and not hasattr(holders[short.rpartition(".")[0]], "A_log"):
            modules.append(short)
        else:
            parameters.append(one.name)
    for name in names:
        if name not in met:
            modules += [place for place in holders if f".{place}".endswith(f".{name}")]
            if not any(f".{place}".endswith(f".{name}") for place in holders):
                raise InputError(
                    f"the adapter does not fit this model: it has no {name}",
                    where="lora_targets",
                    mend="name linear modules of the model, for example q_proj, or leave it empty",
                )
    return modules, parameters


def adapted_coverage(model: nn.Module, *, trained: bool = False) -> float:
    """Return which share of the decoder layers' weights a model's adapter changes; 1 without.

    Parameters
    ----------
    trained
        Count only what the adapter has learnt to change: a model may read a weight past it.
    """
    if not hasattr(model, "peft_config"):
        return 1.0
    from peft.tuners.lora import LoraLayer

    blocks = blocks_of(model)
    adapted = dict[int, int]()
    total = sum(w.numel() for name, w in blocks.named_parameters() if "lora_" not in name)
    for module in blocks.modules():
        if isinstance(module, LoraLayer):
            factors = list(module.lora_B.parameters())
            if trained and not any(bool(factor.any()) for factor in factors):
                continue
            # One around a bare parameter is named after it.
            leaf = getattr(module, "parameter_name", "weight")
            weight = cast("nn.Parameter", getattr(module.get_base_layer(), leaf))
            adapted[id(weight)] = weight.numel()
    return sum(adapted.values()) / total


def residual_writers(model: PreTrainedModel) -> list[LinearMap]:
    """Return the linear maps that write to the residual stream.

    Found by the flow of data in one pass: within each part of a layer (attention, state space,
    MLP, expert) a writer reads what other maps of that part have made, no other map reads what it
    writes, and that is as wide as the stream. Experts that no token reached are taken to be like
    their neighbours.

    Raises
    ------
    NotApplicableError
        There are none, or the model cannot be followed.
    """
    maps = linear_maps(model)
    width = int(model.config.get_text_config().hidden_size)
    wide: dict[nn.Module, LinearMap] = {}
    for one in maps:
        if one.outputs == width:
            wide[one.owner] = one  # The last of a module that holds several.
    made = _flow(model, {one.owner: one for one in maps})
    several = {owner for owner in made if sum(one.owner is owner for one in maps) > 1}
    read = {source for sources in made.values() for source in sources}
    kinds = {
        _kind(wide[owner].name)
        for owner, sources in made.items()
        if owner in wide and owner not in read and (sources or owner in several)
    }
    found = [one for one in wide.values() if _kind(one.name) in kinds]
    if not found:
        raise NotApplicableError(
            f"no linear map of {type(model).__name__} is found to write to the residual stream",
            mend="attack it in another way",
        )
    return found


def _kind(name: str) -> str:
    """Return the name of a map without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _flow(
    model: PreTrainedModel, owners: dict[nn.Module, LinearMap]
) -> dict[nn.Module, set[nn.Module]]:
    """Return, for each module that was run, the modules of its part whose output it reads."""
    marks: dict[torch.Tensor, nn.Module] = {}
    seen: dict[nn.Module, set[nn.Module]] = {}
    parts = {owner: _part(model, one.name) for owner, one in owners.items()}

    def cut(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        def detached(value: Any) -> Any:
            return value.detach() if isinstance(value, torch.Tensor) else value

        return tuple(map(detached, args)), {k: detached(v) for k, v in given.items()}

    def before(owner: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(given.values()))
        if isinstance(first, torch.Tensor):
            sources = {marks[mark] for mark in _leaves(first) if mark in marks}
            seen[owner] = {one for one in sources if parts[one] is parts[owner]}

    def after(owner: nn.Module, _: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output
        mark = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        marks[mark] = owner
        return output + mark

    hooks = [block.register_forward_pre_hook(cut, with_kwargs=True) for block in blocks_of(model)]
    for owner in owners:
        hooks.append(owner.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(owner.register_forward_hook(after))
    try:
        with torch.enable_grad():
            ids = torch.arange(4, device=model.device)[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except RuntimeError as error:
        raise NotApplicableError(
            f"what writes to the residual stream of {type(model).__name__} cannot be followed: "
            f"{str(error).splitlines()[0]}", mend="attack it in another way",
        ) from error  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _part(model: PreTrainedModel, name: str) -> nn.Module:
    """Return the attention, MLP or the like that a map belongs to: a child of its layer."""
    blocks = blocks_of(model)
    prefix = next(path for path, module in model.named_modules() if module is blocks)
    index, *path = name.removeprefix(f"{prefix}.").split(".")
    block = part = blocks[int(index)]
    for piece in path[:-2]:
        part = part.get_submodule(piece)
        if not isinstance(part, nn.ModuleList | nn.ModuleDict):
            return part
    return block


def _leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the leaves that a tensor was made from."""
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [next_node for next_node, _ in node.next_functions]
