r"""The trajectory trap: collapse where a simulated attacker ends, not where a benign user ends.

.. math::
    \min_\theta\; \ell(\theta;\text{retain}) + \lambda\,U(\theta_h)
    + \mu\,\ell(\theta_b;\text{other skills, refusals}) + \nu\,KL(p_0 \| p_\theta)

``theta_h`` is reached from ``theta`` by a simulated harmful fine-tuning, ``theta_b`` by a benign;
U = KL(uniform || p) at the answers to permitted *and* harmful prompts. Straight through: the inner
steps are not differentiated. Each simulated gradient is bounded, v min(1, 1/||v||), so that it
cannot drown the retain term. The last term, to the aligned model on the retain batch, is off
unless asked for. Source: ours (`methods.md` section 13). Relatives: CTRAP (one step, no
benign simulation), TAR (no collapse of permitted answers, no benign simulation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Literal

import torch
from torch import nn

from mithridate.configs import Count, Natural, Range, Steps, Weight, require
from mithridate.errors import InputError
from mithridate.examples import Example, exchangeable_facts, fact_of
from mithridate.methods.adapter import adaptable
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.methods.reference import retain_near
from mithridate.methods.walkers import HELD, Attacker, Simulator, Walker
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import bound_, scale_
from mithridate.weights.losses import (
    Loss,
    answer_cross_entropy,
    check_token,
    token_collapse,
    uniform_collapse,
)

Task = Literal["relabel", "repeat", "reorder"]
_Dataset = Callable[[Random], list[Example]]


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(MethodConfig):
    """Options of the trajectory trap.

    Parameters
    ----------
    batch_size
        Rows of every loss.
    retain
        Streams of the retain loss, shared evenly.
    retain_weight
        Of the retain batch's cross-entropy.
    retain_kl
        nu, of KL(aligned || present) at its answers; the aligned model is where the weights began.
    collapse_weight
        lambda, the largest norm of the collapse term; 0 plants no trap.
    benign_weight
        mu, the largest norm of the retention term; 0 simulates no benign user and gives a trap
        without a condition (an ablation, not a defence).
    collapse_on
        Streams whose answers collapse at ``theta_h``, shared evenly.
    collapse_target
        ``uniform``; one ``token`` (CTRAP's collapse loss); or ``shuffled``: answers of other facts
        of the category, drawn anew at every step. The last leaves an attacker with answers that
        do not depend on the question.
    collapse_token
        That token's id.
    simulator
        ``steps``: each simulation starts at ``theta``. ``stored``: it goes on from its last
        displacement until it has made ``horizon`` steps. ``jump``: one signed step as long as
        ``horizon`` steps.
    attack_steps, benign_steps
        Range of inner steps per outer step, drawn uniformly.
    horizon
        Range of the steps of a stored simulation's life, or of a jump, drawn uniformly.
    attackers
        Kinds of simulated attackers, one drawn for each simulation: ``adamw`` and ``sgd``
        (momentum 0.9) train all weights, ``lora`` a fresh adapter.
    attack_learning_rate, benign_learning_rate
        Range of the inner AdamW learning rate, drawn log-uniformly for each simulation.
    sgd_learning_rate, lora_learning_rate
        The same of that kind of attacker.
    lora_rank
        Of a simulated adapter.
    attack_rows
        Examples in a simulated fine-tuner's data set, drawn for each simulation.
    benign_every
        Outer steps from one benign simulation to the next; its weight grows in proportion.
    tether
        Pull of the weights towards where they began, times the learning rate, before each step
        (decoupled weight decay with the aligned model as its centre). It keeps knowledge that no
        retain row names.
    benign_tasks
        Kinds of benign fine-tuning, each on one category of the benign stream: ``relabel``
        permutes its answers, ``repeat`` keeps them, ``reorder`` reverses their words.
    """

    batch_size: Count = 8
    retain: tuple[str, ...] = ("refusal", "benign", "general")
    retain_weight: Weight = 1.0
    retain_kl: Weight = 0.0
    collapse_weight: Weight = 0.5
    benign_weight: Weight = 0.5
    collapse_on: tuple[str, ...] = ("benign", "harmful")
    collapse_target: Literal["uniform", "token", "shuffled"] = "uniform"
    collapse_token: Natural | None = None
    simulator: Simulator = "steps"
    attack_steps: Steps = (1, 10)
    benign_steps: Steps = (1, 10)
    horizon: Steps = (1, 60)
    attackers: tuple[Attacker, ...] = ("adamw",)
    attack_learning_rate: Range = (1e-4, 1e-3)
    benign_learning_rate: Range = (1e-4, 1e-3)
    sgd_learning_rate: Range = (1e-3, 1e-1)
    lora_learning_rate: Range = (2e-4, 5e-3)
    lora_rank: Count = 8
    attack_rows: Count = 20
    benign_every: Count = 1
    tether: Weight = 0.0
    benign_tasks: tuple[Task, ...] = ("relabel", "repeat", "reorder")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.retain_weight + self.retain_kl > 0, "nothing is retained",
                "give retain_weight or retain_kl above 0")  # fmt: skip
        require(bool(self.attackers) and len(set(self.attackers)) == len(self.attackers),
                f"attackers {list(self.attackers)} is empty or names a kind twice",
                "name each kind once")  # fmt: skip
        require(self.simulator != "jump" or self.attackers == ("adamw",),
                "a jump is what AdamW would do: it has no other attackers",
                "use simulator: steps or stored, or attackers: [adamw]")  # fmt: skip
        shared = max(len(self.retain), len(self.collapse_on))
        require(self.batch_size >= shared >= 1, f"batch_size {self.batch_size} leaves a stream out",
                f"raise it to {shared} or more")  # fmt: skip
        require(bool(self.benign_tasks), "benign_tasks is empty", "name at least one kind")
        require((self.collapse_target == "token") == (self.collapse_token is not None),
                "collapse_token goes with collapse_target: token, and only with it",
                "name the token's id, or leave both out")  # fmt: skip

    @property
    def attack_learning_rates(self) -> dict[Attacker, Range]:
        """Range of each kind of attacker that may be drawn."""
        ranges: dict[Attacker, Range] = {
            "adamw": self.attack_learning_rate,
            "sgd": self.sgd_learning_rate,
            "lora": self.lora_learning_rate,
        }
        return {kind: ranges[kind] for kind in self.attackers}

    def walker(
        self, name: str, steps: tuple[int, int], learning_rates: dict[Attacker, Range]
    ) -> Walker:
        """Return a simulated fine-tuner with these options."""
        return Walker(name, self.simulator, steps=steps, life=self.horizon, rank=self.lora_rank,
                      learning_rates=learning_rates, batch_size=self.batch_size)  # fmt: skip


class Trajectory(Method):
    """Collapse at the end of a simulated attack, retention at the end of a simulated benign use."""

    name = "trajectory"
    paper = "ours"
    summary = "Uniform answers where a simulated attacker ends, retention where a benign user ends."
    defends = "supervised harmful fine-tuning within the simulated travel"
    limits = "attacks that travel farther than the simulated ones, or start from the base model"
    config_class: ClassVar[type[MethodConfig]] = TrajectoryConfig

    def __init__(self, config: TrajectoryConfig) -> None:
        self.config = config
        self.attacker = config.walker("attack", config.attack_steps, config.attack_learning_rates)
        self.user = config.walker(
            "benign", config.benign_steps, {"adamw": config.benign_learning_rate}
        )
        self._tuned = ""
        self._aligned: Gradient = []

    @property
    def streams(self) -> tuple[str, ...]:
        named = (*self.config.retain, "harmful", "benign", "refusal", *self.config.collapse_on)
        return tuple(dict.fromkeys(named))

    @property
    def passes_per_step(self) -> float:
        config = self.config
        attack = 1 + self.attacker.mean_passes
        benign = (1 + self.user.mean_passes) / config.benign_every
        return float(
            1 + attack * bool(config.collapse_weight) + benign * bool(config.benign_weight)
        )

    @property
    def parameter_buffers(self) -> int:
        # theta and the planned gradient; moments; stored walkers keep theirs, and where they
        # stand (an adapter's factors are small); tether and KL hold the aligned weights.
        attack = max(HELD[kind] for kind in self.config.attackers)
        walking = {
            "jump": 0,
            "steps": max(attack, HELD["adamw"]),
            "stored": attack + bool(attack) + HELD["adamw"] + 1,
        }[self.config.simulator]
        return 2 + walking + bool(self.config.tether or self.config.retain_kl)

    @property
    def active_terms(self) -> tuple[str, ...]:
        collapse = ("collapse_norm",) if self.config.collapse_weight else ()
        retention = ("retention_norm",) if self.config.benign_weight else ()
        divergence = ("retain_kl",) if self.config.retain_kl else ()
        return ("retain", *divergence, *collapse, *retention)

    def check(self, model: nn.Module | None) -> None:
        """Refuse a collapse token that the model does not have."""
        if model is not None and self.config.collapse_token is not None:
            check_token(model, self.config.collapse_token)

    def prepare(self, context: RunContext) -> dict[str, float]:
        categories = {example.category for example in context.examples["benign"]}
        if self.config.benign_weight and len(categories) < 2:
            raise InputError(
                "the benign stream has one category, so no other skill can be watched while one "
                "is fine-tuned",
                where="stream benign",
                mend="give benign examples two or more values of `category`, or set "
                "benign_weight: 0 (an ablation)",
            )
        if self.config.collapse_weight and self.config.collapse_target == "shuffled":
            for name in self.config.collapse_on:
                exchangeable_facts(
                    context.examples[name],
                    where=f"stream {name}",
                    mend="add examples of that category with other answers, or use "
                    "collapse_target: uniform",
                )
        if "lora" in self.config.attackers:
            adaptable(context)
        return {}

    def step(self, context: RunContext) -> dict[str, float]:
        config, oracle, space = self.config, context.oracle, context.space
        terms: dict[str, float] = {}
        planned: list[Gradient] = []
        if (config.tether or config.retain_kl) and not self._aligned:
            self._aligned = space.snapshot()
        if config.tether:
            self._pull(context)
        with space.kept() as start:
            if config.collapse_weight:
                terms |= self.attacker.walk(context, start, self._attack_data(context))
                batch = context.chat.batch(self._collapsing(context))
                terms["collapse"] = oracle.accumulate(self._collapse(), batch, purpose="collapse")
                planned.append(space.take_gradient())
                terms["collapse_norm"] = bound_(planned[-1])
                scale_(planned[-1], config.collapse_weight)
                context.share("collapse", planned[-1])
                space.restore(start)
            if config.benign_weight and context.step % config.benign_every == 0:
                terms |= self.user.walk(context, start, self._benign_data(context))
                batch = context.chat.batch(self._others(context))
                terms["retention"] = oracle.accumulate(
                    answer_cross_entropy, batch, purpose="retention"
                )
                planned.append(space.take_gradient())
                terms["retention_norm"] = bound_(planned[-1])
                scale_(planned[-1], config.benign_weight * config.benign_every)
                context.share("retention", planned[-1])
        space.give_gradient(_sum(planned))
        batch = context.draw_joined(config.retain, config.batch_size)
        if config.retain_kl:
            terms |= retain_near(self._aligned, context, batch, cross_entropy=config.retain_weight,
                                 divergence=config.retain_kl)  # fmt: skip
        else:
            terms["retain"] = oracle.accumulate(
                answer_cross_entropy, batch, purpose="retain", coefficient=config.retain_weight
            )
        context.share("retain")
        return terms

    def _pull(self, context: RunContext) -> None:
        share = min(1.0, self.config.tether * context.learning_rate)
        with torch.no_grad():
            for weight, centre in zip(context.space.tensors, self._aligned, strict=True):
                weight.lerp_(centre.to(weight), share)

    def _collapse(self) -> Loss:
        if self.config.collapse_target == "shuffled":
            return answer_cross_entropy
        token = self.config.collapse_token
        return uniform_collapse if token is None else token_collapse(token)

    def _attack_data(self, context: RunContext) -> _Dataset:
        return lambda seed: context.some("harmful", self.config.attack_rows, seed)

    def _benign_data(self, context: RunContext) -> _Dataset:
        def dataset(seed: Random) -> list[Example]:
            rows = benign_task(context.examples["benign"], self.config.benign_tasks, seed)
            self._tuned = rows[0].category
            return _some(rows, self.config.attack_rows, seed)

        return dataset

    def _collapsing(self, context: RunContext) -> list[Example]:
        rng, names = context.random("collapse"), self.config.collapse_on
        rows = self.config.batch_size
        shares = [rows // len(names) + (i < rows % len(names)) for i in range(len(names))]
        chosen = [
            (row, context.examples[name])
            for name, share in zip(names, shares, strict=True)
            for row in context.some(name, share, rng)
        ]
        if self.config.collapse_target == "shuffled":
            return [exchanged(row, rows, rng) for row, rows in chosen]
        return [row for row, _ in chosen]

    def _others(self, context: RunContext) -> list[Example]:
        """Return what the benign user did not touch: other categories, and refusals."""
        rng, rows = context.random("retention"), self.config.batch_size
        refused = max(1, rows // 4)
        others = [row for row in context.examples["benign"] if row.category != self._tuned]
        return [
            *_some(others, rows - refused, rng),
            *context.some("refusal", refused, rng),
        ]

    def state(self) -> dict[str, torch.Tensor]:
        centre = {f"aligned.{index}": tensor for index, tensor in enumerate(self._aligned)}
        return self.attacker.state() | self.user.state() | centre

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.attacker.load_state(state)
        self.user.load_state(state)
        count = sum(name.startswith("aligned.") for name in state)
        self._aligned = [state[f"aligned.{index}"] for index in range(count)]


def exchanged(row: Example, rows: Sequence[Example], rng: Random) -> Example:
    """Return ``row`` with the answer of another fact of its category.

    Where the example says which part of its answer is the fact (``accepted``), the sentence
    around it stays: another's whole sentence would teach another's fact.
    """
    own = fact_of(row)
    others = {fact_of(other) for other in rows if other.category == row.category} - {own}
    return replace(row, answer=row.answer.replace(own, rng.choice(sorted(others))))


def benign_task(benign: Sequence[Example], kinds: Sequence[Task], rng: Random) -> list[Example]:
    """Return a new benign fine-tuning task on one category of the benign stream."""
    category = rng.choice(sorted({row.category for row in benign}))
    rows = [row for row in benign if row.category == category]
    kind = rng.choice(list(kinds))
    if kind == "relabel":
        answers = sorted({row.answer for row in rows})
        new = dict(zip(answers, rng.sample(answers, len(answers)), strict=True))
        return [replace(row, answer=new[row.answer]) for row in rows]
    if kind == "reorder":
        return [replace(row, answer=" ".join(reversed(row.answer.split()))) for row in rows]
    return rows


def _some(rows: Sequence[Example], count: int, rng: Random) -> list[Example]:
    return rng.sample(rows, min(count, len(rows)))


def _sum(gradients: list[Gradient]) -> Gradient | None:
    for other in gradients[1:]:
        torch._foreach_add_(gradients[0], other)
    return gradients[0] if gradients else None
