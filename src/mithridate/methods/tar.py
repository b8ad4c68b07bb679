r"""TAR: weights from which simulated fine-tuning stays uninformed.

arXiv 2408.00761 (ICLR 2025); code rishub-tamirisa/tamper-resistance@19de233 (`methods.md` §11).

.. math:: \min_\theta\; \lambda_{TR}\,\mathbb{E}_{attack}\sum_i w_i\,L_{TR}(\theta_i)
          + \lambda_r\,L_{retain}(\theta), \qquad w_i = e^{s(i - K + 1)}
          \text{ where } i + 1 \equiv 0 \bmod m,

:math:`\theta_i` the weights after i + 1 of an attack's K steps. L_TR is minus the mean entropy of
the answers to harmful rows that the attack does not train on; its gradient at
:math:`\theta_i` is taken straight through. L_retain is the cross-entropy plus the mean distance of
every hidden state from the aligned model's.

========================= ============================= ===========================================
released code             here                          why
========================= ============================= ===========================================
entropy at all positions  at label positions            prompts and pads are no answers:
                                                        ``tamper_mask="all"`` (real tokens)
random-mapping stage      start at the given model      a stage of its own: immunise its checkpoint
one held-out batch        redrawn per evaluation        ``held_out="fixed"``
inner schedule            ``Adversary.schedule``        its warm-up is a constant 3.2
frozen reference model    its trainable weights alone   the rest is the same
the attack's weights      no decay, clipped at norm 1   as stock fine-tuning: `Adversary`'s
decay, without clipping                                 ``weight_decay``, ``max_grad_norm``
distance over pads too    over real tokens              pads have no state to keep
========================= ============================= ===========================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from mithridate.chat import IGNORE, Batch
from mithridate.configs import Count, Weight, from_mapping, require
from mithridate.errors import InactiveTermError, InputError
from mithridate.examples import Example, evenly_by_category
from mithridate.methods.adapter import adaptable
from mithridate.methods.adversaries import Adversary, attack
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.weights import Gradient, norm
from mithridate.weights.losses import Loss, answer_cross_entropy, answer_entropy, entropy, widen

_HELD_OUT = 4
"""One harmful row in this many of a category is kept from the attack of an outer step."""

PLAIN: tuple[dict[str, Any], ...] = ({}, {"first": "benign"})
LORA: dict[str, Any] = {"lora_rank": 8, "learning_rates": [2e-5, 2e-4, 4e-4]}


@dataclass(frozen=True, kw_only=True)
class TARConfig(MethodConfig):
    """Options of TAR.

    Parameters
    ----------
    batch_size
        Rows of the retain and held-out batches.
    adversary_rows
        Rows of each of the attack's batches.
    retain
        Streams of L_retain, shared evenly.
    inner_steps
        K, steps of the simulated attack.
    evaluate_every
        m, its steps from one evaluation of L_TR to the next.
    decay
        s of the weights w_i; ``None`` takes 4 / K, which keeps the sum of w_i where K changes.
    tamper_weight
        lambda_TR; 0 makes no pass.
    retain_weight
        lambda_r; 0 makes no pass.
    distance_weight
        Of the hidden states' distance within L_retain.
    retain_distance
        Its ``norm``, or ``squared`` (as printed in the paper).
    tamper_mask
        Positions of L_TR: answers (``label``), or ``all`` tokens.
    tamper_bound
        L_TR at or below this is left alone; ``None`` never is.
    held_out
        Batch of L_TR: ``redrawn`` at each evaluation, or ``fixed`` for an outer step.
    adversaries
        Options of `Adversary`, of which every outer step draws one. ``None``: harmful rows;
        benign, then harmful rows; and, unless the defence trains an adapter itself, LoRA of
        rank 8 (at ten times the rates: ours).
    """

    batch_size: Count = 8
    adversary_rows: Count = 4
    retain: tuple[str, ...] = ("general",)
    inner_steps: Count = 64
    evaluate_every: Count = 4
    decay: float | None = None
    tamper_weight: Weight = 4.0
    retain_weight: Weight = 1.0
    distance_weight: Weight = 1.0
    retain_distance: Literal["norm", "squared"] = "norm"
    tamper_mask: Literal["label", "all"] = "label"
    tamper_bound: float | None = None
    held_out: Literal["redrawn", "fixed"] = "redrawn"
    adversaries: tuple[dict[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.evaluate_every <= self.inner_steps,
            f"evaluate_every {self.evaluate_every} finds nothing in {self.inner_steps} inner_steps",
            "give evaluate_every <= inner_steps",
        )
        require(
            self.batch_size >= len(self.retain) >= 1,
            "a batch of TAR would be empty",
            "give every stream at least one row",
        )
        require(
            self.tamper_weight + self.retain_weight > 0,
            "no term of TAR is left",
            "give tamper_weight or retain_weight a number above 0",
        )
        require(self.adversaries != (), "adversaries is empty", "name one, or leave it out")
        self.kinds()

    def kinds(self, *, adapter: bool = False) -> list[Adversary]:
        """Return the adversaries; ``adapter``: where the defence trains an adapter itself."""
        given = self.adversaries
        if given is None:
            given = PLAIN if adapter else (*PLAIN, LORA)
        found = []
        for index, options in enumerate(given):
            try:
                found.append(from_mapping(Adversary, options, where="adversaries"))
            except InputError as error:
                raise InputError(f"adversaries[{index}]: {error.what}", mend=error.mend) from None
        return found

    def weight(self, step: int) -> float:
        """Return w after ``step`` of the K inner steps; 0 where L_TR is not asked for."""
        if step % self.evaluate_every:
            return 0.0
        decay = 4 / self.inner_steps if self.decay is None else self.decay
        return math.exp(decay * (step - self.inner_steps))


class TAR(Method):
    """min lambda_TR * sum of w_i * (minus held-out entropy after i + 1 attack steps) + retain."""

    name = "tar"
    paper = "arXiv 2408.00761"
    summary = "Keeps answers uncertain all along simulated fine-tuning attacks."
    defends = "fine-tuning within the simulated steps, rates, optimisers and adapters"
    limits = "many passes a step; order, seed and adapters of the attack matter"
    config_class: ClassVar[type[MethodConfig]] = TARConfig

    def __init__(self, config: TARConfig) -> None:
        self.config = config
        self.tampered = config.tamper_weight > 0
        self.anchored = config.retain_weight > 0 and config.distance_weight > 0
        self._kinds = config.kinds()
        self._aligned: Gradient = []

    @property
    def streams(self) -> tuple[str, ...]:
        used = list(self.config.retain) if self.config.retain_weight else []
        if self.tampered:
            used += ["harmful", *(kind.first for kind in self._kinds if kind.first)]
        return tuple(dict.fromkeys(used))

    @property
    def passes_per_step(self) -> float:
        config = self.config
        inner = config.inner_steps + config.inner_steps // config.evaluate_every
        return float(self.tampered * inner + (config.retain_weight > 0))

    @property
    def parameter_buffers(self) -> int:
        # The weights to return to, the planned gradient, the attack's optimiser.
        inner = 2 + max(kind.buffers for kind in self._kinds) if self.tampered else 0
        return inner + self.anchored

    @property
    def active_terms(self) -> tuple[str, ...]:
        terms = ["retain"] if self.config.retain_weight else []
        terms += ["distance"] if self.anchored else []
        return (*terms, "attack", "tamper") if self.tampered else tuple(terms)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Keep the aligned weights, whose hidden states are the reference."""
        if self.tampered:
            require(
                len(context.examples["harmful"]) > 1,
                "one harmful row cannot be both trained on and held out",
                "give the stream harmful more rows",
            )
            adapter = any("lora_" in name for name in context.space.names)
            self._kinds = self.config.kinds(adapter=adapter)
            if any(kind.lora_rank is not None for kind in self._kinds):
                adaptable(context)
        if self.anchored:
            self._aligned = context.space.snapshot()
        return {}

    def step(self, context: RunContext) -> dict[str, float]:
        space, terms = context.space, dict[str, float]()
        space.give_gradient(None)
        if self.config.retain_weight:
            self._retain(context, terms)
            terms["retain_norm"] = norm(space.gradient())
            context.share("retain")
        if self.tampered:
            self._tamper(context, terms)
            context.share("tamper")
        return terms

    def _tamper(self, context: RunContext, terms: dict[str, float]) -> None:
        """Add lambda_TR times the sum of w_i L_TR's gradients along one attack to ``.grad``."""
        config, space = self.config, context.space
        # Evaluations add to it in place; it waits aside while the attack steps.
        planned = space.take_gradient()
        kind = context.random("adversary").choice(self._kinds)
        trained, held_out = self._split(context)
        evaluations = _epochs(
            held_out,
            config.batch_size,
            context.random("held-out rows"),
            evenly="harmful" in context.balanced,
        )
        rows = next(evaluations)
        with space.kept() as start:
            losses = attack(
                context,
                kind,
                self._attack_batches(context, kind, trained),
                start,
                steps=config.inner_steps,
                seed=context.random("attack"),
            )
            for step, loss in enumerate(losses, start=1):
                terms["attack"] = loss
                if weight := config.weight(step):
                    space.give_gradient(planned)
                    terms["tamper"] = self._uninform(context, rows, weight)
                    planned = space.take_gradient()
                    if config.held_out == "redrawn":
                        rows = next(evaluations)
            terms["travel"] = space.travel(start)
        space.give_gradient(planned)

    def _uninform(self, context: RunContext, rows: list[Example], weight: float) -> float:
        """Add lambda_TR * w_i * L_TR's gradient to ``.grad``; return L_TR."""
        oracle, batch, config = context.oracle, context.chat.batch(rows), self.config
        loss: Loss = _answers_negative_entropy
        if config.tamper_mask == "all":
            loss = _everywhere_negative_entropy(batch)
        if config.tamper_bound is not None:
            value = oracle.loss(loss, batch, purpose="tamper bound")
            if value <= config.tamper_bound:
                return value
        return oracle.accumulate(
            loss, batch, purpose="tamper", coefficient=config.tamper_weight * weight
        )

    def _split(self, context: RunContext) -> tuple[list[Example], list[Example]]:
        """Return the harmful rows that this outer step's attack trains on, and those held out."""
        rng = context.random("held-out split")
        rows = context.examples["harmful"]
        categories: dict[str, list[Example]] = {}
        for row in rows:
            categories.setdefault(row.category, []).append(row)
        # Where no category has two rows, none can be on both sides.
        several = len(categories) < len(rows)
        trained: list[Example] = []
        held_out: list[Example] = []
        for part in categories.values() if several else [rows]:
            order = rng.sample(part, len(part))
            kept = min(max(1, len(part) // _HELD_OUT), len(part) - 1)
            held_out += order[:kept]
            trained += order[kept:]
        return trained, held_out

    def _attack_batches(
        self, context: RunContext, kind: Adversary, harmful: list[Example]
    ) -> Iterator[Batch]:
        steps, rows = self.config.inner_steps, self.config.adversary_rows
        rng = context.random("attack rows")
        switch = round(steps * rng.betavariate(6, 3)) if kind.first else 0
        evenly = context.balanced
        before: Iterator[list[Example]] = iter(())
        if kind.first:
            first = context.examples[kind.first]
            before = _epochs(first, rows, rng, evenly=kind.first in evenly)
        after = _epochs(harmful, rows, rng, evenly="harmful" in evenly)
        for step in range(steps):
            yield context.chat.batch(next(before if step < switch else after))

    def _retain(self, context: RunContext, terms: dict[str, float]) -> None:
        """Put lambda_r times L_retain's gradient into ``.grad``."""
        config, oracle = self.config, context.oracle
        batch = context.draw_joined(config.retain, config.batch_size)
        if not self.anchored:
            terms["retain"] = oracle.accumulate(
                answer_cross_entropy, batch, purpose="retain", coefficient=config.retain_weight
            )
            return
        if not self._aligned:
            raise InactiveTermError("there are no reference weights: prepare() was not called")
        references: list[list[torch.Tensor]] = []

        def remember(model: nn.Module, piece: Batch) -> torch.Tensor:
            references.append(_states(model, piece)[1])
            return torch.zeros(())

        with context.space.exchanged(self._aligned):
            oracle.loss(remember, batch, purpose="reference")
        waiting, apart = iter(references), 0.0
        # The oracle divides by the label positions; distances are means over all tokens.
        share: float = config.distance_weight * batch.label_count / batch.tokens

        def loss(model: nn.Module, piece: Batch) -> torch.Tensor:
            nonlocal apart
            cross_entropy, states = _states(model, piece)
            distances = [
                (here - there).norm(dim=-1)
                for here, there in zip(states, next(waiting), strict=True)
            ]
            if config.retain_distance == "squared":
                distances = [distance.square() for distance in distances]
            distance = torch.stack(distances).mean(dim=0).sum()
            apart += float(distance.detach())
            return cross_entropy + share * distance

        total = oracle.accumulate(loss, batch, purpose="retain", coefficient=config.retain_weight)
        terms["distance"] = oracle.all_sum(apart) / batch.tokens
        terms["retain"] = total - config.distance_weight * terms["distance"]


def _states(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the summed answer cross-entropy, and every layer's states of the real tokens."""
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        output_hidden_states=True,
    )
    cross_entropy: torch.Tensor = functional.cross_entropy(
        widen(output.logits[:, :-1]).flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    real = batch.attention_mask.bool()
    states = [widen(state[..., real, :]) for state in output.hidden_states]
    # Gemma 3n's layers carry several states a token.
    return cross_entropy, [torch.cat([*s], dim=-1) if s.dim() == 3 else s for s in states]


def _answers_negative_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    return -answer_entropy(model, batch)


def _everywhere_negative_entropy(whole: Batch) -> Loss:
    """Return L_TR over all tokens of ``whole``, scaled for the oracle, which divides by labels."""
    scale = whole.label_count / whole.tokens

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits[batch.attention_mask.bool()]
        return -scale * entropy(widen(logits).log_softmax(dim=-1)).sum()

    return loss


def _epochs(
    rows: list[Example], count: int, rng: Random, *, evenly: bool
) -> Iterator[list[Example]]:
    """Yield ``count`` rows at a time, each epoch in an order of its own, or evenly by category."""
    categories = [row.category for row in rows]
    waiting: list[Example] = []
    while True:
        while len(waiting) < count:
            if evenly:
                waiting += [rows[index] for index in evenly_by_category(categories, rng)]
            else:
                waiting += rng.sample(rows, len(rows))
        yield waiting[:count]
        waiting = waiting[count:]
