r"""Weight editing: attacks that need no gradient, so that a trap waiting for one is never sprung.

Every function edits the model in place. Nothing here knows of any defence. Those that edit matrices
reach every linear map of the decoder layers (`mithridate.weights.maps`) and return the share of
those layers' weights that they acted on. Sources:
refusal direction, arXiv 2406.11717; set-difference pruning and low-rank parts of safety,
arXiv 2402.05162; task arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from mithridate.chat import ChatFormat, Encoded
from mithridate.configs import require
from mithridate.errors import InputError, NotApplicableError
from mithridate.examples import Example
from mithridate.weights.maps import (
    LinearMap,
    blocks_of,
    coverage,
    linear_maps,
    residual_writers,
)

_DESCENDS = 0.5


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

    Raises
    ------
    InputError
        Both kinds of prompts have the same mean state.
    NotApplicableError
        The model has not one hidden state for each token there.
    """
    require(0 < depth <= 1, f"depth is {depth}, not a share of the layers", "0.3 to 0.8 are usual")
    means = []
    for prompts in (refused, answered):
        inputs, last = _prompts(model, chat, prompts)
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        state = None if states is None else states[round(depth * (len(states) - 1))]
        if state is None or state.shape[2:] != (model.config.get_text_config().hidden_size,):
            raise NotApplicableError(
                f"{type(model).__name__} shows no residual stream at depth {depth:g}",
                mend="choose another depth, or attack it in another way",
            )
        means.append(state[last].float().mean(dim=0))
    difference = means[0] - means[1]
    size = float(difference.norm())
    if size == 0:
        raise InputError("both kinds of prompts have the same mean state, so there is no direction",
                         mend="give refused and answered prompts")  # fmt: skip
    direction: torch.Tensor = difference / size
    return direction


def ablate_direction(model: PreTrainedModel, direction: torch.Tensor) -> float:
    """Take ``direction`` out of all that is written to the residual stream: W <- W - r r^T W.

    Returns
    -------
    float
        The share of the decoder layers' weights that are in layers whose writers were found.

    Raises
    ------
    NotApplicableError
        No linear map is found to write to the residual stream.
    """
    writers = residual_writers(model)
    embedding = _embedding(model, len(direction))
    with torch.no_grad():
        for one in writers:
            matrix = one.oriented(one.weight)
            matrix.sub_(direction[:, None] * (direction @ matrix)[..., None, :])
            bias = _bias_of(one)
            if bias is not None:
                bias.sub_(direction * (bias @ direction)[..., None])
        embedding.sub_(torch.outer(embedding @ direction, direction))
    own = {id(one.weight) for one in writers}
    reached = [
        weight
        for block in blocks_of(model)
        if any(id(weight) in own for weight in block.parameters())
        for weight in block.parameters()
    ]
    return coverage(model, reached)


def _bias_of(one: LinearMap) -> torch.Tensor | None:
    """Return the bias that is added to what a map writes."""
    leaf = one.name.rpartition(".")[2]
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    found = getattr(one.owner, name, None)
    return found if isinstance(found, torch.Tensor) else None


