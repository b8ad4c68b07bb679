"""Staying near the aligned model: KL to what it answered, whose weights are one buffer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mithridate.chat import Batch
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.losses import answer_logits


def retain_near(
    aligned: Gradient,
    context: RunContext,
    batch: Batch,
    *,
    cross_entropy: float,
    divergence: float,
) -> dict[str, float]:
    """Add the gradient of a weighted cross-entropy and KL(aligned || present) to ``.grad``.

    One forward pass without a gradient more than plain fine-tuning.

    Parameters
    ----------
    aligned
        Trainable weights of the aligned model.

    Returns
    -------
    dict
        ``retain`` and ``retain_kl``, without their weights (nats per answer token).
    """
    oracle = context.oracle
    sums = torch.zeros(2, dtype=torch.float64)

    def loss(model: nn.Module, piece: Batch) -> torch.Tensor:
        # Casts that autocast caches here would serve the pass that follows.
        here = torch.autocast(
            piece.input_ids.device.type, torch.bfloat16, oracle.autocast, cache_enabled=False
        )
        with torch.no_grad(), context.space.exchanged(aligned), here:
            wanted = answer_logits(model, piece)[0].log_softmax(-1)
        oracle.ledger["retain"].forwards += 1
        logits, targets = answer_logits(model, piece)
        given = functional.cross_entropy(logits, targets, reduction="sum")
        apart = functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
        sums.add_(torch.stack([given, apart]).detach().cpu())
        return cross_entropy * given + divergence * apart

    oracle.accumulate(loss, batch, purpose="retain")
    retain, apart = (oracle.all_sum(float(total)) / batch.label_count for total in sums)
    return {"retain": retain, "retain_kl": apart}
