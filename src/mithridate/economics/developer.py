"""What a defence costs its developer once, and what the alternatives cost at every query.

A token costs 2 N FLOP forward and 4 N backward (N parameters), so that fine-tuning on D tokens for
E epochs costs F = 6 N D E. All quantities are arrays of draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mithridate.economics.constants import Draws, Values

Source = Literal["measured", "modelled"]

_HOUR = 3600.0


def training_flops(parameters: float, tokens: Draws, epochs: Draws | float = 1.0) -> Draws:
    """Return 6 N D E, the FLOP of plain fine-tuning on ``tokens`` tokens an epoch."""
    return np.asarray(6.0 * parameters * tokens * epochs)


def seconds(flops: Draws, values: Values) -> Draws:
    """Return how long one GPU computes at the utilisation of training."""
    return flops / (values["gpu.flops_bf16"] * values["gpu.mfu_train"])


def dollars(flops: Draws, values: Values, *, gpus: Draws | float = 1.0) -> Draws:
    """Return the rent of ``gpus`` GPUs while one of them computes ``flops``, in USD."""
    return seconds(flops, values) / _HOUR * values["gpu.price_per_hour"] * gpus


def alignment_flops(parameters: float, values: Values) -> Draws:
    """Return F_SFT, the FLOP of plain alignment on the data that a defence uses."""
    tokens = values["immunise.rows"] * values["immunise.tokens_per_row"]
    return training_flops(parameters, tokens, values["immunise.epochs"])


def tokenbuncher_flops(parameters: float, values: Values) -> Draws:
    """Return n_q [K T 2N / eta + 6N K (P + T) + 2 * 2N K (P + T)].

    K rollouts of T tokens on prompts of P tokens, decoded at the efficiency eta, one training pass
    over them, and one forward pass each of the old policy and the reference.
    """
    rollouts = values["tokenbuncher.rollouts"]
    answer = values["tokenbuncher.response_tokens"]
    read = rollouts * (values["tokenbuncher.prompt_tokens"] + answer)
    decoded = rollouts * answer / values["gpu.decode_efficiency"]
    per_query = parameters * (2.0 * decoded + 6.0 * read + 4.0 * read)
    return np.asarray(values["tokenbuncher.queries"] * per_query)


@dataclass(frozen=True, kw_only=True)
class AlignmentCost:
    """What one method costs once.

    Attributes
    ----------
    source
        Whether its time relative to plain fine-tuning was measured.
    ratio
        That relation.
    flops
        As time on a GPU at training's utilisation: ratio * F_SFT.
    gpus
        Rented for the run.
    compute, tuning, review, battery
        USD: the run; runs thrown away while its settings were found; data; one evaluation.
    """

    source: Source
    ratio: Draws
    flops: Draws
    gpus: Draws
    compute: Draws
    tuning: Draws
    review: Draws
    battery: Draws

    @property
    def total(self) -> Draws:
        """C_imm, in USD."""
        return self.compute + self.tuning + self.review + self.battery

    @property
    def again(self) -> Draws:
        """C_re: one re-immunisation with its evaluation, in USD."""
        return self.compute + self.battery


def alignment_cost(
    method: str,
    parameters: float,
    values: Values,
    *,
    source: Source,
    ratio: Draws | None = None,
) -> AlignmentCost:
    """Return a method's one-time cost.

    Parameters
    ----------
    ratio
        Time of a step over plain fine-tuning's; ``None`` for TokenBuncher takes its own formula.
    """
    plain = alignment_flops(parameters, values)
    flops = tokenbuncher_flops(parameters, values) if ratio is None else ratio * plain
    gpus = values.of_method("gpu.reserved", method, "gpu.reserved.default")
    compute = dollars(flops, values, gpus=gpus)
    return AlignmentCost(
        source=source,
        ratio=flops / plain,
        flops=flops,
        gpus=gpus,
        compute=compute,
        tuning=compute * values["cost.tuning_runs"],
        review=values["cost.review"] + np.zeros_like(compute),
        battery=values["cost.battery"] + np.zeros_like(compute),
    )


def per_query_costs(parameters: float, values: Values) -> dict[str, Draws]:
    """Return the USD per query of everything that watches at inference time.

    Returns
    -------
    dict
        ``monitor``: a guard model on a GPU of one's own reads prompt and answer, 2 N_g (P + T);
        ``monitor_listed``: the same at the list price of a hosted guard; ``input_filter``: the
        guard reads the prompt only, 2 N_g P; ``moderation``: a moderation API, by its records of
        characters; ``classifiers`` and ``later_classifiers``: a published share of what serving
        the query itself costs, 2 N (P + T / eta).
    """
    prompt, answer = values["query.prompt_tokens"], values["query.response_tokens"]
    guard = 2.0 * values["guard.parameters"]
    served = 2.0 * parameters * (prompt + answer / values["gpu.decode_efficiency"])
    characters = (prompt + answer) * values["moderation.characters_per_token"]
    records = np.ceil(characters / values["moderation.characters_per_record"])
    serving = dollars(np.asarray(served), values)
    return {
        "monitor": dollars(guard * (prompt + answer), values),
        "monitor_listed": values["guard.price_per_million"] / 1e6 * (prompt + answer),
        "input_filter": dollars(guard * prompt, values),
        "moderation": values["moderation.price_per_thousand_records"] / 1e3 * records,
        "classifiers": values["guard.classifier_overhead"] * serving,
        "later_classifiers": values["guard.later_classifier_overhead"] * serving,
    }


def break_even(
    extra: Draws,
    again: Draws,
    per_query: Draws,
    values: Values,
    *,
    utility_loss: float,
) -> Draws:
    """Return Q*, the queries from which on a defence is cheaper than watching.

    Q* = (C_imm - C_SFT + lambda T C_re) / (c_mon - v du); infinite where c_mon <= v du.

    Parameters
    ----------
    extra
        C_imm - C_SFT, USD.
    again
        C_re, USD for each of the lambda T re-immunisations.
    per_query
        c_mon, USD.
    utility_loss
        du, what the defence costs in utility, 0 to 1; v is ``query.utility_value``.
    """
    times = values["lifetime.re_immunisations_per_year"] * values["lifetime.years"]
    paid = extra + times * again
    saved = per_query - values["query.utility_value"] * utility_loss
    never = saved <= 0
    return np.asarray(np.where(never, np.inf, paid / np.where(never, 1.0, saved)))
