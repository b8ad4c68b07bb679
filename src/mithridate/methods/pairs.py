"""Harmful and refused answers to the same prompts, and what tells them apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from mithridate.chat import IGNORE, Batch, Encoded
from mithridate.errors import InputError
from mithridate.examples import Example, normalise_prompt
from mithridate.methods.base import RunContext

Pair = tuple[Example, Example]


def pair_by_prompt(harmful: Sequence[Example], refusal: Sequence[Example]) -> list[Pair]:
    """Return harmful examples with the first refusal of the same prompt.

    Raises
    ------
    InputError
        If no prompt stands in both.
    """
    refusals: dict[str, Example] = {}
    for example in refusal:
        refusals.setdefault(normalise_prompt(example.prompt), example)
    keyed = [(normalise_prompt(example.prompt), example) for example in harmful]
    pairs = [(example, refusals[key]) for key, example in keyed if key in refusals]
    if not pairs:
        raise InputError(
            "no harmful prompt has a refusal",
            where="answer_mask",
            mend="give refusals to the harmful prompts, or use answer_mask: answer",
        )
    return pairs


def telling_pairs(context: RunContext) -> list[Pair]:
    """Return the pairs of a run whose answers differ; warns of those that become the same ids.

    Raises
    ------
    InputError
        If no pair is left.
    """
    pairs = pair_by_prompt(*(context.examples.get(name, []) for name in ("harmful", "refusal")))
    kept = []
    for pair in pairs:
        harmful, refusal = (context.chat.encode(example) for example in pair)
        if _differs(harmful, refusal) and _differs(refusal, harmful):
            kept.append(pair)
    alike = len(pairs) - len(kept)
    if not kept:
        raise InputError(
            f"the answers of all {alike} harmful prompts with a refusal are that refusal",
            where="answer_mask",
            mend="give harmful answers that differ from the refusals, or use answer_mask: answer",
        )
    if alike:
        warnings.warn(
            f"{alike} of {len(pairs)} harmful answers are their refusals, token by token: left out",
            stacklevel=3,
        )
    return kept


def _differs(own: Encoded, other: Encoded) -> bool:
    answer = own.input_ids[own.answer_start :]
    return answer != other.input_ids[own.answer_start :][: len(answer)]


def without_common_tokens(own: Batch, other: Batch) -> Batch:
    """Drop the labels of tokens that ``other`` has at the same position of the same row."""
    width = min(own.input_ids.shape[1], other.input_ids.shape[1])
    same = torch.zeros_like(own.labels, dtype=torch.bool)
    same[:, :width] = own.input_ids[:, :width] == other.input_ids[:, :width]
    same[:, :width] &= other.attention_mask[:, :width] == 1
    return replace(own, labels=own.labels.masked_fill(same, IGNORE))
