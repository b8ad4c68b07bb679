r"""TokenBuncher: starve harmful reinforcement learning of the entropy it feeds on.

arXiv 2508.20697; code Georgefwt/Token-Buncher@c0d2651 (`methods.md` §6). Harmful RL learns from
differences between sampled answers; where the answers to harmful prompts have no entropy there
are none. Steps alternate: entropy as reward (EaR) for the first eighth of the run, then EaR on odd
steps and the token noiser (TN) on even ones. K rollouts y of each harmful prompt:

.. math:: R(y) = -\bar H(y), \quad A = \frac{R - \mathrm{mean}_K R}{\mathrm{std}_K R + 10^{-6}},
          \quad L_{EaR} = -\tfrac1T \sum_t A \log p(y_t),

with H the full-vocabulary entropy at temperature 1 (R is a black box: its own gradient is not
used), and for rollouts with A >= 0 and z uniform noise, normalised over the tokens v != y_t,

.. math:: L_{TN} = -\tfrac1T \sum_t \Bigl[ (1-\lambda) \log p(y_t)
          + \lambda \sum_{v \ne y_t} z_v \log p(v) \Bigr].

On every step kappa KL(p || p_ref) is added, over the answers of the benign stream.

============================ ============================ =========================================
paper / code                 here                         why
============================ ============================ =========================================
noise mass lambda^2 = 0.01   lambda = 0.1                 the code applies lambda twice:
                                                          ``noise_scaling="released"``
reward -KL on benign data    a loss                       what K rollouts share cancels in A
k1 penalty, harmful rollouts ``reference="none"`` or ours the code has no benign data at all
pads trained by TN           answers only                 A = 0 >= 0 lets the code's pads in
equal rewards over 1e-6      groups skipped               ``min_group_std=0`` divides
4 clipped updates a batch    1, on policy                 the ratio is 1, so nothing is clipped
GRPO of veRL                 written out below            one loss of one line; `trl`'s GRPOTrainer
                                                          owns model, optimiser and loop, scores
                                                          decoded texts (its rewards see no logits),
                                                          and would need its loss, its scoring and
                                                          its optimiser step replaced
============================ ============================ =========================================

In expectation TN is label smoothing: its optimum has an entropy of about 1 nat a token at
lambda = 0.1, against EaR; see the logged ``entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import nn

from mithridate.chat import IGNORE, Batch
from mithridate.configs import Count, Limit, Positive, Share, Weight, require
from mithridate.errors import GateError
from mithridate.judges.refusal import is_refusal
from mithridate.methods.anchor import Anchor
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.methods.rollouts import roll_out, whole_groups
from mithridate.weights.arithmetic import scale_
from mithridate.weights.losses import answer_log_probability_and_entropy, check_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WARM_UP = 8
_GATE_PROMPTS = 64


Rollouts = Annotated[
    int, Limit("2 or more, for one answer has no spread to learn from", lambda n: n >= 2)
]
Mass = Annotated[float, Limit("inside (0, 1)", lambda x: 0 < x < 1)]


@dataclass(frozen=True, kw_only=True)
class TokenBuncherConfig(MethodConfig):
    """Options of TokenBuncher.

    Parameters
    ----------
    batch_size
        Harmful prompts per step.
    rollouts
        K, sampled answers per prompt.
    prompt_length
        Tokens of a prompt at most; its beginning is cut.
    response_length
        Tokens of a sampled answer at most.
    noise_weight
        lambda, the mass that TN moves off the sampled token.
    noise_scaling
        ``released``: the moved mass weighs lambda^2 only, as in the code.
    terms
        Both in turn; ``entropy`` or ``noise`` alone is an ablation.
    min_group_std
        Prompts whose K rewards spread less (nats) are skipped by EaR; their share is logged.
    reference
        ``benign_kl``: KL to the reference on the benign stream; or ``none``.
    reference_weight
        kappa, of the KL to the reference.
    reference_model
        Folder or Hub id of p_ref; ``None`` takes the model as it is before the first step.
    benign_rows
        Rows of the benign batch.
    min_refusal
        The run starts only if this share of sampled answers are refusals: EaR sharpens whatever
        is sampled. 0 asks nothing.
    refusals
        Refusals that the phrase judge does not know.
    """

    batch_size: Count = 32
    rollouts: Rollouts = 4
    prompt_length: Count = 320
    response_length: Count = 1024
    noise_weight: Mass = 0.1
    noise_scaling: Literal["mass", "released"] = "mass"
    terms: Literal["both", "entropy", "noise"] = "both"
    min_group_std: Weight = 1e-3
    reference: Literal["benign_kl", "none"] = "benign_kl"
    reference_weight: Positive = 1.0
    reference_model: str | None = None
    benign_rows: Count = 32
    min_refusal: Share = 0.95
    refusals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reference != "none" or self.reference_model is None,
                "reference_model is given, and reference: none does not use it",
                "leave one of them out")  # fmt: skip


class TokenBuncher(Method):
    """Entropy as reward and token noise on harmful rollouts, KL to the reference on benign rows."""

    name = "tokenbuncher"
    paper = "arXiv 2508.20697"
    summary = "Takes the entropy out of answers to harmful prompts by RL, and makes it noise."
    defends = "harmful reinforcement learning, which needs sampled answers that differ"
    limits = "supervised fine-tuning, also as the warm start of RL, is out of its scope"
    config_class: ClassVar[type[MethodConfig]] = TokenBuncherConfig

    def __init__(self, config: TokenBuncherConfig) -> None:
        self.config = config
        self._anchored = config.reference == "benign_kl"
        self._anchor = Anchor(config.reference_weight, config.reference_model)

    @property
    def streams(self) -> tuple[str, ...]:
        return ("prompts", "benign") if self._anchored else ("prompts",)

    @property
    def passes_per_step(self) -> float:
        return 1 + self._anchored

    @property
    def parameter_buffers(self) -> int:
        return self._anchor.buffers if self._anchored else 0

    @property
    def active_terms(self) -> tuple[str, ...]:
        # No spread among rollouts is this method's optimum: skipped groups are logged instead.
        return ("entropy", "benign_kl") if self._anchored else ("entropy",)

    def check_tokenizer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self._anchor.check(model, tokenizer)

    def prepare(self, context: RunContext) -> dict[str, float]:
        """Keep the reference, and check that it is refusals that will be sharpened."""
        if self._anchored:
            self._anchor.prepare(context)
        rows = context.some("prompts", _GATE_PROMPTS, context.random("gate"))
        sampled = self._roll_out(context, [row.prompt for row in rows], copies=1)
        check_head(context.oracle.model, sampled.rows(0, 1).to(context.space.tensors[0].device))
        decode = context.chat.tokenizer.decode
        texts = [
            str(decode(labels[labels != IGNORE], skip_special_tokens=True))
            for labels in sampled.labels
        ]
        refused = sum(is_refusal(text, self.config.refusals) for text in texts) / len(texts)
        if refused < self.config.min_refusal:
            raise GateError(
                f"{refused:.0%} of {len(texts)} sampled answers to harmful prompts are refusals "
                f"(needs {self.config.min_refusal:.0%}): TokenBuncher would sharpen the others "
                "too; align the model further, name its refusals, or lower min_refusal"
            )
        return {"sampled_refusal": refused}

    def step(self, context: RunContext) -> dict[str, float]:
        config = self.config
        context.space.give_gradient(None)
        chosen = context.some("prompts", config.batch_size, context.random("prompts"))
        rollouts = self._roll_out(context, [row.prompt for row in chosen], copies=config.rollouts)
        noisy = self.adds_noise(context.step, context.total_steps)
        terms = self._learn(context, rollouts, noisy=noisy)
        context.share("noise" if noisy else "entropy_reward")
        if self._anchored:
            benign = context.draw("benign", config.benign_rows)
            terms |= self._anchor.add(context, benign, "benign")
            context.share("benign_kl")
        return terms

    def adds_noise(self, step: int, total_steps: int) -> bool:
        """Whether this is a step of the token noiser."""
        if self.config.terms != "both":
            return bool(self.config.terms == "noise")
        return step >= total_steps // _WARM_UP and step % 2 == 0

    def _roll_out(self, context: RunContext, prompts: list[str], *, copies: int) -> Batch:
        return roll_out(
            context,
            prompts,
            copies=copies,
            prompt_length=self.config.prompt_length,
            response_length=self.config.response_length,
        )

    def _learn(self, context: RunContext, rollouts: Batch, *, noisy: bool) -> dict[str, float]:
        """Leave the gradient of L_EaR or L_TN in ``.grad``; rewards come from the same pass."""
        config, oracle = self.config, context.oracle
        seed = context.random("noise").getrandbits(40)
        totals = dict.fromkeys(("entropy", "reward_std", "skipped_groups", "trained_tokens"), 0.0)

        def loss(model: nn.Module, piece: Batch) -> torch.Tensor:
            first = next(firsts)
            rows, columns = (piece.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)

            def soft(positions: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
                # Named by its place in the step, a token's noise is the same in any micro-batch.
                places = ((first + rows[positions]) << 16) + columns[positions]
                targets = piece.labels[rows[positions], columns[positions] + 1]
                return noisy_targets(targets, log_p, seed + places, config)

            score, spread = answer_log_probability_and_entropy(
                model, piece, soft=soft if noisy else None
            )
            mean = torch.zeros(len(piece), dtype=spread.dtype, device=spread.device)
            mean = mean.index_add(0, rows, spread.detach()) / torch.bincount(rows)
            advantage, std = group_advantages(-mean.view(-1, config.rollouts), config.min_group_std)
            weight = (advantage >= 0).to(score.dtype) if noisy else advantage
            totals["entropy"] += float(mean.sum())
            totals["reward_std"] += float(std.sum())
            totals["skipped_groups"] += float((std < config.min_group_std).sum())
            totals["trained_tokens"] += float((weight.flatten()[rows] != 0).sum())
            return -(weight.flatten()[rows] * score).sum()

        with whole_groups(oracle, rollouts, config.rollouts) as firsts:
            value = oracle.accumulate(loss, rollouts, purpose="noise" if noisy else "entropy")
        totals = {name: oracle.all_sum(total) for name, total in totals.items()}
        groups = len(rollouts) / config.rollouts
        terms = {
            "entropy": totals["entropy"] / len(rollouts),
            "reward_std": totals["reward_std"] / groups,
            "skipped_groups": totals["skipped_groups"] / groups,
            "generated_tokens": float(rollouts.label_count),
        }
        if noisy:
            # The mean is over the tokens of rollouts with A >= 0, known only now (A1).
            share = rollouts.label_count / totals["trained_tokens"]
            scale_(context.space.gradient(), share)
            return terms | {"noise": value * share}
        return terms | {"entropy_reward": value}


def group_advantages(rewards: torch.Tensor, min_std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return GRPO's advantages of ``rewards`` (groups, K), and each group's unbiased spread.

    A group that spreads less than ``min_std`` has advantages of 0.
    """
    std = rewards.std(dim=1)
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) / (std[:, None] + 1e-6)
    return advantage.masked_fill((std < min_std)[:, None], 0.0), std


def noisy_targets(
    targets: torch.Tensor, log_p: torch.Tensor, seeds: torch.Tensor, config: TokenBuncherConfig
) -> torch.Tensor:
    """Return TN's target distributions.

    Parameters
    ----------
    targets
        Sampled tokens, shape (rows,).
    log_p
        Gives shape (rows, vocabulary), type and device.
    seeds
        Of each row's noise, shape (rows,).

    Returns
    -------
    torch.Tensor
        1 - lambda on the sampled token, and the mass lambda (``released``: lambda^2) spread over
        the others by uniform noise.
    """
    mass = config.noise_weight
    generator = torch.Generator(log_p.device)
    noise = torch.empty_like(log_p)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    noise.scatter_(1, targets[:, None], 0.0)
    noise *= (mass**2 if config.noise_scaling == "released" else mass) / noise.sum(1, keepdim=True)
    return noise.scatter_(1, targets[:, None], 1 - mass)
