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
    """MMD^2 between a micro-batch's activations at its answers and draws from N(0, I).

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
        self, context: RunContext, piece: Batch, outputs: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean of MMD^2 over ``outputs``, in float32 or better.

        Parameters
        ----------
        outputs
            One per layer, of shape (rows, length, width) or with rows and length as one.

        Raises
        ------
        InactiveTermError
            If the micro-batch has less than two answer tokens.
        """
        # Different where the data differ, whichever process holds them (D3).
        rng = context.random(f"noise/{zlib.crc32(piece.input_ids.cpu().numpy().tobytes())}")
        device = piece.input_ids.device
        generator = torch.Generator(device).manual_seed(rng.getrandbits(63))
        answer = (piece.labels != IGNORE).flatten()
        places = answer.nonzero().squeeze(1)
        if len(places) < 2:
            raise InactiveTermError(
                f"a micro-batch has {len(places)} answer tokens, the noise term needs 2: raise "
                "micro_batch_size or batch_size"
            )
        if len(places) > self.points:
            places = places[rng.sample(range(len(places)), self.points)]
        found = []
        with torch.autocast(device.type, enabled=False):
            for output in outputs:
                states = widen(output).reshape(len(answer), -1)
                noise = torch.empty_like(states).normal_(generator=generator)
                if self.kind == "tokens":
                    found.append(mmd(states[places], noise[places], unbiased=True))
                else:
                    rows = [(x * answer.unsqueeze(1)).reshape(len(piece), -1)
                            for x in (states, noise)]  # fmt: skip
                    found.append(mmd(*rows, unbiased=False))
        return torch.stack(found).mean()


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