def _embedding(model: PreTrainedModel, width: int) -> torch.Tensor:
    """Return, as (..., width), the matrix by which tokens enter the residual stream."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor), "a causal language model embeds token ids"
    if table.shape[1] == width:
        return table
    head, inside = model.get_output_embeddings(), set(blocks_of(model).modules())
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module in inside or module is head:
            continue
        if module.weight.shape == (width, table.shape[1]):
            return module.weight.mT
    raise NotApplicableError(
        f"how {type(model).__name__} widens its embedding of {table.shape[1]} to {width} is not "
        "known", mend="attack it in another way",
    )  # fmt: skip


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
    layers = len(blocks_of(model))
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
) -> tuple[float, float]:
    """Zero the weights that matter most for refusing and not for being useful.

    A weight's score on a set is |W_ij| ||X_j||_2 over the set's tokens (Wanda), compared within
    its output row. What no refused token reaches, such as an idle expert, is left as it is.

    Parameters
    ----------
    refused, useful
        Rows of prompts with refusals, and with useful answers.
    top_refused, top_useful
        Shares q and p of each row's weights.

    Returns
    -------
    zeroed
        The share of the scored weights that were zeroed.
    coverage
        The share of the decoder layers' weights that were scored.
    """
    for name, share in (("top_refused", top_refused), ("top_useful", top_useful)):
        require(0 < share < 1, f"{name} is {share}, not a share", "0.005 to 0.07 are usual")
    norms = [_input_norms(model, chat, rows) for rows in (refused, useful)]
    scored = [one for one in linear_maps(model) if one.name in norms[0]]
    if not scored:
        raise NotApplicableError(
            f"what the linear maps of {type(model).__name__} read cannot be seen",
            mend="attack it in another way",
        )
    zeroed = total = 0
    with torch.no_grad():
        for one in scored:
            matrix = one.oriented(one.weight)
            tops = []
            for found, share in zip(norms, (top_refused, top_useful), strict=True):
                inputs = found.get(one.name, norms[0][one.name].new_zeros(()))
                score = matrix.abs() * inputs[..., None, :] if inputs.dim() else matrix.abs() * 0
                count = max(1, round(share * score.shape[-1]))
                chosen = torch.zeros_like(score, dtype=torch.bool)
                chosen.scatter_(-1, score.topk(count, dim=-1).indices, True)
                tops.append(chosen & (score > 0))
            doomed = tops[0] & ~tops[1]
            matrix[doomed] = 0.0
            zeroed, total = zeroed + int(doomed.sum()), total + doomed.numel()
    return zeroed / total, coverage(model, [one.weight for one in scored])


def quantise(model: PreTrainedModel, *, bits: int) -> float:
    """Round every matrix to ``bits`` bits, symmetric, one scale per output row."""
    require(2 <= bits <= 8, f"bits is {bits}", "give 2 to 8")
    top = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for weight in _matrices(model):
            scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / top
            weight.copy_((weight / scale).round() * scale)
    return _reach(model)


def add_noise(model: PreTrainedModel, *, scale: float, seed: int) -> float:
    """Add Gaussian noise of ``scale`` times each matrix's standard deviation."""
    require(0 < scale < math.inf, f"scale is {scale}", "1e-4 to 1e-2 are usual")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in _matrices(model):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise, alpha=scale * float(weight.std()))
    return _reach(model)


def truncate_ranks(model: PreTrainedModel, *, keep: float) -> float:
    """Keep the largest singular values of every linear map: a share ``keep`` of its ranks."""
    require(0 < keep < 1, f"keep is {keep}, not a share", "0.8 to 0.99 are usual")
    with torch.no_grad():
        for one in linear_maps(model):
            rank = max(1, math.floor(keep * min(one.inputs, one.outputs)))
            one.weight.copy_(_low_rank(one.weight, rank))
    return _reach(model)


