r"""Weight editing: attacks that need no gradient, so that a trap waiting for one is never sprung.

Every function edits the model in place. Nothing here knows of any defence. Sources:
refusal direction, arXiv 2406.11717; set-difference pruning and low-rank parts of safety,
arXiv 2402.05162; task arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from mithridate.chat import ChatFormat
from mithridate.configs import require
from mithridate.errors import InputError
from mithridate.examples import Example

_DESCENDS = 0.5
# Names of the linear layers that write to the residual stream, over the common architectures.
_WRITERS = ("o_proj", "down_proj", "out_proj", "fc2", "dense_4h_to_h", "wo", "w2")


def refusal_direction(
    model: PreTrainedModel,
    chat: ChatFormat,
    refused: Sequence[str],
    answered: Sequence[str],
    *,
    depth: float,
) -> torch.Tensor:
    """Return the unit difference of mean hidden states where the answer begins.

    Parameters
    ----------
    refused, answered
        Prompts; no answers are needed.
    depth
        Which layer's output, as a share of all layers, 0 to 1.

    Returns
    -------
    torch.Tensor
        Shape (hidden,), float32, L2 norm 1.
    """
    require(0 < depth <= 1, f"depth is {depth}, not a share of the layers", "0.3 to 0.8 are usual")
    means = []
    for prompts in (refused, answered):
        inputs = {name: t.to(model.device) for name, t in chat.prompt_batch(prompts).items()}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        # Prompts are padded on the left, so the last position is where every answer begins.
        means.append(states[round(depth * (len(states) - 1))][:, -1].float().mean(dim=0))
    difference = means[0] - means[1]
    size = float(difference.norm())
    if size == 0:
        raise InputError("both kinds of prompts have the same mean state, so there is no direction",
                         mend="give refused and answered prompts")  # fmt: skip
    direction: torch.Tensor = difference / size
    return direction


def ablate_direction(model: PreTrainedModel, direction: torch.Tensor) -> None:
    """Take ``direction`` out of all that is written to the residual stream: W <- W - r r^T W.

    Raises
    ------
    InputError
        If no layer of a known name writes to the residual stream.
    """
    writers = [
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in _WRITERS and isinstance(module, nn.Linear)
    ]
    if not writers:
        raise InputError(
            f"no linear layer of {type(model).__name__} is known to write to the residual stream",
            mend=f"known names: {', '.join(_WRITERS)}",
        )
    with torch.no_grad():
        for module in writers:
            module.weight.sub_(torch.outer(direction, direction @ module.weight))
            if module.bias is not None:
                module.bias.sub_(direction * (direction @ module.bias))
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, torch.Tensor), "a causal language model embeds token ids"
        embedding.sub_(torch.outer(embedding @ direction, direction))


def least_refusing_direction(
    model: PreTrainedModel,
    chat: ChatFormat,
    refused: Sequence[str],
    answered: Sequence[str],
    *,
    held_out: Sequence[str],
    refusals: Callable[[PreTrainedModel], float],
    most_kl: float,
) -> torch.Tensor:
    """Return the refusal direction, over the layers, whose ablation refuses least.

    The last fifth of the layers is left out, and every direction whose ablation moves the first
    token of ordinary answers by more than ``most_kl``; if all do, the one that moves it least
    (arXiv 2406.11717, section C).

    Parameters
    ----------
    held_out
        Ordinary prompts that the directions were not made from.
    refusals
        The share of held-out restricted prompts that a model refuses.
    most_kl
        Bound on KL(before || after) in nats, the mean over ``held_out``.
    """
    layers = len(layers_of(model))
    before = _first_token(model, chat, held_out)
    found = []
    for layer in range(1, max(1, math.floor(0.8 * layers)) + 1):
        direction = refusal_direction(model, chat, refused, answered, depth=layer / layers)
        ablated = copy.deepcopy(model)
        ablate_direction(ablated, direction)
        after = _first_token(ablated, chat, held_out)
        moved = float(functional.kl_div(after, before, reduction="batchmean", log_target=True))
        # Those within the bound come first, by what is refused; the others by how far they go.
        order = (0, refusals(ablated)) if moved <= most_kl else (1, moved)
        found.append((order, layer, direction))
    return min(found, key=lambda one: one[:2])[2]


def prune_set_difference(
    model: PreTrainedModel,
    chat: ChatFormat,
    refused: Sequence[Example],
    useful: Sequence[Example],
    *,
    top_refused: float,
    top_useful: float,
) -> float:
    """Zero the weights that matter most for refusing and not for being useful.

    A weight's score on a set is |W_ij| ||X_j||_2 over the set's tokens (Wanda), compared within
    its output row.

    Parameters
    ----------
    refused, useful
        Rows of prompts with refusals, and with useful answers.
    top_refused, top_useful
        Shares q and p of each row's weights.

    Returns
    -------
    float
        The share of weights that were zeroed.
    """
    for name, share in (("top_refused", top_refused), ("top_useful", top_useful)):
        require(0 < share < 1, f"{name} is {share}, not a share", "0.005 to 0.07 are usual")
    norms = [_input_norms(model, chat, rows) for rows in (refused, useful)]
    zeroed = total = 0
    with torch.no_grad():
        for name, module in _linears(model):
            tops = []
            for found, share in zip(norms, (top_refused, top_useful), strict=True):
                score = module.weight.abs() * found[name]
                count = max(1, round(share * score.shape[1]))
                chosen = torch.zeros_like(score, dtype=torch.bool)
                tops.append(chosen.scatter_(1, score.topk(count, dim=1).indices, True))
            doomed = tops[0] & ~tops[1]
            module.weight[doomed] = 0.0
            zeroed, total = zeroed + int(doomed.sum()), total + doomed.numel()
    return zeroed / total


def quantise(model: PreTrainedModel, *, bits: int) -> None:
    """Round every matrix to ``bits`` bits, symmetric, one scale per output row."""
    require(2 <= bits <= 8, f"bits is {bits}", "give 2 to 8")
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for weight in _matrices(model):
            scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / top
            weight.copy_((weight / scale).round() * scale)


def add_noise(model: PreTrainedModel, *, scale: float, seed: int) -> None:
    """Add Gaussian noise of ``scale`` times each matrix's standard deviation."""
    require(0 < scale < math.inf, f"scale is {scale}", "1e-4 to 1e-2 are usual")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in _matrices(model):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise, alpha=scale * float(weight.std()))


