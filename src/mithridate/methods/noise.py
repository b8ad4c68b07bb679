"""How far the activations of answers are from noise: a maximum mean discrepancy."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mithridate.chat import IGNORE, Batch
from mithridate.errors import InactiveTermError
from mithridate.methods.base import RunContext
from mithridate.weights.losses import widen

Points = Literal["tokens", "released"]


@dataclass(frozen=True)
class Noise:
    """MMD^2 between a batch's activations at its answers and draws from N(0, I).

    Parameters
    ----------
    kind
        ``tokens``: each answer token is a point; unbiased. ``released``: each row is one, its
        answer's activations end to end, zero elsewhere; biased.
    points
        Most answer tokens, drawn anew each step.
    """

    kind: Points
    points: int

    def loss(
        self, context: RunContext, batch: Batch, layers: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean of MMD^2 over ``layers``, in float32 or better.

        Parameters
        ----------
        batch
            The whole step's: every point is compared with every other one.
        layers
            One tensor per layer, of shape (answer tokens, width): what `at_answers` returns of
            each micro-batch, end to end.

        Raises
        ------
        InactiveTermError
            If the batch has less than two answer tokens.
        """
        batch = batch.trimmed()
        rng = context.random(f"noise/{zlib.crc32(batch.input_ids.cpu().numpy().tobytes())}")
        device = layers[0].device
        generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
        answer = (batch.labels != IGNORE).flatten().to(device)
        places = answer.nonzero().squeeze(1)
        if len(places) < 2:
            raise InactiveTermError(
                f"a batch has {len(places)} answer tokens, the noise term needs 2: raise batch_size"
            )
        chosen: Sequence[int] | slice = slice(None)
        if self.kind == "tokens" and len(places) > self.points:
            chosen = rng.sample(range(len(places)), self.points)
        found = []
        with torch.autocast(device.type, enabled=False):
            for states in layers:
                noise = states.new_empty(len(answer), states.shape[1]).normal_(generator=generator)
                noise = noise[places]
                if self.kind == "tokens":
                    found.append(mmd(states[chosen], noise[chosen], unbiased=True))
                else:
                    rows = [x.new_zeros(len(answer), x.shape[1]).index_put((places,), x)
                            .reshape(len(batch), -1) for x in (states, noise)]  # fmt: skip
                    found.append(mmd(*rows, unbiased=False))
        return torch.stack(found).mean()


def at_answers(piece: Batch, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return ``outputs`` at a micro-batch's answer tokens, in float32 or better.

    Parameters
    ----------
    outputs
        One per layer, of shape (rows, length, width) or with rows and length as one.
    """
    answer = (piece.labels != IGNORE).flatten()
    return [widen(output).reshape(len(answer), -1)[answer] for output in outputs]


def mmd(x: torch.Tensor, y: torch.Tensor, *, unbiased: bool) -> torch.Tensor:
    r"""Return the squared maximum mean discrepancy of two sets of points.

    The kernel is a sum of five Gaussians, b the mean squared distance of all pairs, a constant:

    .. math:: k(x, y) = \sum_{i=0}^{4} \exp\bigl(-\|x - y\|^2 / (2^{i-2}\,b)\bigr).

    Parameters
    ----------
    x, y
        Shape (points, dimensions), float32 or float64.
    unbiased
        Leave each point's kernel with itself out.
    """
    both = torch.cat([x, y])
    # Distances do not change with the origin; near the points, less of them is rounded away.
    both = both - both.detach().mean(dim=0)
    squares = both.square().sum(dim=1)
    distances = (squares.unsqueeze(1) + squares - 2 * both @ both.T).clamp(min=0)
    distances = distances.masked_fill(torch.eye(len(both), dtype=torch.bool, device=x.device), 0.0)
    bandwidth = distances.detach().sum() / (len(both) * (len(both) - 1))
    widths = bandwidth * 2.0 ** torch.arange(-2, 3, device=x.device, dtype=x.dtype)
    kernel = (-distances.unsqueeze(0) / widths.reshape(-1, 1, 1)).exp().sum(dim=0)
    n = len(x)
    own = [kernel[:n, :n], kernel[n:, n:]]
    if unbiased:
        means = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in own]
    else:
        means = [k.mean() for k in own]
    return means[0] + means[1] - 2 * kernel[:n, n:].mean()