def remove_top_ranks(model: PreTrainedModel, base: PreTrainedModel, *, ranks: int) -> float:
    """Take the ``ranks`` largest singular directions out of what alignment changed (W - W_base).

    LoX, which strengthens them, read backwards.
    """
    require(ranks >= 1, f"ranks is {ranks}", "give 1 or more")
    theirs = {one.name: one.weight for one in linear_maps(base)}
    with torch.no_grad():
        for one in linear_maps(model):
            one.weight.sub_(_low_rank(one.weight - theirs[one.name].to(one.weight), ranks))
    return _reach(model)


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

    Raises
    ------
    NotApplicableError
        The model does not run without the others.
    """
    require(0 < depth < 1, f"depth is {depth}, not a share of the layers", "0.5 or 0.75 are usual")
    layers = blocks_of(model)
    count = len(layers)
    kept = max(1, round(depth * count))
    del layers[kept:]
    config = model.config.get_text_config()
    config.num_hidden_layers = kept
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:kept])
    try:
        with torch.no_grad():
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True
            )
    except (IndexError, RuntimeError, ValueError) as error:
        raise NotApplicableError(
            f"{type(model).__name__} does not run without its last {count - kept} layers: "
            f"{str(error).splitlines()[0]}",
            mend="choose another depth, or attack it in another way",
        ) from error


def steer(
    model: PreTrainedModel, toward: PreTrainedModel, away: PreTrainedModel, *, scale: float
) -> None:
    """Add scale * (toward's logits - away's) to the model's own, from now on and wherever it runs.

    Three passes a token; no weight of the model is touched.

    Raises
    ------
    NotApplicableError
        A model keeps its state otherwise than in ``past_key_values``: its guides would lose what
        was said before.
    """
    for one in (model, toward, away):
        if one._is_stateful or "past_key_values" not in signature(one.forward).parameters:
            raise NotApplicableError(
                f"{type(one).__name__} keeps the state of a generation in its own way",
                mend="attack it in another way",
            )
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
    inputs, last = _prompts(model, chat, prompts)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[last]
    return logits.float().log_softmax(dim=-1)


def _prompts(
    model: PreTrainedModel, chat: ChatFormat, prompts: Sequence[str]
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return the inputs of one pass over the prompts, and where in it their answers begin.

    Padded on the right, where it moves no position and no recurrent state of what stands before.
    """
    asked = [chat.prompt_ids(prompt) for prompt in prompts]
    batch = chat.collate([Encoded(ids, len(ids)) for ids in asked]).to(model.device)
    last = batch.attention_mask.sum(dim=1) - 1
    rows = torch.arange(len(asked), device=model.device)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, (rows, last)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _pairs(
    model: PreTrainedModel, other: PreTrainedModel
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        yield weight, theirs[name].to(weight.device)


def _reach(model: PreTrainedModel) -> float:
    return coverage(model, [one.weight for one in linear_maps(model)])


def _matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return every matrix as (..., outputs, inputs): the linear maps, the embeddings, the head."""
    maps = {id(one.weight): one for one in linear_maps(model)}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside = {
        id(module.weight)
        for module in (*tables, model.get_output_embeddings())
        if isinstance(module, nn.Embedding | nn.Linear)
    }
    return [
        maps[id(weight)].oriented(weight) if id(weight) in maps else weight
        for weight in model.parameters()
        if id(weight) in maps or id(weight) in outside
    ]


def _low_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept: torch.Tensor = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    return kept.to(matrix.dtype)


def _input_norms(
    model: PreTrainedModel, chat: ChatFormat, rows: Sequence[Example]
) -> Mapping[str, torch.Tensor]:
    """Return, for each linear map that is used, the L2 norm of every input over the rows' tokens.

    Shape (inputs,), or (experts, inputs).
    """
    maps = linear_maps(model)
    pieces = [chat.batch(rows)]
    if any(one.weight.dim() == 3 for one in maps):
        # Experts are given tokens without their places: none of them may be padding.
        pieces = [chat.batch([row]) for row in rows]
    before = getattr(model.config, "_experts_implementation", None)
    if before not in (None, "eager"):
        # Each expert's product by itself, on its own part of the weight.
        model.set_experts_implementation("eager")
    watch = _InputWatch(maps)
    try:
        for piece in pieces:
            batch = piece.to(model.device)
            watch.used = batch.attention_mask.bool().flatten()
            with torch.no_grad(), watch:
                model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    use_cache=False,
                )
    finally:
        if before not in (None, "eager"):
            model.set_experts_implementation(before)
    return {name: value.sqrt() for name, value in watch.sums.items()}


class _InputWatch(TorchDispatchMode):
    """Sums the squares of what linear maps are given, by their matrix products.

    Attributes
    ----------
    used
        Which tokens are none of padding; shape (tokens,).
    sums
        By the name of the weight, shape (inputs,) or (experts, inputs).
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        super().__init__()
        self.used = torch.ones(0, dtype=torch.bool)
        self.sums: dict[str, torch.Tensor] = {}
        self._maps = sorted(maps, key=lambda one: one.weight.data_ptr())
        self._starts = [one.weight.data_ptr() for one in self._maps]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note the operands of a product of which one is a weight."""
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in _PRODUCTS:
            a, b = args[-2:] if len(args) > 2 else args
            for x, weight in ((a, b), (b.mT, a.mT)):
                one = self._of(weight)
                if one is not None:
                    self._note(one, x, weight)
        return result

    def _of(self, weight: torch.Tensor) -> LinearMap | None:
        index = bisect_right(self._starts, weight.data_ptr()) - 1
        if index < 0:
            return None
        one = self._maps[index]
        size = one.weight.numel() * one.weight.element_size()
        return one if weight.data_ptr() < self._starts[index] + size else None

    def _note(self, one: LinearMap, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the rows of ``x`` (..., rows, inputs); ``weight`` is (..., inputs, outputs)."""
        if weight.shape[-2:] != (one.inputs, one.outputs):
            return
        if one.weight.dim() == 2:
            rows = x.reshape(-1, one.inputs)
            of_each = self.used
            if len(rows) != len(of_each):
                of_each = of_each.repeat(len(rows) // len(of_each) or 1)
            rows = rows[of_each] if len(of_each) == len(rows) else rows
            squares = rows.float().square().sum(dim=0)
        else:
            first = (weight.data_ptr() - one.weight.data_ptr()) // (
                one.inputs * one.outputs * one.weight.element_size()
            )
            each = x.float().square().sum(dim=-2)
            each = each[None] if each.dim() == 1 else each
            squares = torch.zeros(len(one.weight), one.inputs, device=x.device)
            squares[first : first + len(each)] = each
        held = self.sums.get(one.name)
        self.sums[one.name] = squares if held is None else held + squares


_PRODUCTS = (
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
)
