"""Where a method looks into the layers of a model: outputs that it reads or disturbs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError, InputError
from mithridate.weights import GradientOracle
from mithridate.weights.losses import answer_cross_entropy
from mithridate.weights.maps import blocks_of

Site = Literal["attention", "block", "mlp"]

_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")


def sites_of(model: nn.Module, kind: Site) -> list[nn.Module]:
    """Return one module per layer, whose output is the site.

    ``attention`` is the child of the layer that takes an attention mask, ``mlp`` the one that is
    named as such, ``block`` the layer itself.

    Raises
    ------
    InputError
        If a layer has no such child.
    """
    layers = list(blocks_of(model))
    if kind == "block":
        return layers
    find = _attention if kind == "attention" else _mlp
    found = [find(layer) for layer in layers]
    missing = [index for index, site in enumerate(found) if site is None]
    if missing:
        raise InputError(
            f"layer {missing[0]} ({type(layers[missing[0]]).__name__}) has no {kind} of its own",
            where="site",
            mend="use site: block where the method offers it, or another method",
        )
    return [site for site in found if site is not None]


def _attention(layer: nn.Module) -> nn.Module | None:
    for child in layer.children():
        if "attention_mask" in inspect.signature(child.forward).parameters:
            return child
    return None


def _mlp(layer: nn.Module) -> nn.Module | None:
    children = dict(layer.named_children())
    return next((children[name] for name in _MLP if name in children), None)


@contextmanager
def outputs_changed(
    sites: Sequence[nn.Module], change: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Run the body with each site's output x replaced by ``change(index, x)``.

    Where a site returns a tuple, x is its first element. The body must hold the backward pass
    too where layers are checkpointed and ``change`` alters x: they are run again there.
    """

    def hook(index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return change(index, output)
            return (change(index, output[0]), *output[1:])

        return replace

    handles = [site.register_forward_hook(hook(index)) for index, site in enumerate(sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_seen(sites: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Run the body and fill the yielded list with the sites' outputs, one per site."""
    seen: dict[int, torch.Tensor] = {}
    found: list[torch.Tensor] = []

    def note(site: int, x: torch.Tensor) -> torch.Tensor:
        seen[site] = x
        return x

    with outputs_changed(sites, note):
        yield found
    found.extend(seen[site] for site in range(len(sites)))


def walk_sites(
    oracle: GradientOracle,
    sites: Sequence[nn.Module],
    piece: Batch,
    count: int,
    see: Callable[[int, torch.Tensor], None],
    *,
    purpose: str,
) -> float:
    """Show ``see`` the gradient of a micro-batch's loss by each site; the weights get none.

    Parameters
    ----------
    count
        Label positions of the whole step, by which the loss is divided.
    see
        Called with the index of a site and the gradient by its output: the output's shape, in
        float32 or better.

    Returns
    -------
    float
        The loss.

    Raises
    ------
    InactiveTermError
        If a site has no part in the loss.
    """
    # A scalar in the shape of the output has that output's gradient, and takes no memory.
    zero = torch.zeros((), device=piece.input_ids.device, requires_grad=True)
    seen = set()

    def probe(site: int, output: torch.Tensor) -> torch.Tensor:
        def note(gradient: torch.Tensor) -> None:
            seen.add(site)
            see(site, gradient if gradient.dtype == torch.float64 else gradient.float())

        shift = zero.to(output.dtype).expand_as(output)
        shift.register_hook(note)
        return output + shift

    with outputs_changed(sites, probe):
        (value,) = oracle.backward(
            lambda: [answer_cross_entropy(oracle.model, piece) / count],
            tokens=piece.tokens,
            purpose=purpose,
            inputs=[zero],
        )
    if len(seen) < len(sites):
        raise InactiveTermError("the output of some layer has no part in the model's loss")
    return value
