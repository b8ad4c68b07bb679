"""`GradientOracle`: the one place that runs forward and backward passes, and counts them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import distributed, nn

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError, InputError, NonFiniteError
from mithridate.weights.arithmetic import Gradient, WeightSpace, scale_
from mithridate.weights.losses import Loss


@dataclass
class PassCount:
    """What one purpose has cost so far on this process.

    ``forwards`` count traversals and ``backwards`` calls; ``walks`` are the traversals of those
    calls (one that walks two graphs counts two). ``tokens`` are real (not padded) tokens that went
    through a forward pass, ``generated`` those that were sampled.
    """

    forwards: int = 0
    backwards: int = 0
    walks: int = 0
    tokens: int = 0
    generated: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


class GradientOracle:
    """Answers "the gradient of this loss, on this batch, at these weights, times this number".

    A batch is split into micro-batches, and over the processes of a distributed launch; the mean
    is always over the label positions of the *whole* batch (`methods.md` §2.4, A1), so neither
    split changes a result. Every process must be given the identical batch.

    Parameters
    ----------
    model
        The causal language model, unwrapped.
    micro_batch_size
        Rows per pass; ``None`` takes the whole batch at once.
    autocast
        Run passes under bfloat16 autocast. Passes that a finite difference depends on ask for
        true float32 with `full_precision`.
    """

    def __init__(
        self, model: nn.Module, *, micro_batch_size: int | None = None, autocast: bool = False
    ) -> None:
        self.model = model
        self.space = WeightSpace(model)
        self.micro_batch_size = micro_batch_size
        self.autocast = autocast
        self.ledger: dict[str, PassCount] = {}
        self._rounded = rounded_weights(model)
        self._process = psutil.Process()
        self._device = self.space.tensors[0].device

    @property
    def rounds(self) -> bool:
        """Whether passes are rounded: under autocast, or by frozen weights in less than float32."""
        return self.autocast or bool(self._rounded)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Run the body's passes in true float32: no autocast, no TF32 (`methods.md` P3, F2).

        Raises
        ------
        InputError
            If weights are stored in less than that, which nothing can undo.
        """
        refuse_rounded(self._rounded)
        before, self.autocast = self.autocast, False
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            self.autocast = before
            torch.set_float32_matmul_precision(precision)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Return this process's share of ``batch``, cut into micro-batches; there may be none.

        Every call with the same batch gives identical tensors (`methods.md` A2).
        """
        size = self._rows_per_pass(batch)
        pieces = [batch.rows(first, first + size) for first in self.first_rows(batch)]
        return [piece.trimmed().to(self._device) for piece in pieces]

    def first_rows(self, batch: Batch) -> list[int]:
        """Return the first row of each of `micro_batches`.

        Rows without a label add nothing to a loss, so that no pass is made where a micro-batch
        holds no others.
        """
        if batch.label_count == 0:
            raise InactiveTermError("a batch without a single answer token reached the oracle")
        size, (world, rank) = self._rows_per_pass(batch), _world()
        own = list(range(0, len(batch), size))[rank::world]
        return [first for first in own if batch.rows(first, first + size).label_count]

    def _rows_per_pass(self, batch: Batch) -> int:
        return min(self.micro_batch_size or len(batch), -(-len(batch) // _world()[0]))

    def accumulate(
        self, loss: Loss, batch: Batch, *, purpose: str, coefficient: float = 1.0
    ) -> float:
        """Add ``coefficient`` times the gradient of the mean loss to the weights' ``.grad``.

        Returns
        -------
        float
            The mean loss over the label positions of the whole batch, without the coefficient.
        """
        count = batch.label_count
        if _world()[0] > 1 and self.space.tensors[0].grad is not None:
            # The sum over processes below would otherwise count what is already there once each.
            scale_(self.space.gradient(), 1 / _world()[0])
        total = 0.0
        for piece in self.micro_batches(batch):
            (value,) = self.backward(
                lambda piece=piece: (loss(self.model, piece) * (coefficient / count),),  # type: ignore[misc]
                tokens=piece.tokens,
                purpose=purpose,
            )
            total += value
        self.reduce(self.space.gradient())
        return self.all_sum(total) / coefficient

    def gradient(self, loss: Loss, batch: Batch, *, purpose: str) -> tuple[Gradient, float]:
        """Return the gradient of the mean loss as a fresh buffer, and the loss.

        The weights' ``.grad`` is left as it was.
        """
        with self.fresh_gradient() as taken:
            value = self.accumulate(loss, batch, purpose=purpose)
        return taken, value

    @contextmanager
    def fresh_gradient(self) -> Iterator[Gradient]:
        """Run the body with an empty ``.grad``; fill the yielded list with what it accumulated."""
        before = [p.grad for p in self.space.tensors]
        self.space.give_gradient(None)
        taken: Gradient = []
        try:
            yield taken
            taken.extend(self.space.take_gradient())
        finally:
            for p, grad in zip(self.space.tensors, before, strict=True):
                p.grad = grad

    @contextmanager
    def _adding_to(self, gradient: Gradient) -> Iterator[None]:
        """Run the body with ``gradient`` as ``.grad``; an empty list is filled."""
        if not gradient:
            with self.fresh_gradient() as taken:
                yield
            gradient.extend(taken)
            return
        held = [p.grad for p in self.space.tensors]
        self.space.give_gradient(gradient)
        try:
            yield
        finally:
            for p, grad in zip(self.space.tensors, held, strict=True):
                p.grad = grad

    @contextmanager
    def training_only(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Run the body with the trainable weights of ``modules`` as the whole weight space.

        The other weights get no gradient there, not even a buffer of zeros, so that an optimiser
        step leaves them as they are.

        Raises
        ------
        InputError
            If ``modules`` have no trainable weights.
        """
        whole, chosen = self.space, {id(p) for module in modules for p in module.parameters()}
        frozen = [p for p in whole.tensors if id(p) not in chosen]
        try:
            for p in frozen:
                p.requires_grad_(False)
                p.grad = None
            self.space = WeightSpace(self.model)
            yield
        finally:
            self.space = whole
            for p in frozen:
                p.requires_grad_(True)

    def backward(
        self,
        forward: Callable[[], Iterable[torch.Tensor]],
        *,
        tokens: int,
        purpose: str,
        into: Sequence[Gradient | None] = (None,),
        create_graph: bool = False,
        inputs: Sequence[torch.Tensor] | None = None,
        forwards: int = 1,
        walks: int | None = None,
    ) -> list[float]:
        """Run a forward pass and a backward call for each term of ``forward``.

        Parameters
        ----------
        forward
            Returns scalar terms, each already normalised. A generator makes a term once the one
            before has been walked back; what belongs to that one alone is then free.
        into
            For each term the buffer its gradient is added to, or an empty list that it fills;
            ``None`` means ``.grad``.
        create_graph
            Fill the empty lists with gradients that can be differentiated themselves.
        inputs
            Tensors to differentiate by instead of the weights, which then get no gradient and
            cost none.
        forwards
            Traversals that ``forward`` makes.
        walks
            Traversals of the backward calls; ``None``: one each.

        Returns
        -------
        list of float
            The terms' values.
        """
        count = self.ledger.setdefault(purpose, PassCount())
        started = time.perf_counter()
        casting = torch.autocast(self._device.type, torch.bfloat16, enabled=self.autocast)
        with casting:
            terms = iter(forward())
        values = []
        for index, target in enumerate(into):
            with casting:
                term = next(terms)
            count.peak_bytes = max(count.peak_bytes, self._memory())
            value = float(term.detach())
            if value != value or value in (float("inf"), float("-inf")):
                raise NonFiniteError(purpose, value)
            values.append(value)
            last = index == len(into) - 1
            if target is None:
                term.backward(retain_graph=not last, inputs=inputs)
            elif create_graph:
                target.extend(
                    torch.autograd.grad(
                        term, self.space.tensors, create_graph=True, materialize_grads=True
                    )
                )
            else:
                with self._adding_to(target):
                    term.backward(retain_graph=not last)
            del term
        count.peak_bytes = max(count.peak_bytes, self._memory())
        count.forwards += forwards
        count.backwards += len(into)
        count.walks += len(into) if walks is None else walks
        count.tokens += tokens
        count.seconds += time.perf_counter() - started
        return values

    def loss(self, loss: Loss, batch: Batch, *, purpose: str) -> float:
        """Return the mean loss over the whole batch, without a gradient."""
        count = self.ledger.setdefault(purpose, PassCount())
        started = time.perf_counter()
        total = 0.0
        with (
            torch.no_grad(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self.autocast),
        ):
            for piece in self.micro_batches(batch):
                total += float(loss(self.model, piece))
                count.forwards += 1
                count.tokens += piece.tokens
        count.seconds += time.perf_counter() - started
        return self.all_sum(total) / batch.label_count

    def reduce(self, gradient: Gradient) -> None:
        """Sum ``gradient`` over the processes of a distributed launch, in place (D1)."""
        if _world()[0] > 1:
            for tensor in gradient:
                distributed.all_reduce(tensor)

    def all_sum(self, value: float) -> float:
        """Return ``value`` summed over the processes."""
        if _world()[0] == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._device)
        distributed.all_reduce(tensor)
        return float(tensor)

    @property
    def processes(self) -> int:
        """Processes of the launch, each of which is given the same batches."""
        return _world()[0]

    @property
    def backwards(self) -> int:
        """Backward calls so far, over all purposes."""
        return sum(count.backwards for count in self.ledger.values())

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return int(self._process.memory_info().rss)


def rounded_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that are stored in less than float32."""
    exact = (torch.float32, torch.float64)
    return [name for name, p in model.named_parameters() if p.dtype not in exact]


def refuse_rounded(names: Sequence[str]) -> None:
    """Refuse weights in less than float32 where a difference of close gradients is taken.

    Frozen under an adapter they round every pass as autocast does, and cannot be asked not to.
    """
    if names:
        raise InputError(
            f"{len(names)} weights are stored in less than float32 (first: {names[0]}), and passes "
            "that differ by a small step would differ by rounding",
            where="model",
            mend="load the model with dtype=torch.float32 (training.autocast then gives the "
            "speed), or with seam choose hvp: exact",
        )


def _world() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0
