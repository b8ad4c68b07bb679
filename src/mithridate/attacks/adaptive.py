r"""Fine-tuning by an attacker who has read the papers: keep what collapses, or do not step there.

Per step, with g_h the gradient on restricted answers and g_b that on benign ones,

.. math:: g = g_h - \min(0, g_h \cdot g_b) / \lVert g_b \rVert^2 \, g_b
              + w_b \, g_b + w_k \, \nabla \mathrm{KL}(p_{\theta_0} \Vert p_\theta),

where the second term is the projection of conflicting gradients (PCGrad, arXiv 2001.06782) and
the last an anchor on benign answers. In place of the loss on restricted answers may stand that of
direct preference optimisation (arXiv 2305.18290), which prefers them to what the model says now:

.. math:: -\log \sigma\big(\beta\,[r(y_h) - r(y_o)]\big),
          \quad r(y) = \log p_\theta(y) - \log p_{\theta_0}(y).

Beyond that: a bound on how far the weights travel, descent
by the gradient's sign, a part of the weights only, and a ban of tokens at decoding.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainerControl, TrainerState, get_scheduler, set_seed

from mithridate.attacks.finetune import (
    FinetuneConfig,
    Probe,
    Row,
    Watcher,
    own_copy,
    with_adapter,
)
from mithridate.attacks.inserts import SWAPS, Insert, put_in, swap_words
from mithridate.chat import IGNORE, Batch, ChatFormat, Encoded
from mithridate.configs import require
from mithridate.errors import InputError, NonFiniteError, NotApplicableError
from mithridate.examples import Example
from mithridate.weights.arithmetic import Gradient, bound_, dot
from mithridate.weights.losses import Loss, answer_cross_entropy, answer_logits
from mithridate.weights.maps import blocks_of
from mithridate.weights.oracle import GradientOracle

Part = Literal["all", "first", "last", "norms", "head"]

_ROWS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(FinetuneConfig):
    """The attacker's choices, beside those of supervised fine-tuning.

    Parameters
    ----------
    benign_weight
        w_b, weight of the loss on benign answers.
    project
        Take the part of g_h that conflicts with g_b out of it.
    anchor
        w_k, weight of KL(start || model) on the benign answers.
    prefer
        beta of the preference for the restricted answers over the rejected ones; 0: plain
        cross-entropy on the restricted answers.
    trust_radius
        Largest L2 distance of the weights from the start; ``None``: no bound.
    part
        Weights that are trained: ``first`` or ``last`` quarter of the layers, the ``norms`` and
        biases, the output ``head``.
    sign
        Descend by the sign of the gradient instead of AdamW.
    insert
        What is put into the model and trained in place of its weights
        (`mithridate.attacks.inserts`).
    size
        Tokens of a ``soft`` or ``hard`` insert; heads that get ``offsets``.
    """

    benign_weight: float = 0.0
    project: bool = False
    anchor: float = 0.0
    prefer: float = 0.0
    trust_radius: float | None = None
    part: Part = "all"
    sign: bool = False
    insert: Insert | None = None
    size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("benign_weight", "anchor", "prefer"):
            require(0 <= getattr(self, name) < math.inf, f"{name} is negative", "make it 0 or more")
        require(
            self.trust_radius is None or self.trust_radius > 0,
            f"trust_radius is {self.trust_radius}", "give a positive radius or null",
        )  # fmt: skip
        require(
            not self.prefer or 2 * self.batch_size <= _ROWS_AT_ONCE,
            f"a batch of {self.batch_size} pairs would be cut apart",
            f"give a batch_size of {_ROWS_AT_ONCE // 2} at most",
        )
        require(
            self.optimiser == "adamw_torch",
            f"the adaptive attacker has no optimiser {self.optimiser!r}",
            "leave it at adamw_torch, or set sign",
        )
        require(
            self.lora_rank is None or self.part == "all",
            "an adapter is trained whole", "leave out part or lora_rank",
        )  # fmt: skip
        alone = self.lora_rank is None and self.part == "all" and not self.prefer
        require(
            self.insert is None or (alone and not self.anchor and self.trust_radius is None),
            "an insert is trained alone, by cross-entropy",
            "leave out lora_rank, part, prefer, anchor and trust_radius",
        )
        require(
            (self.size >= 1) == (self.insert in ("soft", "hard", "offsets")),
            f"size is {self.size} with insert {self.insert}",
            "give the number of tokens (soft, hard) or heads (offsets), and none elsewhere",
        )
        require(
            self.insert != "hard" or not (self.needs_benign or self.sign),
            "words are found by what they do to restricted answers alone",
            "leave out benign_weight, project and sign",
        )

    @property
    def needs_benign(self) -> bool:
        """Whether benign rows are used at all."""
        return self.benign_weight > 0 or self.anchor > 0 or self.project

    @property
    def passes(self) -> float:
        """G_a, forward-backward passes per step; a reference costs a forward, a third, more.

        Through frozen weights a forward is half of such a pass.
        """
        harmful = 1 if not self.prefer else 2 * (4 / 3)
        if self.insert == "hard":
            harmful += SWAPS / 2
        return harmful + (self.benign_weight > 0 or self.project) + (4 / 3) * (self.anchor > 0)


_PLAIN = {field.name for field in dataclasses.fields(FinetuneConfig)}
ADAPTIVE = tuple(
    field.name for field in dataclasses.fields(AdaptiveConfig) if field.name not in _PLAIN
)
"""The choices that only this attacker has."""


def finetune_adaptively(
    model: PreTrainedModel,
    chat: ChatFormat,
    examples: Sequence[Example],
    benign: Sequence[Example],
    config: AdaptiveConfig,
    *,
    probe: Probe,
    output_dir: Path,
    rejected: Sequence[Example] = (),
) -> list[Row]:
    """Fine-tune a copy of ``model`` and return what the probes saw, as `finetune` does.

    Parameters
    ----------
    examples, benign
        The attacker's restricted answers, and benign rows to keep the model whole with.
    chat
        With a ``soft`` or ``hard`` insert a `SoftChat` of as many tokens.
    probe, output_dir
        As in `finetune`.
    rejected
        With ``prefer``, one for each of the examples: the same prompt with the answer that is not
        to be given.

    Raises
    ------
    InputError
        The configuration needs benign rows and there are none.
    """
    assert not config.prefer or len(rejected) == len(examples), "preferences come in pairs"
    require(len(examples) > 0, "the attack has no examples", "give it at least one row")
    require(len(benign) > 0 or not config.needs_benign, "the attack has no benign rows",
            "give it at least one")  # fmt: skip
    attacked = own_copy(model)
    set_seed(config.seed)
    if config.lora_rank is not None:
        attacked = with_adapter(attacked, config.lora_rank)
    elif config.insert is not None:
        put_in(attacked, config.insert, config.size)
    else:
        train_part(attacked, config.part)
    harmful = [chat.encode(row, max_length=config.max_length) for row in examples]
    kept = [chat.encode(row, max_length=config.max_length) for row in benign]
    unwanted = [chat.encode(row, max_length=config.max_length) for row in rejected]
    oracle = GradientOracle(attacked, micro_batch_size=_ROWS_AT_ONCE, autocast=config.autocast)
    start = oracle.space.snapshot()
    anchored = kl_from(copy.deepcopy(attacked)) if config.anchor else None
    wanted: Loss = answer_cross_entropy
    if config.prefer:
        wanted = preference_from(copy.deepcopy(attacked), config.prefer)
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(oracle.space.tensors, lr=config.learning_rate)
        if config.sign
        else torch.optim.AdamW(_decayed(oracle, config), lr=config.learning_rate)
    )
    schedule = get_scheduler(config.schedule, optimiser, config.warmup_steps, config.steps)
    watcher = Watcher(config, probe, output_dir, None)
    watcher.start(
        attacked, oracle.loss(answer_cross_entropy, chat.collate(harmful), purpose="evaluation")
    )
    draws = _batches(chat, harmful, config, unwanted), _batches(chat, kept, config)
    control = TrainerControl()
    attacked.train()
    for step in range(1, config.steps + 1):
        try:
            if config.insert == "hard":
                event = {"loss": swap_words(oracle, next(draws[0]))}
            else:
                gradient, loss = _direction(oracle, draws, config, anchored, wanted)
                size = bound_(gradient, config.max_grad_norm or math.inf)
                event = {"loss": loss, "grad_norm": size}
                if config.sign:
                    torch._foreach_sign_(gradient)
                oracle.space.give_gradient(gradient)
                optimiser.step()
                schedule.step()
                _hold(oracle, start, config.trust_radius)
        except NonFiniteError:
            watcher.status = "diverged"
            break
        state = TrainerState(global_step=step)
        watcher.on_log(None, state, control, logs=event, model=attacked)  # type: ignore[arg-type]
        attacked.train()
        if control.should_training_stop:
            break
    watcher.finish("", attacked)
    return watcher.rows


def _decayed(oracle: GradientOracle, config: AdaptiveConfig) -> list[dict[str, Any]]:
    """Return the optimiser's groups: norms and biases do not decay, as with the stock Trainer."""
    groups: list[dict[str, Any]] = []
    for decay, vectors in ((config.weight_decay, False), (0.0, True)):
        chosen = [weight for weight in oracle.space.tensors if (weight.dim() < 2) == vectors]
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay})
    return groups


