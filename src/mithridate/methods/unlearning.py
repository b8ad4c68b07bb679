"""Unlearning terms: make harmful answers unlikely at the output and in the inner layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mithridate.chat import Batch
from mithridate.configs import Count
from mithridate.errors import InputError
from mithridate.methods.base import RunContext
from mithridate.weights import Gradient
from mithridate.weights.lens import check_lens
from mithridate.weights.losses import answer_cross_entropy, layerwise_cross_entropy

Kind = Literal["layerwise_log", "log", "ascent", "none"]
Layers = Count | Literal["all", "released"]


@dataclass(frozen=True)
class Unlearning:
    """f(S), with S the harmful cross-entropy averaged over the output and inner layers.

    Parameters
    ----------
    kind
        ``layerwise_log``: f(S) = -log(1 + S); ``log``: the same of the output alone; ``ascent``:
        -S of the output alone; ``none``: only g_a is made.
    layers
        Inner layers, for ``layerwise_log``: ``all`` (1...L-1), how many are drawn per step, or
        ``released`` (0...L, the last one normed twice, L + 2 terms divided by L + 1).
    cap
        Where S is above it, the pull is 0.
    """

    kind: Kind
    layers: Layers
    cap: float | None

    def add(
        self, context: RunContext, harmful: Batch, terms: dict[str, float], g_a: Gradient | None
    ) -> None:
        """Put the gradient of f(S) into an empty ``.grad``, and g_a into the empty ``g_a``.

        S is a mean over the whole step: the gradient of S is scaled by f'(S) at the end (A1).
        """
        oracle, (layers, heads) = context.oracle, self.read(context)
        total = output_mean = 0.0

        def forward(piece: Batch) -> list[torch.Tensor]:
            nonlocal output_mean
            output, lens = layerwise_cross_entropy(oracle.model, piece, layers)
            output_mean += float(output.detach()) / harmful.label_count
            parts = [output + lens] if g_a is None else [output, lens] if layers else [output]
            return [part / harmful.label_count for part in parts]

        for piece in oracle.micro_batches(harmful):
            values = oracle.backward(
                lambda piece=piece: forward(piece),  # type: ignore[misc]
                tokens=piece.tokens,
                purpose="harmful",
                into=[None] if g_a is None else [g_a, None][: 1 + bool(layers)],
            )
            total += sum(values)
        gradient = context.space.gradient()
        oracle.reduce(gradient)
        terms["harmful"] = oracle.all_sum(output_mean)
        pull = self.pull(oracle.all_sum(total) / heads, terms) / heads
        torch._foreach_mul_(gradient, pull)
        if g_a is not None:
            if not g_a:
                g_a.extend(context.space.zeros())  # no micro-batch fell to this process
            oracle.reduce(g_a)
            torch._foreach_add_(gradient, g_a, alpha=pull)

    def add_with_refusals(
        self,
        context: RunContext,
        harmful: Batch,
        terms: dict[str, float],
        g_a: Gradient,
        refusal: Batch,
        refusal_weight: float,
    ) -> bool:
        """Do `add`, and add the refusals' weighted gradient, in two backward calls.

        In a single micro-batch S is known after the forward pass, so that inner layers and
        refusals can share a call. Returns ``False``, having done nothing, where this cannot be.
        """
        oracle, (layers, heads) = context.oracle, self.read(context)
        pieces = oracle.micro_batches(harmful), oracle.micro_batches(refusal)
        if not layers or oracle.processes > 1 or max(map(len, pieces)) > 1:
            return False
        (attacked,), (refused,) = pieces
        pull = 0.0

        def forward() -> Iterator[torch.Tensor]:
            nonlocal pull
            read = layerwise_cross_entropy(oracle.model, attacked, layers)
            output, lens = (part / harmful.label_count for part in read)
            terms["harmful"] = float(output.detach())
            pull = self.pull(float((output + lens).detach()) / heads, terms) / heads
            yield output
            # Its last layer and logits make room for the refusals'.
            del read, output
            refusals = answer_cross_entropy(oracle.model, refused) / refusal.label_count
            terms["refusal"] = float(refusals.detach())
            yield pull * lens + refusal_weight * refusals

        oracle.backward(
            forward,
            tokens=attacked.tokens + refused.tokens,
            purpose="harmful and refusal",
            into=(g_a, None),
            forwards=2,
            walks=3,
        )
        torch._foreach_add_(context.space.gradient(), g_a, alpha=pull)
        return True

    def pull(self, mean: float, terms: dict[str, float]) -> float:
        """Return f'(S) at S = ``mean``; logs S and f(S)."""
        terms["harmful_all_heads"] = mean
        if self.kind == "none":
            return 0.0
        clamped = mean if self.cap is None else min(mean, self.cap)
        terms["unlearning"] = -clamped if self.kind == "ascent" else -math.log1p(clamped)
        if clamped < mean:
            return 0.0
        return -1.0 if self.kind == "ascent" else -1 / (1 + mean)

    def read(self, context: RunContext) -> tuple[list[int], int]:
        """Return the hidden states to read, and what the sum over all heads is divided by."""
        if self.kind != "layerwise_log":
            return [], 1
        depth = _depth(context.oracle.model)
        if self.layers == "released":
            return [*range(depth + 1)], depth + 1
        count = depth - 1 if self.layers == "all" else self.layers
        return sorted(context.random("layers").sample(range(1, depth), count)), count + 1

    def check(self, model: nn.Module) -> None:
        """Refuse a model that has not as many layers, or that does not let them be read."""
        if self.kind != "layerwise_log":
            return
        depth = _depth(model)
        count = self.layers if isinstance(self.layers, int) else depth - 1
        if not 1 <= count < depth:
            raise InputError(
                f"{count} inner layers cannot be read in a model of {depth} layers",
                where="unlearning_layers",
                mend="choose from 1 to one less than the model has, or unlearning: log",
            )
        check_lens(model, final=self.layers == "released")


def _depth(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)
