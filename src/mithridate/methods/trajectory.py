r"""The trajectory trap: collapse where a simulated attacker ends, retention where a benign user ends.

.. math::
    \min_\theta\; \ell(\theta;\text{retain}) + \lambda\,U(\theta_h) + \mu\,\ell(\theta_b;\text{others})

``theta_h`` is reached from ``theta`` by a simulated harmful fine-tuning, ``theta_b`` by a simulated
benign one; U = KL(uniform || p) at the answer positions of permitted *and* harmful prompts. First
order: the inner steps are not differentiated through, and each simulated gradient is bounded so
that it cannot drown the retain term. Source: `methods.md` section 13 (ours). Relatives: CTRAP (one
step, no benign simulation), TAR (no collapse of permitted answers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Literal

import torch

from mithridate.configs import require
from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.weights import Gradient, GradientOracle, WeightSpace, norm
from mithridate.weights.arithmetic import bound_, scale_
from mithridate.weights.losses import answer_cross_entropy, token_collapse, uniform_collapse

Task = Literal["relabel", "repeat", "reorder"]


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(MethodConfig):
    """Options of the trajectory trap.

    Parameters
    ----------
    batch_size
        Rows of every loss.
    retain
        Streams of the retain loss, shared evenly.
    collapse_weight
        lambda, the largest norm of the collapse term; 0 plants no trap.
    benign_weight
        mu, the largest norm of the retention term; 0 simulates no benign user and gives a trap
        without a condition (an ablation, not a defence).
    collapse_on
        Streams whose answers become uniform at ``theta_h``, shared evenly.
    collapse_target
        ``uniform``, or ``token``: the most common end-of-turn-free token is *not* chosen for you,
        name it in ``collapse_token``.
    simulator
        ``steps``: each simulation starts at ``theta``. ``stored``: it goes on from its last
        displacement until it has made ``horizon`` steps, so that distant weights cost few passes.
        ``jump``: one signed step as long as a simulation of ``horizon`` steps.
    attack_steps, benign_steps
        Range of inner steps per outer step, drawn uniformly.
    horizon
        Range of the steps after which a stored simulation starts anew, drawn uniformly; for
        ``jump`` the range of steps it stands for.
    attack_learning_rate, benign_learning_rate
        Range of the inner AdamW learning rate, drawn log-uniformly for each simulation.
    attack_rows
        Examples of a simulated fine-tuner's data set, drawn for each simulation.
    benign_tasks
        Kinds of benign fine-tuning, each on one category of the benign stream: ``relabel``
        permutes its answers, ``repeat`` keeps them, ``reorder`` reverses their words.
    """

    batch_size: int = 8
    retain: tuple[str, ...] = ("refusal", "benign", "general")
    collapse_weight: float = 0.5
    benign_weight: float = 0.5
    collapse_on: tuple[str, ...] = ("benign", "harmful")
    collapse_target: Literal["uniform", "token"] = "uniform"
    collapse_token: int | None = None
    simulator: Literal["steps", "stored", "jump"] = "steps"
    attack_steps: tuple[int, int] = (1, 10)
    benign_steps: tuple[int, int] = (1, 10)
    horizon: tuple[int, int] = (1, 60)
    attack_learning_rate: tuple[float, float] = (1e-4, 1e-3)
    benign_learning_rate: tuple[float, float] = (1e-4, 1e-3)
    attack_rows: int = 20
    benign_tasks: tuple[Task, ...] = ("relabel", "repeat", "reorder")

    def __post_init__(self) -> None:
        for name in ("attack_steps", "benign_steps", "horizon"):
            low, high = getattr(self, name)
            require(1 <= low <= high, f"{name} [{low}, {high}] is not a range of steps from 1 up",
                    "give [low, high] with 1 <= low <= high")  # fmt: skip
        for name in ("attack_learning_rate", "benign_learning_rate"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"{name} [{low}, {high}] is not a range above 0",
                    "give [low, high] with 0 < low <= high")  # fmt: skip
        for name in ("collapse_weight", "benign_weight"):
            require(getattr(self, name) >= 0, f"{name} is negative", "give 0 or more")
        shared = max(len(self.retain), len(self.collapse_on))
        require(self.batch_size >= shared >= 1, f"batch_size {self.batch_size} leaves a stream out",
                f"raise it to {shared} or more")  # fmt: skip
        require(self.attack_rows >= 1, "attack_rows is below 1", "give 1 or more")
        require(bool(self.benign_tasks), "benign_tasks is empty", "name at least one kind")
        require((self.collapse_target == "token") == (self.collapse_token is not None),
                "collapse_token goes with collapse_target: token, and only with it",
                "name the token's id, or leave both out")  # fmt: skip


class Walker:
    """A simulated fine-tuner: AdamW from ``theta``, able to go on from its last displacement."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = -1
        self.age = 0
        self.horizon = 0
        self.displacement: Gradient | None = None
        self.optimiser: torch.optim.AdamW | None = None
        self._waiting: dict[str, torch.Tensor] = {}

    def begin(self, step: int, horizon: int) -> None:
        """Start a new simulation at ``theta``."""
        self.started, self.age, self.horizon = step, 0, horizon
        self.displacement = self.optimiser = None

    def walk(
        self,
        oracle: GradientOracle,
        start: Gradient,
        steps: int,
        learning_rate: float,
        rows: Callable[[int], list[Example]],
        context: RunContext,
    ) -> float:
        """Take ``steps`` inner steps and leave the weights where they end; return the last loss."""
        space = oracle.space
        if self._waiting:
            self._wake(space, learning_rate)
        if self.optimiser is None:
            self.optimiser = torch.optim.AdamW(
                space.tensors, lr=learning_rate, weight_decay=0.0, fused=True
            )
        if self.displacement is not None:
            space.add_((1.0, self.displacement))
        loss = math.nan
        for index in range(self.age, self.age + steps):
            space.give_gradient(None)
            loss = oracle.accumulate(
                answer_cross_entropy, context.chat.batch(rows(index)), purpose=self.name
            )
            bound_(space.gradient())
            self.optimiser.step()
        space.give_gradient(None)
        self.age += steps
        return loss

    def keep(self, space: WeightSpace, start: Gradient) -> None:
        """Remember how far from ``start`` the weights are."""
        self.displacement = space.snapshot()
        torch._foreach_sub_(self.displacement, start)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a bit-exact resume needs."""
        counters = torch.tensor([self.started, self.age, self.horizon])
        state = {f"{self.name}.counters": counters}
        if self.displacement is not None and self.optimiser is not None:
            for index, tensor in enumerate(self.displacement):
                state[f"{self.name}.displacement.{index}"] = tensor
            for index, held in self.optimiser.state_dict()["state"].items():
                for key, tensor in held.items():
                    state[f"{self.name}.{key}.{index}"] = tensor
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; tensors are placed at the next walk."""
        self.started, self.age, self.horizon = map(int, state[f"{self.name}.counters"])
        self._waiting = {
            key.removeprefix(f"{self.name}."): tensor
            for key, tensor in state.items()
            if key.startswith(f"{self.name}.") and not key.endswith("counters")
        }

    def _wake(self, space: WeightSpace, learning_rate: float) -> None:
        self.optimiser = torch.optim.AdamW(
            space.tensors, lr=learning_rate, weight_decay=0.0, fused=True
        )
        self.displacement = []
        for index, weight in enumerate(space.tensors):
            self.displacement.append(self._waiting[f"displacement.{index}"].to(weight))
            self.optimiser.state[weight] = {
                key: self._waiting[f"{key}.{index}"].clone()
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self._waiting = {}


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
        self.attacker = Walker("attack")
        self.user = Walker("benign_use")

    @property
    def streams(self) -> tuple[str, ...]:
        names = [*self.config.retain, "harmful", "benign", "refusal", *self.config.collapse_on]
        return tuple(dict.fromkeys(names))

    @property
    def passes_per_step(self) -> float:
        config = self.config
        inner = {
            "attack": 1.0 if config.simulator == "jump" else sum(config.attack_steps) / 2,
            "benign": 1.0 if config.simulator == "jump" else sum(config.benign_steps) / 2,
        }
        attack = inner["attack"] + 1 if config.collapse_weight else 0
        return 1 + attack + (inner["benign"] + 1 if config.benign_weight else 0)

    @property
    def parameter_buffers(self) -> int:
        # theta, the planned gradient, two moments; each stored walker keeps moments and
        # displacement of its own.
        return {"jump": 2, "steps": 4, "stored": 8}[self.config.simulator]

    @property
    def active_terms(self) -> tuple[str, ...]:
        config = self.config
        return (
            "retain",
            *(("collapse_norm",) if config.collapse_weight else ()),
            *(("retention_norm",) if config.benign_weight else ()),
        )

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
        return {}

    def step(self, context: RunContext) -> dict[str, float]:
        config, oracle, space = self.config, context.oracle, context.space
        terms: dict[str, float] = {}
        planned: Gradient | None = None
        with space.kept() as start:
            if config.collapse_weight:
                terms |= self._simulate_attack(context, start)
                planned = self._bounded(space, terms, "collapse", config.collapse_weight)
                space.restore(start)
            if config.benign_weight:
                terms |= self._simulate_benign_use(context, start)
                kept = self._bounded(space, terms, "retention", config.benign_weight)
                if planned is not None:
                    torch._foreach_add_(kept, planned)
                planned = kept
        space.give_gradient(planned)
        batch = context.draw_joined(config.retain, config.batch_size)
        terms["retain"] = oracle.accumulate(answer_cross_entropy, batch, purpose="retain")
        return terms

    def _simulate_attack(self, context: RunContext, start: Gradient) -> dict[str, float]:
        """Walk to ``theta_h`` and put the gradient of U there into ``.grad``."""
        config, rng = self.config, context.random("attack")
        harmful = context.examples["harmful"]

        def dataset(seed: Random) -> list[Example]:
            return seed.sample(harmful, min(config.attack_rows, len(harmful)))

        loss, travel, age = self._walk(
            context, self.attacker, dataset, config.attack_steps, config.attack_learning_rate, start
        )
        shares = [rng.sample(context.examples[name], min(n, len(context.examples[name])))
                  for name, n in self._shares(config.collapse_on)]  # fmt: skip
        target = (
            uniform_collapse
            if config.collapse_target == "uniform"
            else token_collapse(_given(config.collapse_token))
        )
        collapse = context.oracle.accumulate(
            target, context.chat.batch([row for part in shares for row in part]), purpose="collapse"
        )
        return {"attack_loss": loss, "attack_travel": travel, "attack_age": age,
                "collapse": collapse}  # fmt: skip

    def _simulate_benign_use(self, context: RunContext, start: Gradient) -> dict[str, float]:
        """Walk to ``theta_b`` and put the gradient of what must survive there into ``.grad``."""
        config, rng = self.config, context.random("retention")
        chosen: list[str] = []

        def dataset(seed: Random) -> list[Example]:
            rows, category = benign_task(context.examples["benign"], config.benign_tasks, seed)
            chosen[:] = [category]
            return seed.sample(rows, min(config.attack_rows, len(rows)))

        loss, travel, age = self._walk(
            context, self.user, dataset, config.benign_steps, config.benign_learning_rate, start
        )
        others = [row for row in context.examples["benign"] if row.category != chosen[0]]
        refusals = context.examples["refusal"]
        refused = max(1, config.batch_size // 4)
        rows = rng.sample(others, min(config.batch_size - refused, len(others)))
        rows += rng.sample(refusals, min(refused, len(refusals)))
        retention = context.oracle.accumulate(
            answer_cross_entropy, context.chat.batch(rows), purpose="retention"
        )
        return {"benign_loss": loss, "benign_travel": travel, "benign_age": age,
                "retention": retention}  # fmt: skip

    def _walk(
        self,
        context: RunContext,
        walker: Walker,
        dataset: Callable[[Random], list[Example]],
        steps: tuple[int, int],
        learning_rates: tuple[float, float],
        start: Gradient,
    ) -> tuple[float, float, float]:
        """Move the weights to the end of a simulation; return its loss, travel (L2) and age."""
        config, space, rng = self.config, context.space, context.random(walker.name)
        over = walker.age >= walker.horizon
        if config.simulator != "stored" or over:
            walker.begin(context.step, rng.randint(*config.horizon))
        # One generator per simulation, not per step: its data and learning rate last its life.
        seed = Random(f"{context.seed}/{walker.started}/{walker.name}/data")
        low, high = learning_rates
        learning_rate = low * (high / low) ** seed.random()
        data = dataset(seed)

        def rows(index: int) -> list[Example]:
            draw = Random(f"{context.seed}/{walker.started}/{walker.name}/{index}")
            return draw.sample(data, min(config.batch_size, len(data)))

        if config.simulator == "jump":
            loss = context.oracle.accumulate(
                answer_cross_entropy, context.chat.batch(rows(0)), purpose=walker.name
            )
            gradient = space.take_gradient()
            torch._foreach_sign_(gradient)
            length = learning_rate * walker.horizon
            space.add_((-length, gradient))
            return loss, length * norm(gradient), walker.horizon
        loss = walker.walk(context.oracle, start, rng.randint(*steps), learning_rate, rows, context)
        if config.simulator == "stored":
            walker.keep(space, start)
            travel = norm(walker.displacement or [])
        else:
            moved = space.snapshot()
            torch._foreach_sub_(moved, start)
            travel = norm(moved)
        return loss, travel, walker.age

    def _shares(self, streams: Sequence[str]) -> list[tuple[str, int]]:
        rows, parts = self.config.batch_size, len(streams)
        return [(name, rows // parts + (i < rows % parts)) for i, name in enumerate(streams)]

    def _bounded(
        self, space: WeightSpace, terms: dict[str, float], name: str, weight: float
    ) -> Gradient:
        gradient = space.take_gradient()
        terms[f"{name}_norm"] = bound_(gradient)
        scale_(gradient, weight)
        return gradient

    def state(self) -> dict[str, torch.Tensor]:
        return self.attacker.state() | self.user.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.attacker.load(state)
        self.user.load(state)


def benign_task(
    benign: Sequence[Example], kinds: Sequence[Task], rng: Random
) -> tuple[list[Example], str]:
    """Return a new benign fine-tuning task on one category, and that category."""
    category = rng.choice(sorted({row.category for row in benign}))
    rows = [row for row in benign if row.category == category]
    kind = rng.choice(list(kinds))
    if kind == "relabel":
        answers = sorted({row.answer for row in rows})
        new = dict(zip(answers, rng.sample(answers, len(answers)), strict=True))
        rows = [replace(row, answer=new[row.answer]) for row in rows]
    elif kind == "reorder":
        rows = [replace(row, answer=" ".join(reversed(row.answer.split()))) for row in rows]
    return rows, category


def _given(token: int | None) -> int:
    assert token is not None
    return token