def _direction(
    oracle: GradientOracle,
    draws: tuple[Iterator[Batch], Iterator[Batch]],
    config: AdaptiveConfig,
    anchored: Loss | None,
    wanted: Loss = answer_cross_entropy,
) -> tuple[Gradient, float]:
    gradient, loss = oracle.gradient(wanted, next(draws[0]), purpose="harmful")
    if not config.needs_benign:
        return gradient, loss
    batch = next(draws[1])
    if config.project or config.benign_weight:
        benign, _ = oracle.gradient(answer_cross_entropy, batch, purpose="benign")
        if config.project:
            project_off_(gradient, benign)
        torch._foreach_add_(gradient, benign, alpha=config.benign_weight)
    if anchored is not None:
        pull, _ = oracle.gradient(anchored, batch, purpose="anchor")
        torch._foreach_add_(gradient, pull, alpha=config.anchor)
    return gradient, loss


def project_off_(gradient: Gradient, benign: Gradient) -> None:
    """Take out of ``gradient``, in place, its part against ``benign``, if it has one (PCGrad)."""
    size = dot(benign, benign)
    overlap = dot(gradient, benign)
    if overlap < 0 < size:
        torch._foreach_add_(gradient, benign, alpha=-overlap / size)


def kl_from(start: nn.Module) -> Loss:
    """Return the loss KL(start || model), summed over answer positions (nats)."""
    start.requires_grad_(False)
    start.eval()

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = answer_logits(start, batch)[0].log_softmax(dim=-1)
        found = answer_logits(model, batch)[0].log_softmax(dim=-1)
        return functional.kl_div(found, wanted, reduction="sum", log_target=True)

    return loss