def truncate_ranks(model: PreTrainedModel, *, keep: float) -> None:
    """Keep the largest singular values of every linear layer: a share ``keep`` of its ranks."""
    require(0 < keep < 1, f"keep is {keep}, not a share", "0.8 to 0.99 are usual")
    with torch.no_grad():
        for _, module in _linears(model):
            rank = max(1, math.floor(keep * min(module.weight.shape)))
            module.weight.copy_(_low_rank(module.weight, rank))


def remove_top_ranks(model: PreTrainedModel, base: PreTrainedModel, *, ranks: int) -> None:
    """Take the ``ranks`` largest singular directions out of what alignment changed (W - W_base).

    LoX, which strengthens them, read backwards.
    """
    require(ranks >= 1, f"ranks is {ranks}", "give 1 or more")
    theirs = dict(_linears(base))
    with torch.no_grad():
        for name, module in _linears(model):
            module.weight.sub_(_low_rank(module.weight - theirs[name].weight, ranks))


def blend(model: PreTrainedModel, base: PreTrainedModel, *, share: float) -> None:
    """Move all weights to base + share * (model - base)."""
    with torch.no_grad():
        for weight, other in _pairs(model, base):
            weight.copy_(other + share * (weight - other))


def add_difference(
    model: PreTrainedModel, minuend: PreTrainedModel, subtrahend: PreTrainedModel, *, scale: float
) -> None:
    """Add scale * (minuend - subtrahend), a task vector, to all weights."""
    with torch.no_grad():
        for (weight, more), (_, less) in zip(
            _pairs(model, minuend), _pairs(model, subtrahend), strict=True
        ):
            weight.add_(more - less, alpha=scale)


def slerp(model: PreTrainedModel, other: PreTrainedModel, *, share: float) -> None:
    """Move every weight tensor a share of the way to another model's, along the great circle.

    sin((1 - t) w) / sin w * a + sin(t w) / sin w * b with w the angle between them; a straight
    line where they are parallel, or one is zero.
    """
    require(0 <= share <= 1, f"share is {share}", "give 0 to 1")
    with torch.no_grad():
        for weight, toward in _pairs(model, other):
            size = float(weight.norm() * toward.norm())
            cosine = float((weight * toward).sum()) / size if size > 0 else 1.0
            angle = math.acos(max(-1.0, min(1.0, cosine)))
            if math.sin(angle) < 1e-4:
                weight.lerp_(toward, share)
                continue
            kept = math.sin((1 - share) * angle) / math.sin(angle)
            weight.mul_(kept).add_(toward, alpha=math.sin(share * angle) / math.sin(angle))


