"""What every defence is: a rule that turns gradients into one update."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from mithridate.chat import Batch, ChatFormat
from mithridate.configs import check_values
from mithridate.examples import Example, evenly_by_category
from mithridate.models import loading
from mithridate.weights import Gradient, GradientOracle, WeightSpace, dot, norm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RunContext:
    """What a method may use during one immunisation run.

    Attributes
    ----------
    oracle
        Runs and counts every pass.
    draw
        ``draw(stream, rows)`` returns the next collated batch of a stream; its position is saved
        with the checkpoints.
    step
        Optimiser steps done so far.
    total_steps
        Optimiser steps of the whole run.
    seed
        Seed of the run.
    chat
        Formats examples for this tokenizer.
    examples
        The streams' examples (for preparation such as SDD's pairing).
    learning_rate
        The outer optimiser's learning rate at this step.
    output_dir
        The run folder, for what a method's preparation leaves behind; never texts.
    balanced
        Streams of which every category is drawn equally often.
    shares
        Where `share` puts the terms' gradients; ``None`` on steps that do not ask for them.
    """

    oracle: GradientOracle
    draw: Callable[[str, int], Batch]
    total_steps: int
    seed: int
    chat: ChatFormat
    examples: dict[str, list[Example]] = field(default_factory=dict)
    step: int = 0
    learning_rate: float = 0.0
    output_dir: Path | None = None
    balanced: frozenset[str] = frozenset()
    shares: dict[str, Gradient] | None = None

    @property
    def space(self) -> WeightSpace:
        """The trainable weights."""
        return self.oracle.space

    def random(self, what: str) -> Random:
        """Return a generator seeded by (seed, step, what): equal on all ranks (D3)."""
        return Random(f"{self.seed}/{self.step}/{what}")

    def rows_of_step(
        self, count: int, rows: int, what: str, categories: Sequence[str] | None = None
    ) -> list[int]:
        """Return which of ``count`` rows a method's own stream gives at this step.

        Epochs are permutations seeded by (seed, what, epoch), so the step is the whole state.

        Parameters
        ----------
        categories
            Of each row, to be drawn equally often.
        """

        def order(epoch: int) -> list[int]:
            rng = Random(f"{self.seed}/{what}/{epoch}")
            if categories is not None:
                return evenly_by_category(categories, rng)
            numbers = list(range(count))
            rng.shuffle(numbers)
            return numbers

        length = len(order(0))
        places = [
            divmod(position, length) for position in range(self.step * rows, (self.step + 1) * rows)
        ]
        orders = {epoch: order(epoch) for epoch, _ in places}
        return [orders[epoch][place] for epoch, place in places]

    def some(self, stream: str, count: int, rng: Random) -> list[Example]:
        """Return at most ``count`` different examples of a stream, chosen by ``rng``."""
        rows = self.examples[stream]
        count = min(count, len(rows))
        if stream not in self.balanced:
            return rng.sample(rows, count)
        order = evenly_by_category([row.category for row in rows], rng)
        return [rows[index] for index in list(dict.fromkeys(order))[:count]]

    def share(self, term: str, gradient: Gradient | None = None) -> None:
        """Note a term's part of the combined gradient (H2), on the steps that ask for it.

        Parameters
        ----------
        gradient
            The part, copied here; ``None`` takes all of ``.grad`` that no term has claimed yet.
        """
        if self.shares is None:
            return
        part = [t.clone() for t in (self.space.gradient() if gradient is None else gradient)]
        if gradient is None:
            for claimed in self.shares.values():
                torch._foreach_sub_(part, claimed)
        self.shares[term] = part

    def take_shares(self) -> dict[str, float]:
        """Return each noted part's L2 norm and its cosine with ``.grad``, and forget them."""
        found: dict[str, float] = {}
        if self.shares:
            whole = self.space.gradient()
            for term, part in self.shares.items():
                found[f"norm_{term}"] = size = norm(part)
                if size * norm(whole) > 0:
                    found[f"cos_{term}"] = dot(part, whole) / (size * norm(whole))
        self.shares = None
        return found

    def draw_joined(self, streams: tuple[str, ...], rows: int) -> Batch:
        """Draw ``rows`` rows in all, shared evenly among ``streams``, as one batch."""
        shares = [rows // len(streams) + (i < rows % len(streams)) for i in range(len(streams))]
        return join([self.draw(name, n) for name, n in zip(streams, shares, strict=True) if n])


def join(batches: list[Batch]) -> Batch:
    """Stack right-padded batches into one."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.input_ids.shape[1] for batch in batches)

    def stack(name: str, fill: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(
                    getattr(batch, name), (0, length - batch.input_ids.shape[1]), value=fill
                )
                for batch in batches
            ]
        )

    return Batch(
        input_ids=stack("input_ids", 0),
        attention_mask=stack("attention_mask", 0),
        labels=stack("labels", -100),
    )


def open_part(kind: Any, source: str, *, what: str, mend: str) -> Any:
    """Return another model's tokenizer or configuration; its weights are left alone.

    Parameters
    ----------
    kind
        `transformers.AutoTokenizer` or `transformers.AutoConfig`.
    what, mend
        For the message: what was to be loaded, and what to do about it.

    Raises
    ------
    InputError
        It is missing or damaged.
    """
    with loading(what, source, mend):
        return kind.from_pretrained(source, trust_remote_code=False)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method.

    The annotations (`configs.Count`, ...) say what an option may be: checked here, and told by
    `mithridate methods` beside the words of the docstring's ``Parameters``.
    """

    def __post_init__(self) -> None:
        check_values(self)


Config = TypeVar("Config", bound=MethodConfig)


def as_released(method: str, config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration with every value of the released code; warns, with what it loses."""
    default = type(config)()
    replaced = [
        f"{name} {given!r}"
        for name, value in values.items()
        if (given := getattr(config, name)) not in (value, getattr(default, name))
    ]
    lost = f": it replaces {', '.join(replaced)}" if replaced else ""
    warnings.warn(f"{method} as released is for reproduction only{lost}", stacklevel=3)
    return replace(config, **values)


class Method(ABC):
    """A defence.

    Class attributes describe it to `mithridate methods` and to the cost meter.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    defends: ClassVar[str]
    limits: ClassVar[str]
    spaces: ClassVar[tuple[str, ...]] = ("full", "lora")
    one_shot: ClassVar[bool] = False
    """Whether `prepare` does all the work, and no step is taken."""
    config_class: ClassVar[type[MethodConfig]]
    config: Any

    @property
    def adapter(self) -> Mapping[str, Any]:
        """Options of training (``lora_...``) that belong to the method as it is configured.

        Empty but where a released variant's lengths mean nothing in another adapter.
        """
        return {}

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """The streams that `step` draws from."""

    @property
    @abstractmethod
    def passes_per_step(self) -> float:
        """Backward calls of one optimiser step at one micro-batch (its mean where it varies)."""

    @property
    @abstractmethod
    def parameter_buffers(self) -> int:
        """Parameter-sized buffers beyond weights, gradient and optimiser state."""

    @property
    def active_terms(self) -> tuple[str, ...]:
        """Names among `step`'s results that stop the run when they stay zero (H1)."""
        return ()

    def check(self, model: nn.Module | None) -> None:  # noqa: B027
        """Refuse what no run could use, before any work.

        Asked first without a model, before it is read, then with it, before the run folder is
        written.
        """

    def check_tokenizer(  # noqa: B027
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Refuse other models whose vocabulary is not ``model``'s, right after `check`."""

    def prepare(self, context: RunContext) -> dict[str, float]:  # noqa: ARG002
        """Work before the first step (pairing, fidelity checks); returns what to log."""
        return {}

    @abstractmethod
    def step(self, context: RunContext) -> dict[str, float]:
        """Leave one combined gradient in ``.grad`` and return the terms to log."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors that a checkpoint must hold for a bit-exact resume."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Restore what `state` returned."""
