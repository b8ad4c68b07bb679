r"""Is the trap where it was planted? The model along one line, in multiples of the virtual step.

A defence that plants a collapse one virtual step away says nothing of shorter and longer steps.
The scan looks at the model at :math:`\theta - s\,d_v\,\hat u` for a range of s: before the
basin nothing happens, in it the model is ruined, beyond it an attacker may have overshot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from mithridate.chat import Batch
from mithridate.errors import InactiveTermError
from mithridate.weights import Gradient, GradientOracle, norm
from mithridate.weights.arithmetic import WeightSpace, scale_
from mithridate.weights.losses import answer_cross_entropy

Line = Literal["gradient", "sign", "random"]
LINES: tuple[Line, ...] = ("gradient", "sign", "random")
"""The harmful gradient, its sign (where AdamW's first step leads), and a random control."""

SCALES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
DOUBLED = math.log(2)

Look = Callable[[], Mapping[str, float]]


def unit_line(oracle: GradientOracle, harmful: Batch, kind: Line, *, seed: int = 0) -> Gradient:
    """Return a unit direction of ascent at the present weights; the scan walks against it.

    Parameters
    ----------
    harmful
        Restricted answers, whose mean cross-entropy is differentiated.
    seed
        Of the random direction.

    Raises
    ------
    InactiveTermError
        If the harmful gradient is zero.
    """
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        line = [
            torch.randn(tensor.shape, generator=generator).to(tensor)
            for tensor in oracle.space.tensors
        ]
    else:
        line, _ = oracle.gradient(answer_cross_entropy, harmful, purpose="evaluation")
        if kind == "sign":
            torch._foreach_sign_(line)
    size = norm(line)
    if size == 0:
        raise InactiveTermError("the harmful gradient is zero: there is no line to walk along")
    scale_(line, 1 / size)
    return line


def line_scan(
    space: WeightSpace,
    line: Gradient,
    look: Look,
    *,
    length: float,
    scales: Sequence[float] = SCALES,
) -> list[dict[str, float]]:
    """Look at the model at ``weights - scale * length * line`` for every scale.

    Parameters
    ----------
    line
        A unit direction, for example of `unit_line`.
    look
        Called at every point; the weights are restored bit for bit.
    length
        d_v, the L2 length of the virtual step.

    Returns
    -------
    list of dict
        Rows ``{scale, **what look returned}``.
    """
    rows = []
    for scale in scales:
        with space.shifted((-scale * length, line)):
            rows.append({"scale": scale, **look()})
    return rows


def basin(
    rows: Sequence[Mapping[str, float]], *, of: str = "log_perplexity", rise: float = DOUBLED
) -> list[float]:
    """Return the scales at which ``of`` is more than ``rise`` above its value at scale 0.

    By default those at which the perplexity of benign answers has more than doubled. A value that
    is not a number counts: nothing is left of such a model.
    """
    start = next(row[of] for row in rows if row["scale"] == 0)
    return [row["scale"] for row in rows if not row[of] - start <= rise]