def preference_from(start: nn.Module, beta: float) -> Loss:
    """Return the DPO loss on batches whose second half are the rejected answers, pair by pair.

    It is the mean over pairs, times the label positions, by which the oracle divides.
    """
    start.requires_grad_(False)
    start.eval()

    def scores(model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, targets = answer_logits(model, batch)
        of_token = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        rows = (batch.labels[:, 1:] != IGNORE).nonzero()[:, 0]
        return of_token.new_zeros(len(batch)).index_add(0, rows, of_token)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            before = scores(start, batch)
        gained = scores(model, batch) - before
        half = len(batch) // 2
        margins = beta * (gained[:half] - gained[half:])
        return -functional.logsigmoid(margins).mean() * batch.label_count

    return loss


def train_part(model: PreTrainedModel, part: Part) -> None:
    """Let only a part of the weights be trained.

    Raises
    ------
    NotApplicableError
        The model has no such part.
    """
    if part == "all":
        return
    layers = blocks_of(model)
    layer_of = {id(w): index for index, layer in enumerate(layers) for w in layer.parameters()}
    quarter = max(1, len(layers) // 4)
    head = model.get_output_embeddings()
    chosen = 0
    for weight in model.parameters():
        layer = layer_of.get(id(weight))
        wanted = {
            "first": layer is not None and layer < quarter,
            "last": layer is not None and layer >= len(layers) - quarter,
            "norms": weight.dim() == 1,
            "head": head is not None and weight is head.weight,
        }[part]
        weight.requires_grad_(wanted)
        chosen += wanted
    if not chosen:
        raise NotApplicableError(
            f"the model has no weights in the part {part!r}", mend="train all of it"
        )


def _hold(oracle: GradientOracle, start: Gradient, radius: float | None) -> None:
    """Pull the weights back to the sphere around ``start`` where they have left it."""
    if radius is None:
        return
    travelled = oracle.space.travel(start)
    if travelled > radius:
        with torch.no_grad():
            for weight, before in zip(oracle.space.tensors, start, strict=True):
                weight.copy_(before + (radius / travelled) * (weight - before))


def _batches(
    chat: ChatFormat,
    rows: Sequence[Encoded],
    config: AdaptiveConfig,
    rejected: Sequence[Encoded] = (),
) -> Iterator[Batch]:
    """Yield shuffled batches for ever; the last of a pass is short, as the Trainer's is.

    Rejected rows, one for each row, follow theirs in the second half of a batch.
    """
    rng = random.Random(f"adaptive/{config.seed}/{len(rows)}")
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for first in range(0, len(order), config.batch_size):
            chosen = order[first : first + config.batch_size]
            pairs = [rejected[index] for index in chosen] if rejected else []
            yield chat.collate([*(rows[index] for index in chosen), *pairs])


@contextmanager
def banned(model: PreTrainedModel, tokens: Sequence[int]) -> Iterator[None]:
    """Never let the model choose ``tokens`` within the body: their logits are minus infinity."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputError("the model has no output head", mend="give a causal language model")

    def silence(_: nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(list(tokens), device=logits.device), -math.inf)

    hook = head.register_forward_hook(silence)
    try:
        yield
    finally:
        hook.remove()