def exit_early(model: PreTrainedModel, *, depth: float) -> None:
    """Drop the layers past a share ``depth`` of them: the head reads an inner layer's state.

    With every weight as it was, this is greedy decoding by the logit lens at that layer.
    """
    require(0 < depth < 1, f"depth is {depth}, not a share of the layers", "0.5 or 0.75 are usual")
    layers = layers_of(model)
    kept = max(1, round(depth * len(layers)))
    del layers[kept:]
    config = model.config.get_text_config()
    config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:kept]


def steer(
    model: PreTrainedModel, toward: PreTrainedModel, away: PreTrainedModel, *, scale: float
) -> None:
    """Add scale * (toward's logits - away's) to the model's own, from now on and wherever it runs.

    Three passes a token; no weight of the model is touched.
    """
    caches: dict[int, DynamicCache] = {}

    def add(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        passed = dict(given)
        if args:
            passed["input_ids"] = args[0]
        cache = passed.pop("past_key_values", None)
        width = passed["input_ids"].shape[1]
        # The model itself has gone first, so its cache holds these tokens already.
        first = cache is not None and cache.get_seq_length() == width
        for sign, guide in ((scale, toward), (-scale, away)):
            if first:
                caches[id(guide)] = DynamicCache(config=guide.config)
            own = {} if cache is None else {"past_key_values": caches[id(guide)]}
            with torch.no_grad():
                output.logits = output.logits + sign * guide(**passed, **own).logits
        return output

    model.register_forward_hook(add, with_kwargs=True)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of the model's layers.

    Raises
    ------
    InputError
        It has none, or not as many as its configuration says.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise InputError(
        f"no list of {wanted} layers found in {type(model).__name__}",
        mend="attack it in another way",
    )


def check_same_shapes(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Refuse a base model whose weights do not match the model's one to one.

    Raises
    ------
    InputError
        Other names or shapes, or matrices whose projection on the base's is less than half of
        them: about all in what was made from the base, even by adding noise, and about nothing in
        a model that was trained apart.
    """
    own, other = _shapes(model), _shapes(base)
    if own != other:
        wrong = sorted(
            name for name in own.keys() | other.keys() if own.get(name) != other.get(name)
        )
        raise InputError(
            f"{len(wrong)} weights do not match the base model's (first: {wrong[0]})",
            where="--base",
            mend="give the model that this one was aligned from",
        )
    common = size = 0.0
    for weight, reference in _pairs(model, base):
        if weight.dim() < 2:
            continue  # Weights of norms begin at one in every model.
        theirs = reference.detach().double()
        common += float((weight.detach().double() * theirs).sum())
        size += float(theirs.square().sum())
    require(
        common / size > _DESCENDS,
        f"the model holds {common / size:.2f} of the base model's weights: it is not its base",
        "give the model that this one was aligned from",
    )


def _first_token(model: PreTrainedModel, chat: ChatFormat, prompts: Sequence[str]) -> torch.Tensor:
    """Return log-probabilities of the first token of each answer, shape (prompts, vocabulary)."""
    inputs = {name: t.to(model.device) for name, t in chat.prompt_batch(prompts).items()}
    with torch.no_grad():
        # Prompts are padded on the left.
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[:, -1]
    return logits.float().log_softmax(dim=-1)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _pairs(
    model: PreTrainedModel, other: PreTrainedModel
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        yield weight, theirs[name].to(weight.device)


def _linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers but for the output head, which may be the embedding itself."""
    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.dim() == 2]


def _low_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept: torch.Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return kept.to(matrix.dtype)


def _input_norms(
    model: PreTrainedModel, chat: ChatFormat, rows: Sequence[Example]
) -> Mapping[str, torch.Tensor]:
    """Return, for each linear layer, the L2 norm of every input over the rows' tokens."""
    batch = chat.batch(rows).to(model.device)
    used = batch.attention_mask.bool()
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in _linears(model):

        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            sums[name] = inputs[0][used].float().square().sum(dim=0)

        hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.sqrt() for name, value in sums.items()}
