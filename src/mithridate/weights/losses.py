"""Losses over the label positions of a batch, as sums: the oracle divides by the whole step.

Every loss is a function ``(model, batch) -> scalar`` that sums over label positions, in float32
or better (`methods.md` §2.4). Only label positions are projected onto the vocabulary where the
model allows it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mithridate.chat import IGNORE, Batch
from mithridate.errors import InputError
from mithridate.weights.lens import Lens
from mithridate.weights.maps import innermost

Loss = Callable[[nn.Module, Batch], torch.Tensor]

CHUNK = 1 << 24
"""Numbers in a vocabulary-sized tensor of `in_chunks`: 64 MiB in float32."""


def _forward_parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict the answer tokens, and those tokens.

    Parameters
    ----------
    model
        A causal language model.
    batch
        ``labels`` are `IGNORE` outside the answers.

    Returns
    -------
    logits
        Shape (label positions, vocabulary), float32 or float64.
    targets
        Shape (label positions,), token ids.
    """
    logits, targets, _ = _answer_outputs(model, batch)
    return logits, targets


def _answer_outputs(
    model: nn.Module, batch: Batch, *, lens: Lens | None = None, layers: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return `answer_logits` and, for each number in ``layers``, the hidden state there."""
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORE
    first = int(wanted.any(dim=0).nonzero()[0])
    keep = targets.shape[1] + 1 - first
    extra: dict[str, int | bool] = {}
    if "logits_to_keep" in _forward_parameters(type(innermost(model))):
        extra["logits_to_keep"] = keep
    if lens is not None and lens.depth in layers:
        extra["output_hidden_states"] = True
    watching: AbstractContextManager[dict[int, torch.Tensor]]
    watching = nullcontext({}) if lens is None else lens.watching(layers)
    with watching as seen:
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra
        )
    if "output_hidden_states" in extra and lens is not None:
        seen[lens.depth] = output.hidden_states[-1]
    chosen = wanted[:, first:]
    states = [seen[number][:, -keep:-1][chosen] for number in layers]
    return widen(output.logits[:, -keep:-1][chosen]), targets[:, first:][chosen], states


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Return ``logits`` in float32 or better: softmax and entropy are not taken in half."""
    return logits if logits.dtype == torch.float64 else logits.float()


def answer_cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed cross-entropy of the answer tokens: plain SFT (nats)."""
    logits, targets = answer_logits(model, batch)
    return functional.cross_entropy(logits, targets, reduction="sum")


def uniform_collapse(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed KL(uniform || p) at the answer positions (`methods.md` §13, U)."""
    logits, _ = answer_logits(model, batch)
    return uniform_divergence(logits).sum()


def uniform_divergence(logits: torch.Tensor) -> torch.Tensor:
    """Return KL(uniform || softmax(logits)) per row, in nats; zero at equal logits."""
    return logits.logsumexp(dim=-1) - logits.mean(dim=-1) - math.log(logits.shape[-1])


def token_collapse(token_id: int) -> Loss:
    """Return the loss -log p(e | true context) at every answer position (CTRAP's collapse loss)."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, _ = answer_logits(model, batch)
        return functional.cross_entropy(
            logits, torch.full((len(logits),), token_id, device=logits.device), reduction="sum"
        )

    return loss


def check_token(model: nn.Module, token_id: int) -> None:
    """Refuse an id that the model has no logit for."""
    vocabulary = innermost(model).get_output_embeddings().weight.shape[0]
    if token_id >= vocabulary:
        raise InputError(
            f"there is no token {token_id} in a vocabulary of {vocabulary}",
            where="collapse_token",
            mend=f"give an id from 0 to {vocabulary - 1}",
        )


def token_probability(token_id: int) -> Loss:
    """Return the sum of p(e | true context) over the answer positions; for logging."""

    def total(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, _ = answer_logits(model, batch)
        return logits.softmax(dim=-1)[:, token_id].sum()

    return total


def layerwise_cross_entropy(
    model: nn.Module, batch: Batch, layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed answer cross-entropy of the output, and that of inner layers together.

    Parameters
    ----------
    model
        A causal language model; with ``layers`` one that `check_lens` lets pass.
    batch
        Only its label positions are projected onto the vocabulary.
    layers
        0 for the embedding, n for what layer n gives, and for the last what follows its final
        norm; each is read by `Lens`.

    Returns
    -------
    output, lens
        Scalars in nats; ``lens`` sums over ``layers`` and is 0 without any.
    """
    if not layers:
        logits, targets = answer_logits(model, batch)
        output = functional.cross_entropy(logits, targets, reduction="sum")
        return output, torch.zeros_like(output)
    reader = Lens(model)
    logits, targets, states = _answer_outputs(model, batch, lens=reader, layers=layers)
    output = functional.cross_entropy(logits, targets, reduction="sum")

    def read(joined: torch.Tensor) -> torch.Tensor:
        wanted = targets.repeat(len(joined) // len(targets))
        return functional.cross_entropy(widen(reader.read(joined)), wanted, reduction="sum")

    at_once = max(1, CHUNK // logits.numel())
    lens = _SumOfReadings.apply(read, len(states), at_once, *states, *reader.weights)
    return output, lens


class _SumOfReadings(torch.autograd.Function):
    """The sum of ``read`` over states, differentiated a few states at a time as they are read.

    All layers' (positions, vocabulary) matrices together would not fit, and to make each again in
    the backward pass costs a third of its operations once more. Between the passes the weights'
    gradient of the sum is held. Can be differentiated once, and walked back once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        read: Callable[[torch.Tensor], torch.Tensor],
        count: int,
        at_once: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Return the sum; ``tensors`` are ``count`` states, then all weights ``read`` may use."""
        states, weights = tensors[:count], tensors[count:]
        values = []
        by_state: list[torch.Tensor | None] = []
        by_weight: list[torch.Tensor | None] = []
        differentiated = any(ctx.needs_input_grad)
        for start in range(0, count, at_once):
            few = states[start : start + at_once]
            with torch.set_grad_enabled(differentiated):
                leaf = torch.cat(few).detach().requires_grad_(differentiated)
                value = read(leaf)
            values.append(value.detach())
            if differentiated:
                first, *others = torch.autograd.grad(value, [leaf, *weights], allow_unused=True)
                by_state += first.split(len(few[0]))
                if by_weight:
                    torch._foreach_add_(_present(by_weight), _present(others))
                else:
                    by_weight = list(others)
        ctx.gradients = [*by_state, *by_weight]
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients made in `forward`, times ``gradient``, in place."""
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(_present(gradients), gradient)
        return (None, None, None, *gradients)


def _present(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def answer_states(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the final hidden states that predict the answer tokens, and those tokens.

    What `answer_logits` projects onto the vocabulary at once, for `output_head` to project in
    parts.

    Returns
    -------
    states
        Shape (label positions, hidden size).
    targets
        Shape (label positions,), token ids.
    """
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORE
    return _final_states(model, batch)[0][:, :-1][wanted], targets[wanted]


def _final_states(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every position's final hidden state, and the logits of at least the last position."""
    extra: dict[str, int] = {}
    if "logits_to_keep" in _forward_parameters(type(innermost(model))):
        extra["logits_to_keep"] = 1
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        output_hidden_states=True,
        **extra,
    )
    return output.hidden_states[-1], output.logits


def output_head(
    model: nn.Module, *, adapted: bool = True
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the map from final hidden states to logits in float32 or better.

    Parameters
    ----------
    adapted
        ``False`` leaves out a LoRA adapter on the head itself.
    """
    inner = innermost(model)
    head = inner.get_output_embeddings()
    if not adapted:
        head = getattr(head, "base_layer", head)
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)

    def project(states: torch.Tensor) -> torch.Tensor:
        logits = widen(head(states))
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return project


def check_head(model: nn.Module, batch: Batch) -> None:
    """Refuse a model whose logits are more than `output_head` of its final hidden states.

    Raises
    ------
    InputError
        Where the two differ on ``batch``.
    """
    with torch.no_grad():
        states, logits = _final_states(model, batch)
        projected = output_head(model)(states[:, -1])
    if not torch.allclose(projected, widen(logits[:, -1]), rtol=1e-3, atol=1e-3):
        raise InputError(
            f"the logits of {type(innermost(model)).__name__} are not its output head's alone",
            mend="use a model whose head is one projection (a final soft cap is known)",
        )


def in_chunks(
    model: nn.Module, read: Callable[..., tuple[torch.Tensor, ...]], *columns: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return ``read(*columns)``, its vocabulary-sized tensors made a few positions at a time.

    Their memory is bounded whatever the length of ``columns``: each chunk's are made again in the
    backward pass.

    Parameters
    ----------
    model
        Its vocabulary is the width of what ``read`` makes from each row.
    read
        Takes rows of ``columns`` and returns tensors of shape (rows,); called twice, it must
        return the same.
    columns
        Tensors of equal first dimension, at least 1.
    """
    vocabulary = innermost(model).get_output_embeddings().weight.shape[0]
    size, rows = max(1, CHUNK // vocabulary), len(columns[0])
    if rows <= size:
        return read(*columns)

    def joined(*part: torch.Tensor) -> torch.Tensor:
        # Apart, a result that no loss uses would keep what was made again for it.
        return torch.stack(read(*part), dim=1)

    pieces = [
        checkpoint(
            joined,
            *(column[start : start + size] for column in columns),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, rows, size)
    ]
    return torch.cat(pieces).unbind(dim=1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each row of log-probabilities, in nats, over the last dimension."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def answer_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed next-token entropy at the answer tokens, in nats."""
    return entropy(answer_logits(model, batch)[0].log_softmax(dim=-1)).sum()


def answer_log_probability_and_entropy(
    model: nn.Module,
    batch: Batch,
    *,
    soft: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of every answer token and the entropy it was drawn with, in nats.

    Both are over the full vocabulary, in chunks (`in_chunks`), and can be differentiated.

    Parameters
    ----------
    soft
        ``soft(positions, log_p)`` returns weights of the shape of ``log_p`` (rows, vocabulary)
        for those label positions, counted from 0; in place of log p(token) then stands their
        weighted sum of log-probabilities.

    Returns
    -------
    log_probability, entropy
        Shape (label positions,), row by row.
    """
    states, targets = answer_states(model, batch)
    head = output_head(model)

    def read(
        states: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        log_p = head(states).log_softmax(dim=-1)
        if soft is None:
            score = log_p.gather(1, targets[:, None])[:, 0]
        else:
            score = (soft(positions, log_p.detach()) * log_p).sum(dim=-1)
        return score, entropy(log_p)

    positions = torch.arange(len(targets), device=targets.device)
    score, spread = in_chunks(model, read, states, targets, positions)
    return score, spread
