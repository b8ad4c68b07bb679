"""The anchor: KL to a frozen reference model, over the full vocabulary."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError, InputError
from mithridate.methods.base import RunContext, open_part
from mithridate.weights.losses import (
    answer_states,
    check_head,
    entropy,
    in_chunks,
    output_head,
)
from mithridate.weights.oracle import PassCount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEND = "give an earlier version of the same model"


class Anchor:
    """weight * mean over answer tokens of KL(p || p_ref), in nats.

    Parameters
    ----------
    weight
        Above 0.
    source
        Folder or Hub id of the reference; ``None`` takes the model as `prepare` finds it. Where
        an adapter is trained that is the model without it, and costs no buffer.
    """

    def __init__(self, weight: float, source: str | None = None) -> None:
        self.weight = weight
        self.source = source
        self._frozen: nn.Module | None = None
        self._ready = False

    @property
    def buffers(self) -> int:
        """Parameter-sized buffers; before `prepare` knows of an adapter, those of full weights."""
        return int(not self._ready or self._frozen is not None)

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a reference of another vocabulary, before any weight of it is read.

        Raises
        ------
        InputError
            The reference has another tokenizer, or there is no such model.
        """
        if self.source is None:
            return
        from transformers import AutoConfig, AutoTokenizer

        from mithridate import models

        models.check(self.source)
        words, config = (
            open_part(kind, self.source, what="reference model", mend=_MEND)
            for kind in (AutoTokenizer, AutoConfig)
        )
        same_words = words.get_vocab() == tokenizer.get_vocab()
        widths = {each.get_text_config().vocab_size for each in (model.config, config)}
        if not same_words or len(widths) > 1:
            raise InputError(
                "the reference model has another tokenizer than the model",
                where=self.source,
                mend=_MEND,
            )

    def prepare(self, context: RunContext) -> None:
        """Keep or load the reference."""
        model: Any = context.oracle.model
        if self.source is not None:
            self._frozen = _load(self.source, context)
        elif not hasattr(model, "disable_adapter"):
            self._frozen = copy.deepcopy(model).requires_grad_(False)
        self._ready = True

    def add(self, context: RunContext, batch: Batch, name: str) -> dict[str, float]:
        """Add the gradient to ``.grad``; return the mean KL and the mean entropy of p.

        One differentiable pass, and one of the reference without a gradient.
        """
        if not self._ready:
            raise InactiveTermError("there is no reference: prepare() was not called")
        count = context.oracle.ledger.setdefault("reference", PassCount())
        spread: list[float] = []

        def loss(model: Any, piece: Batch) -> torch.Tensor:
            frozen = self._frozen
            reference = model if frozen is None else frozen
            with torch.no_grad(), model.disable_adapter() if frozen is None else nullcontext():
                anchors, _ = answer_states(reference, piece)
            count.forwards += 1
            count.tokens += piece.tokens
            states, _ = answer_states(model, piece)
            head, anchor = output_head(model), output_head(reference, adapted=frozen is not None)

            def read(states: torch.Tensor, anchors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                log_p, log_q = head(states).log_softmax(-1), anchor(anchors).log_softmax(-1)
                return (log_p.exp() * (log_p - log_q)).sum(-1), entropy(log_p).detach()

            divergence, own = in_chunks(model, read, states, anchors)
            spread.append(float(own.sum()))
            return divergence.sum()

        value = context.oracle.accumulate(
            loss, batch, purpose=f"{name}_kl", coefficient=self.weight
        )
        mean = context.oracle.all_sum(sum(spread)) / batch.label_count
        return {f"{name}_kl": value, f"{name}_entropy": mean}


def _load(source: str, context: RunContext) -> nn.Module:
    from mithridate import models

    own: Any = context.oracle.model
    reference: Any
    reference, _ = models.load(source)
    frozen: nn.Module = reference.to(own.device).eval().requires_grad_(False)
    check_head(frozen, context.chat.batch(context.examples["benign"][:1]).to(own.device))
    return frozen
