r"""Compositions: ``a+b``, wherever a method is named, plants several defences in one model.

With g_i the combined gradient that member i leaves on its own (`methods.md` H4),

.. math:: g = \sum_i w_i\,g_i \;\text{(sum)}, \qquad
          g = w_{i(t)}\,g_{i(t)} \;\text{(one member a step: alternate, sequence)}.

Members share the run's streams, optimiser and schedule; each keeps its own options, state, step
count, terms and pass counters, all under its label. A member that does all its work beforehand
(LoX) stands first. All members are prepared at the run's first weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from mithridate.configs import Count, Weight, from_mapping, require
from mithridate.errors import InputError
from mithridate.methods import METHODS
from mithridate.methods.base import Method, MethodConfig, RunContext
from mithridate.weights import Gradient
from mithridate.weights.arithmetic import scale_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Entry = TypeVar("Entry")


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(MethodConfig):
    """Options of a composition; members go by their labels (``sft``, ``seam``, ``sft_2``).

    Parameters
    ----------
    combine
        ``sum``: every member, every step. ``alternate``: the members in turn. ``sequence``: one
        after the other, each for its share of the run.
    weights
        Of the members' gradients, 1 where none is given; 0 leaves a member out (the ablation).
    turns
        Of each member, 1 where none is given: steps per round (``alternate``), share of the run
        (``sequence``; the steps themselves, where they add up to the run's).
    parts
        Options of each member, as a configuration of that method alone has them.
    """

    combine: Literal["sum", "alternate", "sequence"] = "sum"
    weights: dict[str, Weight] = field(default_factory=dict)
    turns: dict[str, Count] = field(default_factory=dict)
    parts: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    members: ClassVar[dict[str, str]] = {}
    """Method of each label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", "turns", "parts"):
            strange = [label for label in getattr(self, name) if label not in self.members]
            require(not strange, f"{name} names {', '.join(map(repr, strange))}, no member of it",
                    f"members: {', '.join(self.members)}")  # fmt: skip
        require(self.combine != "sum" or not self.turns, "in a sum every member is always on turn",
                "use combine: alternate or sequence, or leave turns out")  # fmt: skip
        present = [label for label in self.members if self.weight(label) > 0]
        training = [label for label in present if not METHODS.load(self.members[label]).one_shot]
        require(bool(training), "no member takes a step", "give one of them a weight above 0")
        for label in set(present) - set(training):
            require(self.weight(label) == 1, f"{label} leaves no gradient to weigh",
                    "give it the weight 1, or 0 to leave it out")  # fmt: skip
            require(present.index(label) < present.index(training[0]),
                    f"{label} works before the first step, but stands after {training[0]}",
                    f"name {label} first")  # fmt: skip
        self.configs()

    def weight(self, label: str) -> float:
        """Return the weight of a member's gradient."""
        return self.weights.get(label, 1.0)

    @property
    def batch_size(self) -> int:
        """Rows of the first member that takes steps: the cost stands beside SFT on as many."""
        own: Any = next(
            own
            for label, own in self.configs().items()
            if self.weight(label) > 0 and not METHODS.load(self.members[label]).one_shot
        )
        return int(own.batch_size if hasattr(own, "batch_size") else own.retain_rows)

    def configs(self) -> dict[str, MethodConfig]:
        """Return each member's own configuration."""
        found: dict[str, MethodConfig] = {}
        for label, method in self.members.items():
            kind = METHODS.load(method).config_class
            try:
                found[label] = from_mapping(kind, self.parts.get(label) or {}, where=label)
            except InputError as error:
                raise InputError(f"parts.{label}: {error.what}", mend=error.mend) from None
        return found


class Compose(Method):
    """The sum of its members' gradients, or one member's at a time."""

    config_class: ClassVar[type[MethodConfig]] = ComposeConfig

    def __init__(self, config: ComposeConfig) -> None:
        made = {
            label: METHODS.load(config.members[label])(own)
            for label, own in config.configs().items()
        }
        # What the members made of their options is what the run records.
        self.config = replace(
            config, parts={label: asdict(part.config) for label, part in made.items()}
        )
        self.parts: dict[str, Method] = {
            label: part for label, part in made.items() if config.weight(label) > 0
        }
        self._training = {label: part for label, part in self.parts.items() if not part.one_shot}
        self._turns = {label: config.turns.get(label, 1) for label in self._training}
        self._stepped = list(self._training)

    @property
    def adapter(self) -> Mapping[str, Any]:
        wanted = [part.adapter for part in self.parts.values() if part.adapter]
        require(all(each == wanted[0] for each in wanted),
                "two members as released belong in different adapters",
                "leave variant: released out of one of them")  # fmt: skip
        return wanted[0] if wanted else {}

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.streams))

    @property
    def passes_per_step(self) -> float:
        every = self.config.combine == "sum"
        rounds = sum(self._turns.values())
        return sum(
            part.passes_per_step * (1 if every else self._turns[label] / rounds)
            for label, part in self._training.items()
        )

    @property
    def parameter_buffers(self) -> int:
        # A member may keep its own from step to step; a sum waits beside the later members.
        waiting = self.config.combine == "sum" and len(self._training) > 1
        return sum(part.parameter_buffers for part in self.parts.values()) + waiting

    @property
    def active_terms(self) -> tuple[str, ...]:
        """Those of the members that took the latest step: the others were not on turn."""
        return tuple(
            f"{label}/{term}" for label in self._stepped for term in self.parts[label].active_terms
        )

    def check(self, model: nn.Module | None) -> None:
        for part in self.parts.values():
            part.check(model)

    def check_tokenizer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        for part in self.parts.values():
            part.check_tokenizer(model, tokenizer)

    def prepare(self, context: RunContext) -> dict[str, float]:
        for label in self._training:
            if self._done(label, context.total_steps, context.total_steps) == 0:
                raise InputError(
                    f"a run of {context.total_steps} steps has none for {label}",
                    where="turns",
                    mend="raise training.steps, or give it more turns",
                )
        found: dict[str, float] = {}
        for label, part in self.parts.items():
            with self._own(context, label) as own:
                logged = part.prepare(own)
            found |= {f"{label}/{name}": value for name, value in logged.items()}
        return found

    def step(self, context: RunContext) -> dict[str, float]:
        step, total = context.step, context.total_steps
        whole: Gradient | None = None
        idle = set(range(len(context.space.tensors)))
        terms: dict[str, float] = {}
        self._stepped = [
            label
            for label in self._training
            if self._done(label, step + 1, total) > self._done(label, step, total)
        ]
        for label in self._stepped:
            with self._own(context, label) as own, context.oracle.fresh_gradient() as gradient:
                logged = self.parts[label].step(own)
                idle -= {i for i, p in enumerate(context.space.tensors) if p.grad is not None}
            terms |= {f"{label}/{name}": value for name, value in logged.items()}
            if self.config.weight(label) != 1:
                scale_(gradient, self.config.weight(label))
            if whole is None:
                whole = gradient
            else:
                torch._foreach_add_(whole, gradient)
        context.space.give_gradient(whole)
        for index in idle:
            # Zeros would let an optimiser's moments and decay move what no member trains.
            context.space.tensors[index].grad = None
        return terms

    def _done(self, label: str, step: int, total: int) -> int:
        """Return how many of the first ``step`` steps of a run of ``total`` are a member's."""
        if self.config.combine == "sum":
            return step
        if self.config.combine == "alternate":
            order = [name for name, turns in self._turns.items() for _ in range(turns)]
            rounds, rest = divmod(step, len(order))
            return rounds * self._turns[label] + order[:rest].count(label)
        names, turns = list(self._turns), list(self._turns.values())
        place = names.index(label)
        first, last = (
            round(total * sum(turns[:count]) / sum(turns)) for count in (place, place + 1)
        )
        return min(max(step - first, 0), last - first)

    @contextmanager
    def _own(self, context: RunContext, label: str) -> Iterator[RunContext]:
        """Give a member the context that it would have on its own: its steps, its counters."""
        oracle, prefix = context.oracle, f"{label}/"
        step, total = context.step, context.total_steps
        if label in self._training:
            step, total = (self._done(label, count, total) for count in (step, total))
        own = replace(
            context,
            step=step,
            total_steps=total,
            output_dir=context.output_dir and context.output_dir / label,
            shares=None if context.shares is None else {},
        )
        ledger = oracle.ledger
        oracle.ledger = _under(prefix, ledger)
        try:
            yield own
        finally:
            ledger.update({prefix + purpose: count for purpose, count in oracle.ledger.items()})
            oracle.ledger = ledger
        if context.shares is not None:
            for term, part in (own.shares or {}).items():
                scale_(part, self.config.weight(label))
                context.shares[prefix + term] = part

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{label}/{name}": tensor
            for label, part in self._training.items()
            for name, tensor in part.state().items()
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for label, part in self._training.items():
            part.load_state(_under(f"{label}/", state))


def _under(prefix: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    return {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


def composed(name: str) -> type[Compose]:
    """Return the composition that ``name`` spells: methods joined by ``+``, repeats allowed.

    Raises
    ------
    InputError
        One of them is no registered method.
    """
    members: dict[str, str] = {}
    names = name.split("+")
    for place, method in enumerate(names):
        count = names[: place + 1].count(method)
        members[method if count == 1 else f"{method}_{count}"] = method
    kinds = {method: METHODS.load(method) for method in names}

    def said(what: str, between: str) -> str:
        return between.join(dict.fromkeys(getattr(kind, what) for kind in kinds.values()))

    described = {
        "name": name,
        "paper": said("paper", " + "),
        "summary": said("summary", " "),
        "defends": said("defends", "; "),
        "limits": said("limits", "; "),
        "spaces": tuple(
            space for space in Method.spaces if all(space in kind.spaces for kind in kinds.values())
        ),
        "config_class": type("ComposeConfig", (ComposeConfig,), {"members": members}),
    }
    return type("Compose", (Compose,), described)
